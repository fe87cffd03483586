"""A training run's last check: held-out questions, all tokens kept, through the twin that was trained."""

from __future__ import annotations

import numpy as np
import torch

from leanvlm.demo.render import Renderer
from leanvlm.demo.scenes import FAMILIES, KINDS, PHOTO_KINDS, make_scene
from leanvlm.demo.training.batches import Script, make_batch
from leanvlm.demo.training.canvas import PATCHES, to_device
from leanvlm.demo.training.network import Twin, normalised
from leanvlm.demo.training.objective import Tokens, answered

__all__ = ["examine"]

BATCH = 32


@torch.no_grad()
def examine(twin: Twin, scenes: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Ask a model about held-out scenes, all image tokens kept, in fp32.

    Args:
        twin: The model.
        scenes: How many of each kind, from seed 0.
        device: Where the model is.

    Returns:
        Kind of scenes to the share of exact answers, 0-1: by family, and for all but the captions as "answers".
    """
    script, renderer = Script(), Renderer(device)
    head = torch.tensor(script.head, device=device)
    order = torch.arange(PATCHES, device=device)[None]
    _, positions, visible = Tokens(len(head), device).keep(order, PATCHES)
    results: dict[str, dict[str, float]] = {}
    for kind in (*KINDS, *PHOTO_KINDS):
        right, asked = np.zeros(len(FAMILIES)), np.zeros(len(FAMILIES))
        for start in range(0, scenes, BATCH):
            shown = [make_scene(seed, kind) for seed in range(start, min(start + BATCH, scenes))]
            batch = make_batch(shown, script)
            states, _ = twin.vision(normalised(renderer.images(shown), torch.float32))
            ids, targets = to_device(batch.ids, device), to_device(batch.targets, device)
            exact = answered(twin.answer(head, twin.project(states), ids, positions, visible), targets).cpu().numpy()
            for number in range(len(FAMILIES)):
                mine = batch.families == number
                right[number] += (exact & mine).sum()
                asked[number] += mine.sum()
        shares = {family: round(float(r / a), 4) for family, r, a in zip(FAMILIES, right, asked, strict=True) if a}
        results[kind] = {"answers": round(float(right[:-1].sum() / asked[:-1].sum()), 4), **shares}
    return results
