"""The commands `run`, `profile`, `inspect` and `doctor`: flags to one library call, and its result to the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leanvlm.runtime.console import parse_ids, stderr_console
from leanvlm.runtime.errors import InputError

Bundle = Annotated[Path, typer.Argument(help="Folder that `leanvlm export` wrote.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; the bundle's own by default. With OpenVINO one of its devices.")]
PROVIDERS = (
    "A cpu bundle: onnxruntime, openvino (best arithmetic) or openvino:f32. A TensorRT bundle, with ONNX Runtime: "
    "tensorrt or nv-tensorrt-rtx."
)
Provider = Annotated[str | None, typer.Option(help=PROVIDERS)]
Providers = Annotated[str | None, typer.Option(help=f"{PROVIDERS} Several, such as onnxruntime,openvino, take turns.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads.")]
Budget = Annotated[int | None, typer.Option(help="Image tokens kept per crop; one of the bundle's.")]


def run(
    bundle: Bundle,
    image: Annotated[list[Path] | None, typer.Option(help="Image file; may be given several times.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask; without it, a chat at the terminal.")] = None,
    raw_prompt: Annotated[
        bool, typer.Option("--raw-prompt", help="The prompt is the whole text, with the image token once for each image.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Where the answer is cut.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Share of probability to sample from.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Tokens to sample from; 0 is all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Share of the best token's probability to sample from.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over 1 discourages tokens that came before.")] = None,
    no_repeat_ngram_size: Annotated[int | None, typer.Option(help="Longest run of tokens that may come twice, plus 1.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="No end before so many tokens.")] = None,
    suppress_tokens: Annotated[str | None, typer.Option(help="Token ids that must not come, such as 5,6.")] = None,
    bad_words_ids: Annotated[
        list[str] | None, typer.Option(help="Token ids that must not come in this order, such as 5,6; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends the answer; may be repeated.")] = None,
    budget: Budget = None,
    device: Device = None,
    provider: Provider = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    overlay: Annotated[Path | None, typer.Option(help="Write a picture of the kept tokens (PNG).")] = None,
) -> None:
    """Answer a question about images, or chat.

    What is not given of top-p to bad-words-ids is as the checkpoint's generation_config.json says.
    """
    from leanvlm.runtime.commands.ask import Request, ask
    from leanvlm.runtime.commands.chat import chat

    request = Request(
        bundle, tuple(image or ()), prompt, raw_prompt, budget, device, provider, threads, overlay, as_json,
        {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop": stop or (),
            "top_p": top_p, "top_k": top_k, "min_p": min_p,
            "repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size,
            "min_new_tokens": min_new_tokens,
            "suppress_tokens": parse_ids("--suppress-tokens", suppress_tokens),
            "bad_words_ids": [parse_ids("--bad-words-ids", word) for word in bad_words_ids] if bad_words_ids else None,
        },
    )  # fmt: skip
    if prompt is None:
        for option, given in (("--json", as_json), ("--raw-prompt", raw_prompt), ("--overlay", overlay is not None)):
            if given:
                raise InputError(f"{option} needs --prompt")
        chat(request)
    else:
        ask(request)


def profile(
    bundle: Bundle,
    image: Annotated[Path | None, typer.Option(help="Image to measure with; a built-in pattern by default.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Describe the image.",
    runs: Annotated[int, typer.Option(min=1, help="Measured runs of each budget.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before, not counted.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated in each run.")] = 32,
    budget: Budget = None,
    device: Device = None,
    provider: Providers = None,
    threads: Threads = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with a chart.")] = None,
) -> None:
    """Time every stage, beside the unpruned model in the same run."""
    from leanvlm.runtime.commands.profile import ProfileConfig, measure
    from leanvlm.runtime.commands.profile_report import page, print_table
    from leanvlm.runtime.outputs import check_outputs, json_bytes, write_outputs

    check_outputs({"--json": json_file, "--html": html}, (bundle, *([image] if image else [])))
    config = ProfileConfig(bundle, image, prompt, runs, warmup, max_new_tokens, budget, device, provider, threads)
    console = stderr_console()
    with console.status("opening the bundle") as status:
        figures = measure(config, status.update)
    print_table(figures)
    reports = {json_file: json_bytes(figures), html: page(figures).encode()}
    write_outputs({path: content for path, content in reports.items() if path is not None})


def inspect(
    bundle: Bundle,
    image: Annotated[Path | None, typer.Option(help="Show what pruning does to this image.")] = None,
    overlay: Annotated[Path | None, typer.Option(help="Write the picture here (PNG).")] = None,
    budget: Budget = None,
    device: Device = None,
    provider: Provider = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its sha256.")] = False,
) -> None:
    """Show what a bundle holds, and what pruning does to an image."""
    from leanvlm.runtime.bundle import read_manifest, verify_files
    from leanvlm.runtime.commands.inspection import describe, inspect_image
    from leanvlm.runtime.outputs import check_outputs, check_picture

    if overlay is not None and image is None:
        raise InputError("--overlay needs --image")
    if budget is not None and image is None:
        raise InputError("--budget needs --image")
    check_picture("--overlay", overlay)
    check_outputs({"--overlay": overlay}, (bundle, *([image] if image else [])))
    manifest = read_manifest(bundle)
    absent = verify_files(bundle, manifest) if verify else ()
    # First what can be refused.
    pruning = None if image is None else inspect_image(bundle, image, budget, overlay, device, provider)
    print(describe(bundle, manifest))
    if verify:
        count = len(manifest.files) + len(manifest.engines) - len(absent)
        print(f"{'checksums':<9} {count} files are as they were written")
    if absent:
        print(f"{'missing':<9} {', '.join(absent)}: copy or build again what this machine needs")
    if pruning is not None:
        print(pruning)


def doctor() -> None:
    """Say what this machine can do, what is missing, and how to mend it."""
    from leanvlm.runtime.commands.doctor import report

    print(report())
