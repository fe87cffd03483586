"""Where a GPU's time goes, kernel by kernel: PyTorch's profiler counts every kernel of the process, ONNX Runtime's too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.latency import TEXT_TOKENS, machine, prompt_of
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import load, user_message

REPLAYS, SHOWN = 5, 16


# Kernel to microseconds and launches of one run.
Kernels = dict[str, dict[str, float]]


def measure_kernels(bundle: Path, budget: int, output: Path | None) -> str:
    """Write a bundle's kernels to a JSON file, if one is named, and return its tables in Markdown."""
    stages = stage_kernels(bundle, budget)
    if output is not None:
        command = f"python -m bench kernels {bundle.name} --budget {budget}"
        record = {"kind": "kernels", **machine(), "command": command, "runs": REPLAYS, "kernels": stages}
        output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return tables(stages)


def stage_kernels(bundle: Path, budget: int) -> dict[str, Kernels]:
    """Return the kernels of vision graph, prefill and decode step of a bundle, those that take longest first."""
    image = np.random.default_rng(0).integers(0, 256, (960, 1280, 3)).astype(np.uint8)
    with load(bundle, cache_mb=0) as session:
        features = session.encode_images([image], budget)
        plan = session.prompt(session.prompt_ids([user_message(prompt_of(session, TEXT_TOKENS), 1)], 1), features)
        graph: Any = session.vision(budget)
        sequence = session.decoder().sequence(256)
        cache: Any = sequence.cache
        cache.load(plan)
        token = cache.prefill().greedy()
        cache.step(session.table.rows([token])[0], plan.next_position)
        phases: dict[str, Callable[[], Any]] = {
            f"vision_{budget}": lambda: graph.replay(1),
            # `replay` runs the last run's graph again, so the step comes before the prompt.
            "decode": cache.replay,
            f"prefill_{len(plan)}": cache.prefill,
        }
        graph.run({"pixel_values": preprocess([image], session.manifest.image)})
        return {name: kernels_of(run) for name, run in phases.items()}


def kernels_of(run: Callable[[], Any]) -> Kernels:
    """Return the kernels of a run, those that take longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            run()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in profiler.events():
        if str(event.device_type).endswith("CUDA"):
            spent[event.name] += event.device_time_total / REPLAYS
            launches[event.name] += 1
    return {kernel: {"us": round(time, 2), "launches": launches[kernel] / REPLAYS} for kernel, time in spent.most_common()}


def tables(stages: Mapping[str, Kernels]) -> str:
    """Return the longest kernels of each stage in Markdown."""
    parts = []
    for name, kernels in stages.items():
        total, count = (sum(kernel[key] for kernel in kernels.values()) for key in ("us", "launches"))
        rows = [
            f"| {kernel['us']:.1f} | {kernel['launches']:.0f} | `{title.replace('|', ' ')[:96]}` |"
            for title, kernel in list(kernels.items())[:SHOWN]
        ]
        head = f"{name}: {total:.0f} us in {count:.0f} kernels\n\n| us | launches | kernel |\n|--:|--:|---|"
        parts += [head, *rows, ""]
    return "\n".join(parts)
