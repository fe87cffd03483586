"""Where a GPU's time goes, kernel by kernel: PyTorch's profiler counts every kernel of the process, ONNX Runtime's too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.latency import TEXT_TOKENS, prompt_of
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import load, user_message

REPLAYS, SHOWN = 5, 16


def kernel_tables(bundle: Path, budget: int) -> str:
    """Return tables of the kernels of vision graph, prefill and decode step of a bundle, in Markdown."""
    image = np.random.default_rng(0).integers(0, 256, (960, 1280, 3)).astype(np.uint8)
    with load(bundle) as session:
        features = session.encode_images([image], budget)
        plan = session.splice(session.prompt_ids([user_message(prompt_of(session, TEXT_TOKENS), 1)], 1), features)
        graph: Any = session.vision(budget)
        decoder: Any = session.decoder()
        decoder.start(256)
        decoder.load(plan)
        token = decoder.prefill().greedy()
        decoder.step(session.table.rows([token])[0], plan.next_position)
        phases: dict[str, Callable[[], Any]] = {
            f"vision_{budget}": lambda: graph.replay(1),
            f"prefill_{len(plan)}": decoder.prefill,
            "decode": decoder.replay,
        }
        graph.run({"pixel_values": preprocess([image], session.manifest.image)})
        return "\n".join(_table(name, run) for name, run in phases.items())


def _table(name: str, run: Callable[[], Any]) -> str:
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
    total, count = sum(spent.values()), sum(launches.values()) / REPLAYS
    rows = [
        f"| {time:.1f} | {launches[kernel] / REPLAYS:.0f} | `{kernel.replace('|', ' ')[:96]}` |"
        for kernel, time in spent.most_common(SHOWN)
    ]
    head = f"{name}: {total:.0f} us in {count:.0f} kernels\n\n| us | launches | kernel |\n|--:|--:|---|"
    return "\n".join([head, *rows, ""])
