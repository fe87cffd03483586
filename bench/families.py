"""`python -m bench families`: export a random model of each family at full size, verify it, time it beside itself unpruned."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from bench.shapes import SHAPES, make_shape
from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime.commands.profile import ProfileConfig, measure


@dataclass(frozen=True)
class FamiliesOptions:
    """What is measured.

    Attributes:
        names: Of `SHAPES`.
        work: Folder for checkpoints and bundles, each removed when it has been measured.
        output: JSON file to write, after every model.
        target: `cuda`, or `cpu` to try the command.
        small: Narrow models of two layers, to try the command.
        runs: Counted runs of each budget.
    """

    names: tuple[str, ...]
    work: Path
    output: Path
    target: str = "cuda"
    small: bool = False
    runs: int = 15


def measure_families(options: FamiliesOptions) -> Path:
    """Export, verify and profile each; a model that fails is recorded with its error, and the others go on."""
    record: dict[str, Any] = {
        "kind": "families",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "target": options.target,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "models": {},
    }
    measure_each(record, options.names, options.work, options.output, lambda name, folder: _measure(name, folder, options))
    return options.output


def measure_each(
    record: dict[str, Any], names: Sequence[str], work: Path, output: Path, measure: Callable[[str, Path], dict[str, Any]]
) -> None:
    """Measure models in turn, each in a folder that goes with it, and write the record after every one.

    Args:
        record: Gets what was measured under `models`, or a model's error.
        names: The models.
        work: Where the folders are.
        output: The JSON file.
        measure: Takes a name and the folder.
    """
    for name in names:
        folder = work / name
        try:
            record["models"][name] = measure(name, folder)
        except Exception as error:  # One model is not to lose what was measured of the others.
            record["models"][name] = {"error": f"{type(error).__name__}: {error}"}
        shutil.rmtree(folder, ignore_errors=True)
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(record["models"][name])[:300], flush=True)


def _measure(name: str, folder: Path, options: FamiliesOptions) -> dict[str, Any]:
    begin = perf_counter()
    checkpoint = make_shape(name, folder / "checkpoint", options.small)
    made, budget = perf_counter(), SHAPES[name].budget
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    config = ExportConfig(str(checkpoint), (budget,), folder / "bundle", target=options.target)  # type: ignore[arg-type]
    manifest = export(config)
    exported = perf_counter()
    # What the export held on the GPU is the profile's to use.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    shutil.rmtree(checkpoint)
    profile = measure(ProfileConfig(folder / "bundle", runs=options.runs, warmup=3, max_new_tokens=16))
    return {
        "family": manifest.family,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "seconds": {"checkpoint": round(made - begin, 1), "export and verify": round(exported - made, 1)},
        "verification": dict(manifest.verification),
        "profile": {**profile, "bundle": name},
    }
