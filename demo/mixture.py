"""The scenes that the built-in models were trained on: which kinds, how many of each, and one step's of a run. Plain Python."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from leanvlm.demo.layout import TRAINING_SEED, Kind, Scene, make_scene

__all__ = ["Mixture", "draw_scenes"]


@dataclass(frozen=True)
class Mixture:
    """Which scenes a batch holds.

    Attributes:
        images: How many.
        kinds: Kinds to choose from, as often as they are listed.
        photo_share: Share of the images, of every kind alike, that get photographed ground; the number is the same in
            every batch, so that shapes are.
    """

    images: int = 256
    kinds: tuple[Kind, ...] = ("simple",) * 6 + ("medium",) * 3 + ("complex",) * 11
    photo_share: float = 0.35


def draw_scenes(mixture: Mixture, seed: int, step: int) -> list[Scene]:
    """Draw the scenes of one step of training; those with photographed ground come first."""
    rng = random.Random(f"batch-{seed}-{step}")
    photos = round(mixture.photo_share * mixture.images)
    scenes = []
    for index in range(mixture.images):
        kind: Any = rng.choice(mixture.kinds) + ("-photo" if index < photos else "")
        scenes.append(make_scene(TRAINING_SEED + rng.getrandbits(48), kind))
    return scenes
