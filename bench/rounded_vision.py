"""`python -m bench vision`: vision graphs of two bundles of one checkpoint, in fp32 and in int8, turn by turn in one process.

For each built-in scene both graphs run, the order changing; their times, and how many of the kept tokens are the same. What
`leanvlm eval --json` counted of the two goes in beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.cells import table
from bench.study import conditions
from leanvlm.calibration.evaluate import Exam
from leanvlm.calibration.scores import Result
from leanvlm.demo.render import render
from leanvlm.runtime.answer import Timings
from leanvlm.runtime.session import load


@dataclass(frozen=True)
class VisionOptions:
    """What is compared.

    Attributes:
        bundles: In fp32, and in int8.
        output: JSON file to write.
        scenes: Built-in scenes, half of them simple and half complex; at least 2.
        threads: Processor threads.
        evaluation: What `leanvlm eval --json` wrote of both bundles, or None.
    """

    bundles: tuple[Path, Path]
    output: Path
    scenes: int = 200
    threads: int = 2
    evaluation: Path | None = None


def measure_vision(options: VisionOptions) -> None:
    """Measure at the default budget, and write the JSON file."""
    names = ("fp32", "int8")
    times: dict[str, list[float]] = {name: [] for name in names}
    same: list[float] = []
    ranks: list[float] = []
    sessions = {
        name: load(bundle, threads=options.threads, cache_mb=0) for name, bundle in zip(names, options.bundles, strict=True)
    }
    manifest = sessions["int8"].manifest
    exam = Exam(options.scenes // 2)
    pictures = [image for _, scenes in exam.batches(8) for image in render(scenes)]
    for at, image in enumerate([pictures[0], *pictures]):
        found = {}
        for name in names if at % 2 else names[::-1]:
            timings = Timings()
            (crop,) = sessions[name].encoder.encode([image], manifest.default_budget, timings)[0].crops
            found[name] = crop.pruning
            # The first picture is encoded once before it counts.
            times[name] += [timings.vision] if at else []
        if at:
            same.append(len(np.intersect1d(found["fp32"].indices, found["int8"].indices)) / found["fp32"].kept)
            ranks.append((found["int8"].effective_rank or 0.0) / (found["fp32"].effective_rank or 1.0) - 1)
    for session in sessions.values():
        session.close()
    record = {
        "kind": "rounded vision",
        "conditions": {**conditions(), "onnxruntime": version("onnxruntime")},
        "command": f"python -m bench vision {' '.join(bundle.name for bundle in options.bundles)} --scenes {options.scenes}",
        "source": manifest.source.id,
        "budget": manifest.default_budget,
        "of": manifest.tokens_per_crop,
        "threads": options.threads,
        "scenes": len(same),
        "kept_same": {"mean": float(np.mean(same)), "least": min(same)},
        "rank_off": float(np.abs(ranks).max()),
        "right": _right(options),
        "samples_ms": times,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _right(options: VisionOptions) -> dict[str, list[int]]:
    """Return right answers and questions, by precision."""
    if options.evaluation is None:
        return {}
    results = [Result.from_dict(row) for row in json.loads(options.evaluation.read_text(encoding="utf-8"))["results"]]
    counted = {}
    for name, bundle in zip(("fp32", "int8"), options.bundles, strict=True):
        scores = [result.scores for result in results if result.source == bundle.resolve().name]
        counted[name] = [sum(sum(s.right) for s in scores), sum(sum(s.asked) for s in scores)]
    return counted


def rounded_vision_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions, medians, and what is kept."""
    medians = {name: float(np.median(values)) for name, values in data["samples_ms"].items()}
    ratio = medians["fp32"] / medians["int8"]
    rows = [
        [name, f"{median:.1f}", f"{np.percentile(data['samples_ms'][name], 90):.1f}", _counted(data["right"].get(name))]
        for name, median in medians.items()
    ]
    run = data["conditions"]
    return "\n".join(
        [
            f"## Vision graphs in int8: {data['source']}\n",
            f"`export --vision-precision int8` beside fp32, {data['budget']} of {data['of']} tokens kept, "
            f"{data['scenes']} built-in scenes, turn by turn in one process ([{path.name}](results/{path.name}), "
            f"{run['date']}; {run['machine']}, {data['threads']} threads; ONNX Runtime {run['onnxruntime']}, "
            f"commit `{run['commit']}`; `{data['command']}`).\n",
            table(("vision graph, ms", "median", "p90", "right answers"), rows),
            f"int8 is {ratio:.2f} times as fast. Of the kept tokens {data['kept_same']['mean']:.1%} are fp32's (the worst "
            f"scene {data['kept_same']['least']:.0%}); the effective rank is within {data['rank_off']:.1%}. "
            f"{_verdict(ratio, data['kept_same']['mean'])}\n",
        ]
    )


def _counted(right: list[int] | None) -> str:
    return "not asked" if right is None else f"{right[0]} of {right[1]}"


# What an option that is the default would have to reach: times as fast, and the share of the kept tokens.
FASTER, SAME = 1.6, 0.95


def _verdict(ratio: float, same: float) -> str:
    missed = [f"{FASTER} times as fast"] if ratio < FASTER else []
    missed += [f"{SAME:.0%} of the kept tokens"] if same < SAME else []
    return f"The bound of {' and of '.join(missed)} is missed, so it is not the default." if missed else "Both bounds hold."
