"""`leanvlm export`: options to ExportConfig, progress on the terminal. Imports what is heavy only when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leanvlm.runtime.console import stderr_console
from leanvlm.runtime.optional import require

if TYPE_CHECKING:
    from leanvlm.exporter.config import ExportConfig
    from leanvlm.exporter.plan import Plan


def export_command(
    model: Annotated[str, typer.Option(help="demo, llava, a Hub id or a folder with a checkpoint.")],
    budget: Annotated[
        str, typer.Option(help="Image tokens kept per crop, such as 64 or 64,128; or a share: 25%, 320/2880")
    ] = "64",
    image_size: Annotated[str | None, typer.Option(help="Heights x widths that images may have: 448x448,448x616.")] = None,
    pruner: Annotated[str, typer.Option(help="Name, or name:field=value,…")] = "agile",
    gate_file: Annotated[Path | None, typer.Option(help="What `calibrate gate` wrote for this model.")] = None,
    template: Annotated[str | None, typer.Option(help="File with a chat template (jinja); none exports without.")] = None,
    target: Annotated[str, typer.Option(help="cpu, cuda, tensorrt-rtx or tensorrt.")] = "cpu",
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, int8 or int4; the target's by default.")] = None,
    vision_precision: Annotated[
        str | None, typer.Option(help="Of tower and projector, for cpu: fp32 (default) or int8.")
    ] = None,
    positions: Annotated[str | None, typer.Option(help="compact or original: how kept tokens are numbered.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and how big.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    token: Annotated[str | None, typer.Option(help="Access token for the Hub.", envvar="HF_TOKEN")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")] = False,
) -> None:
    """Export a model with its pruning inside the graph."""
    from leanvlm.exporter.config import ExportConfig, parse_budgets, parse_image_sizes

    config = ExportConfig(
        model=model,
        budgets=parse_budgets(budget),
        output=output,
        pruner=pruner,
        target=target,  # type: ignore[arg-type]  # ExportConfig checks it.
        precision=precision,
        vision_precision=vision_precision,
        positions=positions,  # type: ignore[arg-type]  # As above.
        force=force,
        revision=revision,
        token=token,
        offline=offline,
        gate_file=gate_file,
        template=template,
        image_sizes=parse_image_sizes(image_size),
    )
    run_export(config, dry_run=dry_run)


def run_export(config: ExportConfig, *, dry_run: bool) -> None:
    """Export with a progress bar on standard error; the last line on standard output is the bundle's folder."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from leanvlm.exporter.output import check_output

    check_output(config)
    require("torch", "export")
    require("transformers", "export")
    from leanvlm.exporter.pipeline import export_plan
    from leanvlm.exporter.plan import fetch, plan

    _quiet_libraries()
    request = plan(config)
    for line in _said(config, request):
        stderr_console().print(line, markup=False)
    if dry_run:
        print(_describe(request))
        return
    # The Hub's client shows bars of its own.
    request = fetch(request)
    columns = (TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = stderr_console()
    # Without a terminal the bar would still leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("start", total=request.steps)
        manifest = export_plan(request, lambda step: progress.update(task, advance=1, description=step))
    chain = manifest.verification["tokens"]
    checks = ", ".join(f"{b}: {c['equal']}/{c['compared']}" for b, c in chain.items())
    console.print(f"verified against the checkpoint (greedy tokens equal at budget {checks})")
    if costs := [f"{b}: {c['unrounded']['cosine']:.3f}" for b, c in chain.items() if "unrounded" in c]:
        console.print(f"quantised alike; quantisation leaves a cosine of the first logits at budget {', '.join(costs)}")
    for budget, cost in manifest.verification.get("rounded", {}).items():
        same, off = cost["kept_overlap"], cost["features"]
        console.print(
            f"vision in int8 at budget {budget}: features off by {off:.1%} of their range, {same:.0%} of kept tokens the same"
        )
    print(request.config.named_output)


def _said(config: ExportConfig, request: Plan) -> Iterator[str]:
    """Yield what is to be known before an export: the shapes of images, and what shares of their tokens come to."""
    shapes = request.checkpoint.frame.crops.shapes
    if request.checkpoint.frame.crops.kind == "nearest":
        yield f"images go to the nearest of {', '.join(shape.text for shape in shapes)} pixels (height x width; --image-size)"
    for share, budget in zip(config.budgets, request.config.counts, strict=True):
        if share == budget:
            continue
        if len(shapes) == 1:
            yield f"--budget {share} keeps {budget} of the {shapes[0].tokens} image tokens of each crop"
            continue
        kept = [f"{graph.kept} of {shapes[graph.shape].tokens}" for graph in request.vision if graph.budget == budget]
        yield f"--budget {share} keeps {', '.join(kept)} image tokens"


def _describe(request: Any) -> str:
    lines = [f"{request.checkpoint.name} ({request.checkpoint.family.model_type}) to {request.config.named_output}:"]
    lines += [f"  {name:<26} about {_size(size)}" for name, size in request.sizes.items()]
    lines.append(f"  {'together':<26} about {_size(request.total_bytes)}, and tokenizer and processor files")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _quiet_libraries() -> None:
    """Keep transformers' bars and notes out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
