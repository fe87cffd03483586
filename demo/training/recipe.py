"""What a training run is asked to do: everything that its result depends on, by steps and not by time."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Literal

from leanvlm.demo.mixture import Mixture
from leanvlm.runtime.errors import InputError

__all__ = ["SMOKE", "Recipe", "smoke"]

SizeName = Literal["base", "small", "tiny"]
IMAGE_TOKENS = 576


@dataclass(frozen=True)
class Recipe:
    """One training run.

    From `drop_from` on, some steps show the decoder only some of the image tokens, so that it learns to do without the
    others. No pruner takes part: the drawn labels and chance say which are kept; see `leanvlm.demo.training.objective.choose`.

    Attributes:
        size: Which of `leanvlm.demo.training.network.SIZES`.
        steps: Optimizer steps, at least 1.
        seed: Of the weights, the scenes and the dropping.
        mixture: The scenes of a batch.
        rate: Highest learning rate, of both optimizers; a cosine falls to 2 % of it.
        warm_up: Steps over which the rate rises.
        momentum: Muon's.
        matrix_decay: Muon's weight decay.
        decay: AdamW's weight decay, on what remains of the matrices.
        clip: Largest norm of all gradients together.
        caption_weight: Weight of the captions' loss; that of the short answers has 1.
        contents_weight: Of what [CLS] knows of the scene.
        patch_weight: Of what lies under each patch; twice as much in the first 30 % of the steps.
        place_weight: Of each projected token's row and column.
        center_weight: Of the row and column of the centre of the object that it shows, so that two tokens of one object can
            be told from two objects.
        drop_from: Share of the steps before the first dropping.
        drop_share: Share of the later steps that drop tokens.
        least_kept: Fewest tokens kept; their number is drawn uniformly in its logarithm.
        checked: Held-out scenes of each kind that are asked about at the end.
    """

    size: SizeName = "base"
    steps: int = 5500
    seed: int = 0
    mixture: Mixture = field(default_factory=Mixture)
    rate: float = 2e-3
    warm_up: int = 200
    momentum: float = 0.95
    matrix_decay: float = 0.02
    decay: float = 0.05
    clip: float = 2.0
    caption_weight: float = 0.4
    contents_weight: float = 0.5
    patch_weight: float = 0.25
    place_weight: float = 0.3
    center_weight: float = 0.2
    drop_from: float = 0.12
    drop_share: float = 0.4
    least_kept: int = 32
    checked: int = 200

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"--steps {self.steps} is not possible; give at least 1")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * (0.02 + 0.98 * cosine)

    def patch_weight_at(self, step: int) -> float:
        """Weight of what lies under each patch at a step."""
        return self.patch_weight * (2 if step < 0.3 * self.steps else 1)

    def kept_at(self, step: int) -> int | None:
        """How many image tokens a step keeps; None where it drops none."""
        rng = random.Random(f"drop-{self.seed}-{step}")
        if step < self.drop_from * self.steps or rng.random() >= self.drop_share:
            return None
        return round(math.exp(rng.uniform(math.log(self.least_kept), math.log(IMAGE_TOKENS))))


SMOKE = Mixture(images=8, kinds=("simple",))


def smoke(seed: int) -> Recipe:
    """A run of a minute on a CPU that shows that training works; its result answers nothing."""
    return Recipe(size="tiny", steps=30, seed=seed, mixture=SMOKE, warm_up=5, checked=2)
