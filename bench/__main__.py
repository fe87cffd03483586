"""`python -m bench study|prune|latency|host|families|peers|soak|decode|vision|…` measure; `… report` writes RESULTS.md."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from bench.beside.measure import PeersOptions, measure_peers
from bench.checkpoint import SMALL, Sizes, make_checkpoint
from bench.counting import CountingOptions, measure_counting
from bench.families import FamiliesOptions, measure_families
from bench.host import HostOptions, measure_host
from bench.latency import LatencyOptions, measure_latency
from bench.load import LoadOptions, measure_load
from bench.prune import PruneOptions, measure_prune
from bench.report import RESULTS, write_report
from bench.rounded_vision import VisionOptions, measure_vision
from bench.rows import RowsOptions, measure_rows
from bench.serving import ServingOptions, measure_serving
from bench.serving import summary as served
from bench.shapes import SHAPES, SIZED
from bench.sizes import SizesOptions, measure_sizes
from bench.soak import SoakOptions, measure_soak
from bench.study import BUDGETS, CAPTIONS, SCENES, StudyOptions, default_methods, study
from leanvlm.runtime.console import one_line_errors
from leanvlm.runtime.manifest import parse_budgets


def main() -> None:
    """Run the command that the command line names."""
    with one_line_errors():
        _run(_parser().parse_args())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="write RESULTS.md from bench/results")
    options = commands.add_parser("study", help="compare pruners on the built-in model (about 10 minutes on two cores)")
    options.add_argument("--models", nargs="+", default=["demo"], help="demo, demo-small, or folders that training wrote")
    options.add_argument("--scenes", type=int, default=SCENES, help="scenes of each kind")
    options.add_argument("--captions", type=int, default=CAPTIONS, help="captions of each kind")
    options.add_argument("--pruners", nargs="+", default=None, help="name, or name:field=value,…; by default all")
    options.add_argument("--budgets", default=",".join(map(str, BUDGETS)), help="image tokens kept")
    counting = commands.add_parser("counting", help="split wrong counts into lost objects and the model's own mistakes")
    counting.add_argument("--scenes", type=int, default=CountingOptions.scenes, help="complex scenes")
    counting.add_argument("--budget", type=int, default=CountingOptions.budget, help="image tokens kept")
    counting.add_argument("--pruners", nargs="+", default=None, help="name, or name:field=value,…; by default all")
    prune = commands.add_parser("prune", help="time the prune stage at LLaVA-1.5-7B's widths")
    prune.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    prune.add_argument("--budget", type=int, default=64, help="image tokens kept")
    prune.add_argument("--runs", type=int, default=20, help="counted runs")
    random = commands.add_parser("checkpoint", help="write a random checkpoint of LLaVA-1.5-7B's shapes")
    random.add_argument("--output", type=Path, required=True, help="folder to write")
    random.add_argument("--small", action="store_true", help="two layers and narrow, to try the commands")
    _full_size(commands)
    _beside(commands)
    return parser


def _full_size(commands: Any) -> None:
    """Add the commands for models of full size, most of them on a GPU."""
    genai = commands.add_parser("genai-decoder", help="build a checkpoint's decoder for onnxruntime-genai's own loop")
    genai.add_argument("--checkpoint", type=Path, required=True)
    genai.add_argument("--output", type=Path, required=True, help="folder to write")
    kernels = commands.add_parser("kernels", help="list the GPU's kernels of each stage of a bundle")
    kernels.add_argument("bundle", type=Path)
    kernels.add_argument("--budget", type=int, default=64, help="image tokens kept")
    kernels.add_argument("--output", type=Path, help="JSON file to write, all kernels in it")
    families = commands.add_parser("families", help="export one full-size random model of each family and time its stages")
    families.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    families.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles, up to 55 GB")
    families.add_argument("--output", type=Path, required=True, help="JSON file to write")
    families.add_argument("--target", choices=("cpu", "cuda"), default="cuda")
    families.add_argument("--small", action="store_true", help="two layers and narrow, to try the command")
    families.add_argument("--runs", type=int, default=15, help="counted runs")
    sizes = commands.add_parser("sizes", help="export models whose images have a size, and time shares beside transformers")
    sizes.add_argument("--models", nargs="+", default=list(SIZED), choices=list(SIZED))
    sizes.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles, up to 30 GB")
    sizes.add_argument("--output", type=Path, required=True, help="JSON file to write")
    sizes.add_argument("--side", type=int, default=SizesOptions.side, help="pixels on each side of the picture")
    sizes.add_argument("--target", choices=("cpu", "cuda"), default="cuda")
    sizes.add_argument("--small", action="store_true", help="two layers and narrow, to try the command")
    sizes.add_argument("--runs", type=int, default=SizesOptions.runs, help="counted runs")
    host = commands.add_parser("host", help="resize a picture on the processor and on the device, turn by turn")
    host.add_argument("bundle", type=Path, help="for cuda")
    host.add_argument("--size", type=int, nargs=2, default=HostOptions.size, metavar=("WIDTH", "HEIGHT"))
    host.add_argument("--runs", type=int, default=HostOptions.runs, help="counted runs")
    host.add_argument("--device", choices=("cpu",), help="only for the processor's part, and to try the command")
    host.add_argument("--output", type=Path, help="JSON file to write")


def _beside(commands: Any) -> None:
    """Add the commands that compare, with other programs and within a run."""
    peers = commands.add_parser("peers", help="give the same questions to other programs and to ours, on the processor")
    peers.add_argument("--rows", nargs="+", default=[], help="names of rows; by default all")
    peers.add_argument(
        "--work", type=Path, default=Path("out/peers"), help="folder for environments and models, 15 GB; it is kept"
    )
    peers.add_argument("--output", type=Path, default=RESULTS / "peers-cpu.json", help="JSON file to write")
    peers.add_argument("--rounds", type=int, default=PeersOptions.rounds, help="processes of each row")
    peers.add_argument("--threads", type=int, default=PeersOptions.threads, help="of every peer")
    peers.add_argument("--launcher", default="", help="put before each process, such as 'taskset -c 0,1'")
    soak = commands.add_parser("soak", help="ask hundreds of questions in one session and see whether its memory grows")
    soak.add_argument("bundle", type=Path, help="for the processor")
    soak.add_argument("--providers", default=",".join(SoakOptions.providers), help="with commas between")
    soak.add_argument("--answers", type=int, default=SoakOptions.answers, help="answers that count")
    soak.add_argument("--warmup", type=int, default=SoakOptions.warmup, help="answers before, to fill the cache of pictures")
    soak.add_argument("--cache-mb", type=float, default=SoakOptions.cache_mb, help="its size")
    soak.add_argument("--output", type=Path, help="JSON file to write")
    serving = commands.add_parser("serving", help="time what a server adds to the first token, and ask it thousands of times")
    serving.add_argument("bundle", type=Path, help="for the processor")
    serving.add_argument("--requests", type=int, default=ServingOptions.requests, help="that count")
    serving.add_argument("--warmup", type=int, default=ServingOptions.warmup, help="requests before")
    serving.add_argument("--clients", type=int, default=ServingOptions.clients, help="at once")
    serving.add_argument("--rounds", type=int, default=ServingOptions.rounds, help="of the first token's part")
    serving.add_argument("--output", type=Path, help="JSON file to write")
    decode = commands.add_parser("decode", help="time a further token on a GPU beside llama.cpp's own bench")
    decode.add_argument("--fp16", type=Path, required=True, help="a bundle for cuda in fp16")
    decode.add_argument("--int4", type=Path, help="the same in int4")
    decode.add_argument("--llama", type=Path, required=True, help="folder of llama-bench and llama-quantize, built for the GPU")
    decode.add_argument("--gguf", type=Path, required=True, help="the decoder, as bench.beside.gguf_files writes it in f16")
    decode.add_argument("--output", type=Path, required=True, help="JSON file to write")
    decode.add_argument("--rounds", type=int, default=3, help="turns of everything")
    rows = commands.add_parser("rows", help="time answers at once beside one after another, as a server gives them")
    rows.add_argument("bundle", type=Path, help="for cpu or cuda")
    rows.add_argument("--rows", default=",".join(map(str, RowsOptions.rows)), help="answers at once, with commas between")
    rows.add_argument("--tokens", type=int, default=RowsOptions.tokens, help="of an answer")
    rows.add_argument("--budget", type=int, help="image tokens kept")
    rows.add_argument("--rounds", type=int, default=RowsOptions.rounds, help="turns of everything")
    rows.add_argument("--threads", type=int, help="processor threads")
    rows.add_argument("--kernels", action="store_true", help="list the GPU's kernels of a step")
    rows.add_argument("--output", type=Path, required=True, help="JSON file to write")
    load = commands.add_parser("load", help="ask a running `leanvlm serve` from several clients at once")
    load.add_argument("url", help="such as http://127.0.0.1:8000")
    load.add_argument("--clients", default=",".join(map(str, LoadOptions.clients)), help="at once, with commas between")
    load.add_argument("--requests", type=int, default=LoadOptions.requests, help="of each client")
    load.add_argument("--tokens", type=int, default=LoadOptions.tokens, help="of each answer")
    load.add_argument("--rounds", type=int, default=LoadOptions.rounds, help="turns of everything")
    load.add_argument("--output", type=Path, required=True, help="JSON file to write")
    vision = commands.add_parser("vision", help="compare the vision graphs of two bundles, fp32 and int8, on built-in scenes")
    vision.add_argument("bundles", nargs=2, type=Path, help="in fp32, and with --vision-precision int8")
    vision.add_argument("--scenes", type=int, default=VisionOptions.scenes, help="half simple, half complex")
    vision.add_argument("--threads", type=int, default=VisionOptions.threads)
    vision.add_argument("--evaluation", type=Path, help="what `leanvlm eval --json` wrote of both")
    vision.add_argument("--output", type=Path, required=True, help="JSON file to write")
    latency = commands.add_parser("latency", help="time every stage on a GPU beside transformers and PyTorch")
    latency.add_argument("--checkpoint", type=Path, required=True, help="what the bundles were exported from")
    latency.add_argument("--fp16", type=Path, required=True, help="its bundle for cuda in fp16")
    latency.add_argument("--int4", type=Path, help="its bundle for cuda in int4")
    latency.add_argument("--genai", type=Path, help="what genai-decoder wrote")
    latency.add_argument("--runs", type=int, default=30, help="counted runs")
    latency.add_argument("--no-static", action="store_true", help="leave transformers' compiled path out")
    latency.add_argument("--device", choices=("cpu",), help="only to try the command")
    latency.add_argument("--output", type=Path, required=True, help="JSON file to write")


def _run(args: argparse.Namespace) -> None:
    if args.command == "study":
        methods = tuple(args.pruners or default_methods())
        for model in args.models:
            asked = StudyOptions(args.scenes, args.captions, methods, parse_budgets(args.budgets), model)
            study(asked, asked.file)
    if args.command == "counting":
        measure_counting(CountingOptions(args.scenes, args.budget, tuple(args.pruners or default_methods())))
    if args.command == "prune":
        measure_prune(PruneOptions(args.device, args.budget, args.runs))
    if args.command == "checkpoint":
        print(make_checkpoint(args.output, SMALL if args.small else Sizes()))
    if args.command == "genai-decoder":
        from bench.genai import build

        print(build(args.checkpoint, args.output, "fp16", "cuda"))
    if args.command == "kernels":
        from bench.kernels import measure_kernels

        print(measure_kernels(args.bundle, args.budget, args.output))
    if args.command == "families":
        chosen = tuple(args.models)
        measure_families(FamiliesOptions(chosen, args.work, args.output, args.target, args.small, args.runs))
    if args.command == "sizes":
        models = tuple(args.models)
        measure_sizes(SizesOptions(models, args.work, args.output, args.side, args.target, args.small, args.runs))
    if args.command == "host":
        size = (args.size[0], args.size[1])
        print(json.dumps(measure_host(HostOptions(args.bundle, args.output, size, args.runs, device=args.device)), indent=1))
    if args.command == "peers":
        rows, launcher = tuple(args.rows), tuple(shlex.split(args.launcher))
        asked = PeersOptions(args.work, args.output, rows, args.rounds, threads=args.threads, launcher=launcher)
        print(measure_peers(asked))
    if args.command == "soak":
        providers = tuple(args.providers.split(","))
        soaked = SoakOptions(args.bundle, args.output, providers, args.answers, args.warmup, args.cache_mb)
        for name, one in measure_soak(soaked)["providers"].items():
            print(name, json.dumps({key: value for key, value in one.items() if key != "resident_bytes"}))
    if args.command == "serving":
        sizes = (args.requests, args.warmup, args.clients, args.rounds)
        print(json.dumps(served(measure_serving(ServingOptions(args.bundle, args.output, *sizes))), indent=1))
    if args.command == "decode":
        from bench.decode import DecodeOptions, measure_decode

        decoders = {name: path for name, path in (("fp16", args.fp16), ("int4", args.int4)) if path}
        done = measure_decode(DecodeOptions(decoders, args.llama, args.gguf, args.output, args.rounds))
        print(json.dumps(done["median_ms"], indent=1))
    if args.command == "rows":
        counts = tuple(map(int, args.rows.split(",")))
        several = RowsOptions(
            args.bundle, args.output, counts, args.tokens, args.budget, args.rounds, args.kernels, args.threads
        )
        for name, one in measure_rows(several)["rows"].items():
            print(name, json.dumps({key: value for key, value in one.items() if key != "kernels"}))
    if args.command == "load":
        counts = tuple(map(int, args.clients.split(",")))
        loaded = measure_load(LoadOptions(args.url, args.output, counts, args.requests, args.tokens, rounds=args.rounds))
        for name, one in loaded["clients"].items():
            print(name, json.dumps(one))
    if args.command == "vision":
        bundles = (args.bundles[0], args.bundles[1])
        measure_vision(VisionOptions(bundles, args.output, args.scenes, args.threads, args.evaluation))
    if args.command == "latency":
        bundles = {name: path for name, path in (("fp16", args.fp16), ("int4", args.int4)) if path}
        static, genai, device = not args.no_static, args.genai, args.device
        timed = LatencyOptions(args.checkpoint, bundles, args.output, args.runs, static=static, genai=genai, device=device)
        print(measure_latency(timed))
    if args.command in ("report", "study", "counting", "prune"):
        write_report()


if __name__ == "__main__":
    main()
