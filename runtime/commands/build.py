"""`leanvlm build`: options to a plan, the builder's progress on the terminal, and what was built as a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanvlm.runtime.console import stderr_console

if TYPE_CHECKING:
    from rich.console import Console

    from leanvlm.runtime.engines.build import Builder
    from leanvlm.runtime.engines.jobs import BuildPlan, EngineJob
    from leanvlm.runtime.manifest import Manifest


def build_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that `leanvlm export` wrote for a TensorRT target.")],
    engine: Annotated[str, typer.Option(help="tensorrt-rtx, on any machine; tensorrt, on the device itself.")],
    sm: Annotated[str | None, typer.Option(help="GPUs to build for, such as 86,89; this machine's by default.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Image tokens kept, such as 64,576; all of the bundle's by default.")
    ] = None,
    max_images: Annotated[int, typer.Option(help="Most crops at once; an image that is not cut is one.")] = 4,
    max_prompt: Annotated[int, typer.Option(help="Most positions of a prompt.")] = 1024,
    max_positions: Annotated[int, typer.Option(help="Most positions of prompt and answer.")] = 2048,
    workspace: Annotated[int | None, typer.Option(help="Most memory of one layer, in MB.")] = None,
    hardware: Annotated[
        str, typer.Option("--hardware-compatibility", help="none, ampere+ or same: other GPUs that may run it.")
    ] = "none",
    version_compatible: Annotated[bool, typer.Option("--version-compatible", help="Let later versions run it.")] = False,
    single_profile: Annotated[
        bool, typer.Option("--single-profile", help="One profile for prompts and tokens: half the decoder's engine.")
    ] = False,
    timing_cache: Annotated[Path | None, typer.Option(help="File of timings; the bundle's own by default.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and what it needs.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Build with less memory free than estimated.")] = False,
) -> None:
    """Build a bundle's TensorRT engines."""
    from leanvlm.runtime.bundle import read_manifest
    from leanvlm.runtime.engines.build import Builder
    from leanvlm.runtime.engines.jobs import BuildConfig, command_line, parse_sms, plan_build
    from leanvlm.runtime.engines.library import library
    from leanvlm.runtime.engines.profiles import Limits
    from leanvlm.runtime.manifest import parse_budgets

    library(engine)
    config = BuildConfig(
        bundle,
        engine,
        parse_sms(sm),
        () if budget is None else parse_budgets(budget),
        Limits(max_images, max_prompt, max_positions),
        workspace,
        hardware,
        version_compatible,
        single_profile,
        timing_cache,
        force,
    )
    manifest = read_manifest(bundle)
    builder = Builder.of(config)
    plan = plan_build(config, manifest, builder.module)
    # What a dry run says is its result.
    console = _stdout() if dry_run else stderr_console()
    console.print(_needs(plan, dry_run), markup=False)
    # The decoder's lines name every cache of every profile, so they come only when asked for.
    for job in plan.jobs if dry_run else [job for job in plan.jobs if job.budget is not None]:
        console.print(f"  {command_line(job, config)}", markup=False)
    if dry_run:
        return
    done = _build(plan, builder, console)
    _print_table(plan, done)


def _needs(plan: BuildPlan, dry_run: bool) -> str:
    count, sms = len(plan.jobs), ", ".join(map(str, dict.fromkeys(job.sm for job in plan.jobs)))
    memory, disk = plan.memory / 1e9, plan.disk / 1e9
    title = plan.config.library.title
    return (
        f"{count} {title} engines for sm {sms}: about {memory:.1f} GB of memory at once and {disk:.2f} GB on the disk; "
        f"the same by hand, in the bundle's folder{'' if dry_run else ' (the decoder lines: --dry-run)'}:"
    )


def _build(plan: BuildPlan, builder: Builder, console: Console) -> Manifest:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from leanvlm.runtime.engines.build import build_engines

    columns = (TextColumn("{task.description:<44}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("parse", total=1.0)

        def show(job: EngineJob, phase: str, share: float) -> None:
            progress.update(bar, description=f"{job.file}: {phase}"[:44], completed=share)

        return build_engines(plan, builder, show)


def _print_table(plan: BuildPlan, manifest: Manifest) -> None:
    from rich.table import Table

    built = {str(job.file) for job in plan.jobs}
    table = Table(title=f"{plan.config.bundle}: engines built")
    for heading in ("engine", "budget", "MB", "s"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for spec in manifest.engines:
        if spec.file in built:
            budget = "" if spec.budget is None else str(spec.budget)
            table.add_row(spec.file, budget, f"{spec.bytes / 1e6:.1f}", f"{spec.seconds:.1f}")
    _stdout().print(table)


def _stdout() -> Console:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, soft_wrap=True)
