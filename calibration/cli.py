"""`leanvlm calibrate` and `leanvlm eval`: options to one library call. Imports what is heavy only when a command runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from leanvlm.runtime.console import help_without_command, stderr_console
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.optional import require
from leanvlm.runtime.outputs import check_outputs, check_picture, json_bytes, write_outputs

DEMO_SCENES = 200

calibrate = typer.Typer(help="Fit to a model what belongs to it.", add_completion=False, rich_markup_mode=None)

Scenes = Annotated[int | None, typer.Option(min=1, help="Built-in scenes to use; for --model demo and demo-small.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
Token = Annotated[str | None, typer.Option(help="Access token for the Hub.", envvar="HF_TOKEN")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")]


@calibrate.callback(invoke_without_command=True)
def _calibrate(context: typer.Context) -> None:
    """Fit to a model what belongs to it."""
    help_without_command(context)


@calibrate.command("gate")
def gate_command(
    model: Annotated[str, typer.Option(help="demo, llava, a Hub id or a folder with a checkpoint.")],
    images: Annotated[Path | None, typer.Option(help="Folder with images such as the model will see, 8 or more.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")] = Path("gate.json"),
    budget: Annotated[str, typer.Option(help="Budgets for which choices are compared, as `export` takes them.")] = "64,128,192",
    scenes: Scenes = None,
    revision: Revision = None,
    token: Token = None,
    offline: Offline = False,
) -> None:
    """Fit the pruning gate's references to a model's images; `export --gate-file` uses them."""
    from leanvlm.exporter.config import ExportConfig, parse_budgets

    config = ExportConfig(model=model, budgets=parse_budgets(budget), revision=revision, token=token, offline=offline)
    picture = output.with_suffix(".png")
    check_outputs({"--output": output, "its picture": picture}, (*_read_of(model), *_files_in(images)))
    if images is None and config.known is None:
        raise InputError("--images is missing; give a folder with at least 8 images such as the model will see")
    if images is not None and scenes is not None:
        raise InputError("--scenes and --images exclude each other")
    require("torch", "export", "calibrating")
    require("transformers", "export", "calibrating")
    from leanvlm.calibration.gate import Folder, TrainingScenes, draw_histogram, fit_gate, images_and_crops, measure
    from leanvlm.calibration.vision import VisionSide
    from leanvlm.exporter.checkpoint import load_model, open_checkpoint

    source = TrainingScenes(scenes or DEMO_SCENES) if images is None else Folder(images)
    checkpoint = open_checkpoint(config)
    budgets = config.resolved(checkpoint.spec.tokens_per_crop).counts
    with _progress(len(source)) as advance:
        side = VisionSide(checkpoint, load_model(checkpoint))
        found = measure(side, source, lambda count: advance("measure images", count))
        gate = fit_gate(side, source, found, budgets)
    if source.unreadable:
        stderr_console().print(f"not usable as images, {len(source.unreadable)} left out: {source.left_out}", markup=False)
    write_outputs({output: gate.to_bytes(), picture: draw_histogram(gate, found)})
    print(f"{'measured':<17} {images_and_crops(gate.images, len(found.exact))}")
    print(describe_gate(gate.figures, gate.erank_ref, gate.entropy_ref))
    print(output)


def _read_of(model: str | None) -> tuple[Path, ...]:
    """Return the folder that a model's files are read from, if it is one on this machine that the user may write to."""
    from leanvlm.demo.built_in import BUILT_IN

    return () if model is None or model in BUILT_IN or not Path(model).is_dir() else (Path(model),)


def _files_in(images: Path | None) -> tuple[Path, ...]:
    return () if images is None or not images.is_dir() else tuple(path for path in images.iterdir() if not path.is_dir())


def describe_gate(figures: Any, erank_ref: float, entropy_ref: float) -> str:
    """Return what was found as aligned lines."""
    rank, entropy, fit = figures["effective_rank"], figures["attention_entropy"], figures["estimator"]
    kept = ", ".join(f"{k}: {v['mean']:.2%} (worst {v['worst']:.2%})" for k, v in figures["kept_overlap"].items())
    rows = {
        "erank_ref": f"{erank_ref:.2f} (sd {rank['sd']:.2f}, {rank['least']:.2f} to {rank['most']:.2f})",
        "entropy_ref": f"{entropy_ref:.3f} nats (sd {entropy['sd']:.3f}, {entropy['least']:.3f} to {entropy['most']:.3f})",
        "estimated rank": f"R2 {fit['r2']:.4f}, error {fit['mean_error']:.2%} on average, {fit['worst_error']:.2%} at worst",
        "same tokens kept": kept or "not compared",
    }
    return "\n".join(f"{name:<17} {text}" for name, text in rows.items())


def eval_command(
    bundle: Annotated[list[Path] | None, typer.Argument(help="Folders that `leanvlm export` wrote.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of bundles: a checkpoint, run in torch with --pruner.")] = None,
    pruner: Annotated[list[str] | None, typer.Option(help="For --model: name, or name:field=value,…; may be repeated.")] = None,
    budget: Annotated[str | None, typer.Option(help="Image tokens kept, such as 64,128; a bundle's own by default.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Scenes of each kind.")] = 100,
    kinds: Annotated[
        str, typer.Option(help="Kinds of scenes: simple, medium, complex; each also with -photo.")
    ] = "simple,complex",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the counts as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a chart of accuracy over budget (PNG).")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Processor threads, for bundles.")] = None,
    provider: Annotated[str | None, typer.Option(help="What runs bundles for cpu: onnxruntime or openvino.")] = None,
) -> None:
    """Ask held-out questions about built-in scenes; count right answers and hallucinated objects."""
    check_picture("--plot", plot)
    check_outputs({"--json": json_file, "--plot": plot}, (*(bundle or ()), *_read_of(model)))
    if bool(bundle) == (model is not None):
        raise InputError("give bundles, or --model with --pruner")
    if bool(pruner) != (model is not None):
        raise InputError("--pruner goes with --model, and --model with --pruner; a bundle has its pruner inside")
    from leanvlm.runtime.manifest import parse_budgets

    budgets = None if budget is None else parse_budgets(budget)
    require("torch", "export", "drawing the scenes")
    from leanvlm.calibration.evaluate import Exam, parse_kinds
    from leanvlm.calibration.tables import plot_results, print_results

    exam = Exam(scenes, parse_kinds(kinds))
    if model is None:
        results = _run_bundles(bundle or [], budgets, exam, threads, provider)
    else:
        results = _run_model(model, pruner or [], budgets, exam)
    print_results(results)
    versions = {"leanvlm": version("leanvlm")}
    counts = {"schema": 1, "versions": versions, "scenes": scenes, "results": [result.to_dict() for result in results]}
    reports = {json_file: json_bytes(counts), plot: plot_results(results) if plot else b""}
    write_outputs({path: content for path, content in reports.items() if path is not None})


def _run_bundles(
    bundles: list[Path], budgets: tuple[int, ...] | None, exam: Any, threads: int | None, provider: str | None
) -> list[Any]:
    from leanvlm.calibration.evaluate import budgets_of, evaluate

    rounds = 1 + sum(len(budgets_of(path, budgets)) for path in bundles)
    with _progress(rounds * exam.scenes * len(exam.kinds)) as advance:
        return evaluate(bundles, exam, budgets, threads, advance, provider)


def _run_model(model: str, pruners: list[str], budgets: tuple[int, ...] | None, exam: Any) -> list[Any]:
    require("transformers", "export", "evaluating a checkpoint")
    from leanvlm.calibration.study import Examinee, pruners_of, run_study
    from leanvlm.exporter.checkpoint import load_model, open_checkpoint
    from leanvlm.exporter.config import ExportConfig

    checkpoint = open_checkpoint(ExportConfig(model=model))
    chosen = budgets or (64,)
    rounds = len(pruners_of(checkpoint, pruners, chosen))
    with _progress(rounds * exam.scenes * len(exam.kinds)) as advance:
        return run_study(Examinee(checkpoint, load_model(checkpoint)), exam, pruners, chosen, advance).results


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """Show a bar on standard error; yields what moves it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = stderr_console()
    # Without a terminal the bar would still leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("start", total=total)
        yield lambda text, count: progress.update(task, advance=count, description=text)
