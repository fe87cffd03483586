"""Fit a gate's reference values to a model: mean effective rank and mean attention entropy over images.

The gate judges each crop by itself, so an image that is cut into several counts as often. The exported graph estimates the
effective rank (`leanvlm.exporter.pruners.gates`); here it is computed exactly, so that the estimate's error, and what it does
to the choice of tokens, is known for this model.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from leanvlm.calibration.plot import Histogram, draw_plot
from leanvlm.calibration.vision import VisionSide
from leanvlm.demo.mixture import Mixture, draw_scenes
from leanvlm.demo.scenes import Scene
from leanvlm.exporter.gate_file import GateFile
from leanvlm.exporter.pruners.agile import select_tokens
from leanvlm.exporter.pruners.base import VisionTokens
from leanvlm.exporter.pruners.gates import attention_entropy, effective_rank, exact_effective_rank
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.preprocess import ImageSpec, load_image, resized_size

# Crops through the tower at once; an image that becomes more goes alone.
BATCH = 8
MIN_IMAGES = 8
# Names of unusable files that are told.
SHOWN = 10
# Tokens of about so many crops stay in memory to compare choices: 0.6 GB for a decoder 4096 wide.
COMPARED = 64
# No training run has this seed.
SCENES_SEED = -1

Array = npt.NDArray[np.float64]


@dataclass
class Folder:
    """Image files of a folder, in the order of their names.

    Attributes:
        path: The folder.
        unreadable: Names of the files that turned out to be no images, or none that the model can be given.
    """

    path: Path
    unreadable: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise InputError(f"--images {self.path} is not a folder; give one with at least {MIN_IMAGES} images")
        # A broken link or a pipe is among them, to be named like any file that is no image; os.path never raises.
        entries = (entry for entry in self.path.iterdir() if not entry.name.startswith("."))
        self._files = sorted(entry for entry in entries if not os.path.isdir(entry))
        if len(self._files) < MIN_IMAGES:
            raise InputError(
                f"--images {self.path} holds {len(self._files)} files; the gate needs at least {MIN_IMAGES} images"
            )

    @property
    def words(self) -> str:
        """What the images are."""
        return f"images of {self.path.resolve().name}"

    def __len__(self) -> int:
        return len(self._files)

    @property
    def left_out(self) -> str:
        """The names of the unusable files, the first of them."""
        more = f" and {len(self.unreadable) - SHOWN} more" if len(self.unreadable) > SHOWN else ""
        return ", ".join(self.unreadable[:SHOWN]) + more

    def pictures(self, spec: ImageSpec) -> Iterator[Image.Image]:
        """Open them one by one; those that `spec` cannot make an input of go to `unreadable`."""
        for file in self._files:
            try:
                image = load_image(file)
                resized_size((image.height, image.width), spec)
            except InputError:
                self.unreadable.append(file.name)
            else:
                yield image


@dataclass(frozen=True)
class TrainingScenes:
    """Scenes as the built-in models were trained on: of all kinds in training's proportions, with photographed ground or not.

    Attributes:
        count: How many.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < MIN_IMAGES:
            raise InputError(f"--scenes {self.count} is too few; the gate needs at least {MIN_IMAGES} images")

    @property
    def words(self) -> str:
        """What the images are."""
        return "built-in scenes of the training distribution"

    @property
    def unreadable(self) -> list[str]:
        """None: they are drawn."""
        return []

    @property
    def left_out(self) -> str:
        """No names."""
        return ""

    def pictures(self, spec: ImageSpec) -> Iterator[Image.Image]:
        """Draw them one by one, whatever the processor does."""
        return iter(self)

    def __len__(self) -> int:
        return self.count

    def scenes(self) -> list[Scene]:
        """Draw them."""
        scenes = draw_scenes(Mixture(images=self.count), SCENES_SEED, step=0)
        # Photographed grounds come first there; any part of these images should be like the whole.
        random.Random(SCENES_SEED).shuffle(scenes)
        return scenes

    def __iter__(self) -> Iterator[Image.Image]:
        from leanvlm.demo.render import render

        scenes = self.scenes()
        for start in range(0, self.count, BATCH):
            yield from render(scenes[start : start + BATCH])


@dataclass(frozen=True)
class Measured:
    """What a model makes of images, which became M crops.

    Attributes:
        images: How many they were.
        exact: (M,) effective ranks by eigenvalue decomposition.
        estimated: (M,) by the graph's estimator.
        entropy: (M,) of the class token's attention, nats.
        tokens: The tokens of the first crops.
    """

    images: int
    exact: Array
    estimated: Array
    entropy: Array
    tokens: list[VisionTokens]


def measure(side: VisionSide, images: Folder | TrainingScenes, on_images: Callable[[int], None]) -> Measured:
    """Run the vision tower over images in batches.

    Args:
        side: The model.
        images: Where they come from.
        on_images: Told how many were done with each batch, unreadable ones included, for a progress display.

    Raises:
        InputError: Fewer than 8 images can be used.
    """
    exact: list[Tensor] = []
    estimated: list[Tensor] = []
    entropy: list[Tensor] = []
    tokens: list[VisionTokens] = []
    usable = seen = compared = 0
    at_once = max(BATCH // side.checkpoint.frame.crops.most, 1)
    for batch in _batches(images.pictures(side.checkpoint.image_spec), at_once):
        for crops in side.by_shape(batch):
            found = crops.patches
            exact.append(exact_effective_rank(found.features))
            estimated.append(effective_rank(found.features))
            entropy.append(attention_entropy(found.saliency))
            if compared < COMPARED:
                tokens.append(found)
                compared += len(found.features)
        usable += len(batch)
        on_images(len(batch) + len(images.unreadable) - seen)
        seen = len(images.unreadable)
    ranks, estimates, nats = (
        torch.cat(values).double().numpy() if values else np.empty(0) for values in (exact, estimated, entropy)
    )
    if usable < MIN_IMAGES:
        raise InputError(
            f"only {usable} of {len(images)} files are usable images; the gate needs at least {MIN_IMAGES}; "
            f"left out: {images.left_out}"
        )
    return Measured(usable, ranks, estimates, nats, tokens)


def _batches(images: Iterator[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    batch: list[Image.Image] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def fit_gate(side: VisionSide, images: Folder | TrainingScenes, found: Measured, budgets: Sequence[int]) -> GateFile:
    """Turn measurements into a gate file.

    Args:
        side: The model measured.
        images: What it was measured on.
        found: The measurements.
        budgets: Image tokens kept, for which exact and estimated choices are compared; those of N and more are left out.
    """
    erank_ref = float(found.exact.mean())
    source = side.checkpoint.source()
    figures = {
        "crops": len(found.exact),
        "effective_rank": _spread(found.exact),
        "attention_entropy": _spread(found.entropy),
        "unreadable": len(images.unreadable),
        "estimator": errors(found.exact, found.estimated),
        "kept_overlap": {
            str(budget): _overlap(found, erank_ref, budget)
            for budget in budgets
            if budget < side.checkpoint.spec.tokens_per_crop
        },
    }
    return GateFile(
        model=source.id,
        sha256=source.sha256,
        images=found.images,
        source=images.words,
        erank_ref=round(erank_ref, 4),
        entropy_ref=round(float(found.entropy.mean()), 5),
        figures=figures,
        versions={name: version(name) for name in ("leanvlm", "torch", "transformers", "numpy")},
    )


def errors(exact: Array, estimated: Array) -> dict[str, float]:
    """Compare estimates with exact values.

    Args:
        exact: (M,), positive.
        estimated: (M,).

    Returns:
        `r2`, the share of the variance that is explained (1 where there is none); `mean_error` and `worst_error`, relative.
    """
    variance = float(((exact - exact.mean()) ** 2).sum())
    relative = np.abs(estimated / exact - 1)
    r2 = 1 - float(((estimated - exact) ** 2).sum()) / variance if variance else 1.0
    return {"r2": round(r2, 5), "mean_error": round(float(relative.mean()), 6), "worst_error": round(float(relative.max()), 6)}


def _overlap(found: Measured, erank_ref: float, budget: int) -> dict[str, float]:
    """Share of kept tokens that are the same with the estimated as with the exact rank: mean and worst crop."""
    shares: list[float] = []
    for batch in found.tokens:
        rows = slice(len(shares), len(shares) + len(batch.features))
        kept = min(budget, batch.count)
        exact, rough = (_choose(batch, ranks[rows] / erank_ref, kept) for ranks in (found.exact, found.estimated))
        shares += [len(set(a) & set(b)) / kept for a, b in zip(exact, rough, strict=True)]
    return {"crops": len(shares), "mean": round(float(np.mean(shares)), 5), "worst": round(min(shares), 5)}


def _choose(tokens: VisionTokens, ratio: Array, keep: int) -> list[list[int]]:
    indices, *_ = select_tokens(tokens.saliency, tokens.features, torch.from_numpy(ratio), keep=keep)
    chosen: list[list[int]] = indices.tolist()
    return chosen


def _spread(values: Array) -> dict[str, float]:
    named = {"mean": values.mean(), "sd": values.std(ddof=1), "least": values.min(), "most": values.max()}
    return {name: round(float(value), 4) for name, value in named.items()}


def images_and_crops(images: int, crops: int) -> str:
    """Say how many images there were, and how many crops where those are more."""
    return f"{images} images" if crops == images else f"{crops} crops of {images} images"


def draw_histogram(gate: GateFile, found: Measured) -> bytes:
    """Draw the spread of both quantities over the crops, with the references that the file sets; returns a PNG file."""
    ranks = {"exact": found.exact.tolist(), "estimated": found.estimated.tolist()}
    entropy = {"entropy": found.entropy.tolist()}
    title = images_and_crops(gate.images, len(found.exact))
    counted = "images" if gate.images == len(found.exact) else "crops"
    panels = (
        ("Effective rank", "effective rank", ranks, gate.erank_ref),
        ("Attention entropy", "entropy, nats", entropy, gate.entropy_ref),
    )
    return draw_plot(
        [
            Histogram(f"{name}, {title}", label, series, ("reference (mean)", mean), counted=counted)
            for name, label, series, mean in panels
        ]
    )
