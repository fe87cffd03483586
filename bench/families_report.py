"""The chapter of RESULTS.md on full-size models of all families, pruned beside themselves unpruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import table

STAGES = ("preprocess", "vision", "project", "prune", "splice", "prefill", "decode")


def families_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions, stages, and what the exports' own comparison measured."""
    models = {name: model for name, model in data["models"].items() if "profile" in model}
    first = next(iter(models.values()))["profile"]
    versions = {**data["versions"], **first["versions"]}
    return "\n".join(
        [
            "## Families: full-size models, pruned and unpruned\n",
            f"Random checkpoints of the published shapes in fp16, exported for {data['target']} and compared with transformers "
            f"in the export ([{path.name}](results/{path.name}), {data['date']}; {first['device']}; medians of {first['runs']} "
            f"runs after {first['warmup']}, both budgets turn by turn in one run; a picture of 640 x 480 as JPEG bytes; "
            f"{', '.join(f'{name} {number}' for name, number in versions.items())}). `python -m bench families` repeats it.\n",
            "Times in ms; a token of the answer is `decode`. With many crops most of the time to the first token is the "
            "processor's resizing and the tower, which pruning behind the tower does not shorten.\n",
            _stages(models),
            verified(models, "per crop"),
        ]
    )


def _stages(models: dict[str, Any]) -> str:
    heads = ("model", "kept of", "crops", *STAGES, "first token", "GPU, GB")
    rows = []
    for name, model in models.items():
        for figures in model["profile"]["budgets"].values():
            tokens, stages = figures["image_tokens"], figures["stages_ms"]
            times = [f"{stages[stage]['p50']:.1f}" if stage in stages else "" for stage in STAGES]
            memory = figures["peak_device_bytes"]
            rows.append(
                [name, f"{tokens['kept']} of {tokens['total']}", str(figures["crops"]), *times,
                 f"{figures['time_to_first_token_ms']:.1f}", "" if memory is None else f"{memory / 1e9:.1f}"]
            )  # fmt: skip
    return table(heads, rows)


def verified(models: dict[str, Any], unit: str) -> str:
    """Return the table of what the exports' own comparisons measured; `unit` says what a budget counts."""
    heads = ("model", unit, "features differ by", "kept tokens the same", "first logits differ by", "greedy tokens equal")
    rows = []
    for name, model in models.items():
        record = model["verification"]
        for budget, vision in record["vision"].items():
            chain = record["tokens"][budget]
            rows.append(
                [name, budget, f"{vision['features']:.1e}", f"{vision['kept_overlap']:.1%}", f"{chain['logits']:.1e}",
                 f"{chain['equal']} of {chain['compared']}"]
            )  # fmt: skip
    return table(heads, rows)
