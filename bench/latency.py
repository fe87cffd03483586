"""Every stage's milliseconds on a GPU, beside what others need, in one process: the raw samples that the report is made from.

Ours run as a user's would: two bundles that `leanvlm export` wrote of one checkpoint, opened with `leanvlm.runtime`. Budgets
and precisions take turns, so that a drift of the machine touches all alike. The time to the first token ends with its id on the
host. It begins with decoded pixels of the model's own size (`ttft_64`), so that the processor's resizing, which is bounded by
itself, does not hide the rest; with decoded pixels of 1280 x 960 (`…_pixels`); or with JPEG bytes of them (`…_jpeg`).
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.memory import bundle_memory
from bench.peers import Transformers, copy_bandwidth, matmul_rate, vision_graph
from bench.roofline import Shapes, floors
from leanvlm.runtime.answer import Timings
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import Session, load, user_message

ROOT = Path(__file__).parents[1]
TOOLS = ("onnxruntime", "onnxruntime_genai", "torch", "transformers", "PIL", "numpy")
TEXT_TOKENS = 40
WIDTH, HEIGHT = 1280, 960
STAGES = ("preprocess", "vision", "splice", "prefill", "sample")

Samples = dict[str, list[float]]


@dataclass(frozen=True)
class LatencyOptions:
    """What is measured.

    Attributes:
        checkpoint: The checkpoint that the bundles were exported from.
        bundles: Precision to bundle.
        output: The JSON file to write.
        runs: Counted runs.
        warmup: Runs before, not counted; the first ones capture the graphs.
        budget: The pruned budget that the bounds speak of.
        static: Measure transformers' compiled path too, which takes a minute.
        device: Where our bundles run; `cpu` only to try this program.
        genai: Folder of a decoder for onnxruntime-genai's own loop (`python -m bench genai-decoder`), or None.
    """

    checkpoint: Path
    bundles: Mapping[str, Path]
    output: Path
    runs: int = 30
    warmup: int = 5
    budget: int = 64
    static: bool = True
    genai: Path | None = None
    device: str | None = None


def measure_latency(options: LatencyOptions) -> Path:
    """Measure, write the JSON file and return its path."""
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    image = _image()
    pixels = np.asarray(image)
    sessions = {precision: load(bundle, device=options.device, cache_mb=0) for precision, bundle in options.bundles.items()}
    first = next(iter(sessions.values()))
    prompt = prompt_of(first, TEXT_TOKENS)
    small = image.resize(first.manifest.image.size[::-1], Image.Resampling.BICUBIC)
    samples: Samples = {}
    sources = {"": np.asarray(small), "_pixels": pixels, "_jpeg": _jpeg(image)}
    stages = _first_tokens(sessions, prompt, sources, options, samples)
    for precision, session in sessions.items():
        _decoder(session, precision, prompt, pixels, options, samples)
    _vision(first, pixels, options, samples)
    _preprocessing(first, _jpeg(image), options, samples)
    peer = Transformers(options.checkpoint)
    agreement = {
        precision: {str(budget): _agreement(session, peer, prompt, pixels, budget) for budget in session.manifest.budgets}
        for precision, session in sessions.items()
    }
    _peers(peer, {"": small, "_pixels": image}, prompt, options, samples)
    if options.genai is not None:
        from bench.genai import decode_times

        samples["genai_decode_fp16"] = decode_times(options.genai, options.runs, options.warmup)
    record = {
        **_conditions(options),
        "copy_bandwidth_bytes_per_s": bandwidth,
        "matmul_flop_per_s": rate,
        **_sizes(sessions, prompt, options),
        "image": {"width": WIDTH, "height": HEIGHT, "bytes": len(_jpeg(image))},
        "samples_ms": samples,
        "stages_ms": stages,
        "agreement": agreement,
    }
    for session in sessions.values():
        session.close()
    del peer
    record["floors_ms"] = floors(record)
    if options.device is None:
        memory = bundle_memory(options.bundles["fp16"], options.budget)
        record |= {f"peak_device_bytes_{options.budget}": memory.pop("device_bytes"), "memory": memory}
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return options.output


def prompt_of(session: Session, tokens: int) -> str:
    """Return a prompt whose text, template included, takes so many tokens beside one image."""
    words = ["What", "is", "in", "the", "image", "?"]
    while True:
        text = " ".join(words)
        found = len(session.prompt_ids([user_message(text, 1)], 1)) - 1
        if found >= tokens:
            assert found == tokens, f"no prompt of exactly {tokens} tokens was found"
            return text
        words.insert(0, "red")


def timed(run: Callable[[], Any]) -> float:
    """Return the wall time of a call that waits for the device, in ms."""
    begin = perf_counter()
    run()
    return 1e3 * (perf_counter() - begin)


def repeated(run: Callable[[], Any], options: LatencyOptions) -> list[float]:
    """Return the times of the counted runs, in ms."""
    for _ in range(options.warmup):
        run()
    return [timed(run) for _ in range(options.runs)]


def _first_tokens(
    sessions: Mapping[str, Session], prompt: str, sources: Mapping[str, Any], options: LatencyOptions, samples: Samples
) -> dict[str, Any]:
    """Answer with one token, precisions, budgets and sources in turn; return the stages' samples from JPEG bytes on."""
    stages: dict[str, Any] = {}
    for run in range(-options.warmup, options.runs):
        for precision, session in sessions.items():
            for budget in session.manifest.budgets:
                for suffix, image in sources.items():
                    times = session.generate(prompt, [image], budget=budget, max_new_tokens=1, ignore_end=True).timings
                    if run < 0:
                        continue
                    name = f"ttft_{budget}{suffix}" + ("" if precision == "fp16" else f"_{precision}")
                    samples.setdefault(name, []).append(times.time_to_first_token)
                    if suffix == "_jpeg":
                        _keep_stages(stages.setdefault(precision, {}).setdefault(str(budget), {}), times)
    return stages


def _keep_stages(kept: dict[str, list[float]], times: Timings) -> None:
    values = (times.preprocess, times.vision, times.splice, times.prefill, times.sample[0])
    for stage, value in zip(STAGES, values, strict=True):
        kept.setdefault(stage, []).append(value)


def _decoder(session: Session, precision: str, prompt: str, pixels: Any, options: LatencyOptions, samples: Samples) -> None:
    """Time prefill and decode step by themselves, and the step's captured graph alone."""
    features = session.encode_images([pixels], options.budget)
    plan = session.prompt(session.prompt_ids([user_message(prompt, 1)], 1), features)
    sequence = session.decoder().sequence(len(plan) + 2 * (options.runs + options.warmup) + 8)
    cache: Any = sequence.cache

    def read() -> Any:
        cache.load(plan)
        return timed(cache.prefill)

    times = [read() for _ in range(options.warmup + options.runs)]
    samples[f"prefill_{len(plan)}_{precision}"] = times[options.warmup :]
    sequence.load(plan)
    token, position = sequence.prefill().greedy(), plan.next_position
    steps = []
    for count in range(options.warmup + options.runs):
        begin = perf_counter()
        scores = sequence.step(session.table.rows([token])[0], position + count, token)
        sequence.ahead(session.table.row, position + count + 1, ())
        token = scores.greedy()
        steps.append(1e3 * (perf_counter() - begin))
    samples[f"decode_{precision}"] = steps[options.warmup :]
    samples[f"decode_{precision}_graph_only"] = repeated(cache.replay, options)
    sequence.close()


def _vision(session: Session, pixels: Any, options: LatencyOptions, samples: Samples) -> None:
    """Time the vision graphs by themselves, turn by turn."""
    levels = preprocess([pixels], session.manifest.image)
    graphs: dict[int, Any] = {budget: session.vision(budget) for budget in session.manifest.budgets}
    for graph in graphs.values():
        graph.run({"pixel_values": levels})
    for run in range(-options.warmup, options.runs):
        for budget, graph in graphs.items():
            time = timed(lambda graph=graph: graph.replay(1))  # type: ignore[misc]
            if run >= 0:
                samples.setdefault(f"vision_{budget}", []).append(time)


def _preprocessing(session: Session, jpeg: bytes, options: LatencyOptions, samples: Samples) -> None:
    """Time ours from JPEG bytes to levels, and Pillow's own decoding and resizing, turn by turn."""
    spec = session.manifest.image

    def pillow() -> None:
        picture = Image.open(BytesIO(jpeg)).convert("RGB")
        short = spec.resize if isinstance(spec.resize, int) else min(spec.resize or (336,))
        size = (short * picture.width // min(picture.size), short * picture.height // min(picture.size))
        picture.resize(size, Image.Resampling(spec.resample))

    for run in range(-options.warmup, options.runs):
        both = {"preprocess": timed(lambda: preprocess([jpeg], spec)), "pillow_decode_resize": timed(pillow)}
        for name, time in both.items():
            if run >= 0:
                samples.setdefault(name, []).append(time)


def _agreement(session: Session, peer: Transformers, prompt: str, pixels: Any, budget: int) -> dict[str, Any]:
    """Compare the first position's logits with transformers', which reads the same embeddings."""
    plan = session.prompt(session.prompt_ids([user_message(prompt, 1)], 1), session.encode_images([pixels], budget))
    sequence = session.decoder().sequence(len(plan))
    sequence.load(plan)
    ours, theirs = sequence.prefill().logits().astype(np.float64), peer.logits(plan.embeddings()).astype(np.float64)
    sequence.close()
    cosine = float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))
    return {"cosine": cosine, "same_first_token": bool(ours.argmax() == theirs.argmax())}


def _peers(
    peer: Transformers, images: Mapping[str, Image.Image], prompt: str, options: LatencyOptions, samples: Samples
) -> None:
    """Time transformers, unpruned, and PyTorch's kernels in a CUDA graph."""
    image = images[""]
    ready = peer.inputs(image, prompt)
    pixels = ready["pixel_values"]
    samples["torch_graph_vision"] = repeated(vision_graph(peer.model, pixels), options)
    for suffix, source in images.items():
        times = repeated(lambda source=source: peer.first_token(source, prompt), options)  # type: ignore[misc]
        samples[f"transformers_ttft_576{suffix}"] = times

    @torch.no_grad()
    def from_tensors() -> None:
        int(peer.model(**ready, logits_to_keep=1).logits[0, -1].argmax())

    def vision() -> None:
        peer.vision(pixels)
        peer.synchronize()

    samples["transformers_ttft_576_from_tensors"] = repeated(from_tensors, options)
    samples["transformers_vision"] = repeated(vision, options)
    samples["transformers_decode"] = list(peer.decode(image, prompt, options.runs + options.warmup))[options.warmup :]
    if options.static:
        samples["transformers_static_decode"] = peer.static_decode(image, prompt, 20)


def _sizes(sessions: Mapping[str, Session], prompt: str, options: LatencyOptions) -> dict[str, Any]:
    """Return what the roofline's arithmetic needs: bytes and shapes."""
    session = sessions["fp16"]
    manifest, decoder = session.manifest, session.manifest.decoder
    config = json.loads((options.checkpoint / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    files = {precision: {n: f.bytes for n, f in s.manifest.files.items()} for precision, s in sessions.items()}
    shapes = Shapes(
        layers=decoder.layers,
        hidden=decoder.hidden_size,
        vocab=decoder.vocab_size,
        image_tokens=manifest.tokens_per_crop,
        vision_tokens=manifest.tokens_per_crop + 1,
        prompt_tokens=len(session.prompt_ids([user_message(prompt, 1)], 1)) - 1 + options.budget,
        intermediate=text["intermediate_size"],
        # The tower is cut at the second to last hidden state.
        vision_blocks=vision["num_hidden_layers"] - 1,
        vision_width=vision["hidden_size"],
        vision_intermediate=vision["intermediate_size"],
    )
    return {
        "weights_bytes": files["fp16"]["vision.data"] + files["fp16"]["decoder.onnx.data"],
        "decoder_weights_bytes": {precision: sizes["decoder.onnx.data"] for precision, sizes in files.items()},
        "shapes": asdict(shapes),
    }


def _conditions(options: LatencyOptions) -> dict[str, Any]:
    names = ", ".join(f"--{precision} {bundle.name}" for precision, bundle in options.bundles.items())
    return {
        "kind": "latency",
        **machine(),
        "command": f"python -m bench latency --checkpoint {options.checkpoint.name} {names} --runs {options.runs}",
        "runs": options.runs,
        "warm_up": options.warmup,
    }


def machine() -> dict[str, Any]:
    """Return the conditions of a measurement that the command does not say: commit, date, GPU, model and versions."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return {
        "commit": done.stdout.strip() or None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "model": "LLaVA-1.5-7B's shapes, random weights",
        "versions": {"python": platform.python_version(), **{t: sys.modules[t].__version__ for t in TOOLS if t in sys.modules}},
    }


def _image() -> Image.Image:
    """Return a fixed picture of 1280 x 960: smooth colours with noise, which a JPEG file cannot shrink away."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.uniform(0, 255, (24, 32, 3)).astype(np.uint8))
    smooth = coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(np.float32) + rng.normal(0, 8, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def quantiles(values: Sequence[float]) -> str:
    """Return `median (10 % - 90 %)` for a line on the terminal."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{middle:.3f} ({low:.3f} - {high:.3f})"
