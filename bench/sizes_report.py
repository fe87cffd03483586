"""The chapter of RESULTS.md on models whose images have a size, at shares of their tokens, beside transformers."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from bench.cells import table
from bench.families_report import verified

STAGES = ("preprocess", "vision", "project", "prune", "splice", "prefill")


def sizes_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions, stages, and what the exports' own comparison measured."""
    models = {name: model for name, model in data["models"].items() if "samples_ms" in model}
    first = next(iter(models.values()))
    names = ("torch", "transformers", "onnxruntime")
    versions = ", ".join(f"{name} {(first['versions'] | first['runtime'])[name]}" for name in names)
    return "\n".join(
        [
            "## Images with a size: shares of the tokens beside transformers\n",
            f"Random checkpoints of the published shapes in fp16, exported for {data['target']} and verified there "
            f"([{path.name}](results/{path.name}), {data['date']}; {data['device']}; medians of {data['runs']} runs after "
            f"{data['warmup']}, all in turn in one process; {versions}). Transformers computes eagerly, with SDPA, in fp16, "
            "and reads all tokens; its `vision` holds the projector, its `prefill` is the rest of the first token. The "
            "picture is JPEG bytes of the exported shape. `python -m bench sizes` repeats it. Times in ms.\n",
            _stages(models),
            verified(models, "tokens"),
        ]
    )


def _stages(models: dict[str, Any]) -> str:
    rows = []
    for name, model in models.items():
        for who, samples in model["samples_ms"].items():
            times = {stage: median(values) for stage, values in samples.items()}
            shares = model["shares"].get(who, {})
            times |= {stage: share * times["vision graph"] for stage, share in shares.items()}
            kept = model["tokens"] if who == "transformers" else int(who)
            whose = "transformers" if who == "transformers" else "LeanVLM"
            cells = [f"{times[stage]:.1f}" if stage in times else "" for stage in STAGES]
            size = " x ".join(map(str, model["pixels"]))
            rows.append([f"{name}, {size}", whose, f"{kept} of {model['tokens']}", *cells, f"{times['first token']:.1f}"])
    return table(("model, pixels", "", "tokens", *STAGES, "first token"), rows)
