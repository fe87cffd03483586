"""The study: every pruner at every budget on a built-in model's held-out scenes, simple and complex apart.

Each model has a file of its own, so that models of other training seeds can be compared with the shipped one.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from leanvlm.runtime.console import stderr_console

if TYPE_CHECKING:
    from leanvlm.calibration.study import Examinee
    from leanvlm.exporter.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
STUDY = RESULTS / "study-demo.json"
# Scenes by which the gate's reference of a model that is not built in is set.
REFERENCE_SCENES = 200

SCENES, CAPTIONS, BUDGETS = 150, 50, (192, 128, 64, 32)
# Beside the registry's defaults: the gate taken from the paper's method, and given to the fixed mixture.
VARIANTS = ("agile:gate=none", "hybrid:gate=erank")
TOOLS = ("leanvlm", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class StudyOptions:
    """What is compared.

    Attributes:
        scenes: Scenes of each kind, those of the seeds from 0.
        captions: For how many of them a caption is generated.
        methods: Pruners as spec strings.
        budgets: Image tokens kept.
        model: A built-in model, or a folder that training wrote.
    """

    scenes: int
    captions: int
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    model: str = "demo"

    @property
    def command(self) -> str:
        """The command line that asks for it."""
        budgets = ",".join(map(str, self.budgets))
        pruners = " ".join(self.methods)
        counts = f"--scenes {self.scenes} --captions {self.captions} --budgets {budgets}"
        return f"python -m bench study --models {Path(self.model).name} {counts} --pruners {pruners}"

    @property
    def file(self) -> Path:
        """Where its counts belong."""
        return RESULTS / f"study-{Path(self.model).resolve().name}.json"


def default_methods() -> tuple[str, ...]:
    """Return every registered pruner, and the variants."""
    from leanvlm.exporter.pruners import PRUNERS

    return (*sorted(name for name in PRUNERS if name != "none"), *VARIANTS)


def study(options: StudyOptions, path: Path) -> None:
    """Run the study and write its counts as JSON.

    Args:
        options: What is compared.
        path: The file to write.
    """
    from leanvlm.calibration.evaluate import Exam
    from leanvlm.calibration.study import pruners_of, run_study
    from leanvlm.demo.scenes import PHOTO_KINDS

    # Before the run: the checkout may move on meanwhile.
    found_under, start = conditions(), perf_counter()
    examinee = open_examinee(options.model)
    checkpoint = examinee.side.checkpoint
    exam = Exam(options.scenes, ("simple", "complex"), options.captions)
    rounds = len(pruners_of(checkpoint, options.methods, options.budgets))
    columns = (TextColumn("{task.description:<16}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = stderr_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("start", total=rounds * exam.scenes * len(exam.kinds))
        found = run_study(
            examinee,
            exam,
            options.methods,
            options.budgets,
            lambda text, count: progress.update(task, advance=count, description=text),
        )
    # On photographed ground only what the gates look at is compared.
    kinds = tuple(kind for kind in PHOTO_KINDS if kind.partition("-")[0] in exam.kinds)
    photographed = run_study(examinee, Exam(options.scenes, kinds, 0), (), ())
    complexity = found.complexity | photographed.complexity
    data = {
        "schema": 1,
        "kind": "study",
        "model": described(checkpoint),
        "conditions": {**found_under, "command": options.command, "seconds": round(perf_counter() - start)},
        "complexity": {kind: _rounded(values) for kind, values in complexity.items()},
    }
    write_lines(path, data, [result.to_dict() for result in found.results])


def open_examinee(model: str) -> Examinee:
    """Load a built-in model, or one that training wrote with a reference of its own for the gate."""
    from leanvlm.calibration.gate import TrainingScenes, measure
    from leanvlm.calibration.study import Examinee
    from leanvlm.exporter.checkpoint import load_model, open_checkpoint
    from leanvlm.exporter.config import ExportConfig

    config = ExportConfig(model)
    checkpoint = open_checkpoint(config)
    examinee = Examinee(checkpoint, load_model(checkpoint))
    if config.known is not None:
        return examinee
    ranks = measure(examinee.side, TrainingScenes(REFERENCE_SCENES), lambda count: None).exact
    return Examinee(replace(checkpoint, erank_ref=float(ranks.mean())), load_model(checkpoint))


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what names a model in results, with the seed and the steps of its training where its folder says them."""
    model = {"id": checkpoint.name, "sha256": checkpoint.source().sha256, "erank_ref": round(checkpoint.erank_ref, 2)}
    record = checkpoint.folder / "training.json"
    if not record.is_file():
        return model
    run = json.loads(record.read_text("utf-8"))
    recipe = run["recipe"]
    return model | {"size": recipe["size"], "seed": recipe["seed"], "steps": [run["steps"], recipe["steps"]]}


def _rounded(quantities: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 3) for value in values] for name, values in quantities.items()}


def write_lines(path: Path, head: Mapping[str, Any], results: list[dict[str, Any]]) -> None:
    """Write JSON with one line for each entry of `head` and of `results`, so that a change shows where it is."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = ",\n".join(f"  {json.dumps(result)}" for result in results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join([*lines, f' "results": [\n{rows}\n ]']) + "\n}\n", encoding="utf-8")


def conditions() -> dict[str, Any]:
    """Return what a measurement was taken under: commit, date, machine and versions."""
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {tool: version(tool) for tool in TOOLS},
    }


def _commit() -> str:
    """Return the checkout's commit, marked where the code was changed since."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "calibration", "demo", "exporter", "runtime", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
