"""`leanvlm batch`: options to one library call, and its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from leanvlm.runtime.commands.cli import Budget, Device, Provider, Threads
from leanvlm.runtime.console import stderr_console

if TYPE_CHECKING:
    from leanvlm.runtime.batch.run import Progress, Summary


def batch_command(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Folder of images, or a .jsonl or .parquet file.")],
    bundle: Annotated[Path, typer.Option(help="Folder that `leanvlm export` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Parquet file to write.")],
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    prompt: Annotated[str | None, typer.Option(help="What to ask of rows that have no prompt of their own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Share of probability to sample from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable; each row begins with it.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends an answer; may be repeated.")] = None,
    budget: Budget = None,
    device: Device = None,
    provider: Provider = None,
    threads: Threads = None,
    workers: Annotated[int, typer.Option(min=1, help="Sessions at once, each with its own copy of the weights.")] = 1,
    rows: Annotated[int, typer.Option(min=1, help="Answers at once in each session, a token of each in one run.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="With ray: GPUs of each worker, such as 1 or 0.5.")] = 0.0,
    part_rows: Annotated[int, typer.Option(min=1, help="Rows that are written at once; a kill costs so many at most.")] = 64,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that a batch wrote.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what a run that was stopped has finished.")] = False,
) -> None:
    """Answer every row of a folder, a JSONL or a parquet file; the same command goes on where it was stopped."""
    from leanvlm.runtime.batch.run import BatchConfig, run_batch
    from leanvlm.runtime.outputs import check_place

    check_place("--output", output, (bundle, source))
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": tuple(stop or ()),
    }
    config = BatchConfig(
        source, bundle, output, engine=engine, prompt=prompt, budget=budget, device=device, provider=provider, threads=threads,
        workers=workers, rows=rows, gpus=gpus, part_rows=part_rows, force=force, restart=restart, options=options,
    )  # fmt: skip
    with _progress() as progress:
        summary = run_batch(config, progress)
    stderr_console().print(_said(summary), markup=False)
    print(output)


def _said(summary: Summary) -> str:
    """Return a run as one line."""
    new = summary.rows - summary.found
    found = f", {summary.found} of them from before" if summary.found else ""
    return f"{summary.rows} rows{found}; {summary.errors} errors; {summary.seconds:.1f} s, {new / summary.seconds:.2f} rows/s"


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show rows done, rows a second, errors and the time left on standard error, where that is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]:.2f} rows/s, {task.fields[errors]} errors, left:"),
        TimeRemainingColumn(),
    )
    console = stderr_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rows", total=None, speed=0.0, errors=0)

        def show(rows: int, done: int, errors: int) -> None:
            bar.update(task, total=rows, completed=done, errors=errors, speed=bar.tasks[0].speed or 0.0)

        yield show
