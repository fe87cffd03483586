"""A picture of pruning: the image as the model sees it, dimmed where tokens were dropped, beside the attention map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.crops import PIXELS, Arrangement, CropRule, crop
from leanvlm.runtime.cuts import Levels
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.outputs import png_bytes, write_outputs
from leanvlm.runtime.preprocess import ImageSpec

SCALE = 2
DIM = 0.22
GAP = 12
# Between tiles.
SEAM = 2
# Black, violet, orange, yellow, white: dark to light for colour-blind eyes too.
COLOURS = ((0.0, (8, 8, 20)), (0.35, (110, 30, 110)), (0.65, (225, 95, 45)), (0.9, (250, 210, 80)), (1.0, (255, 255, 255)))


def save_overlay(path: Path, image: Image.Image, crops: Sequence[Pruning], manifest: Manifest) -> None:
    """Write the picture for one image; it shows what the model sees, so what preprocessing cuts off is not there.

    Args:
        path: A PNG file.
        image: The image, in RGB.
        crops: What pruning did to each of its crops.
        manifest: Of the bundle.
    """
    write_outputs({path: png_bytes(draw_overlay(image, crops, manifest.image, manifest.crops))})


def draw_overlay(image: Image.Image, crops: Sequence[Pruning], spec: ImageSpec, rule: CropRule) -> Image.Image:
    """Return kept tokens and attention side by side; tiles stand as in the image, the whole picture below or above them."""
    cropped = crop([image], replace(spec, layout="uint8"), rule)
    levels = [cropped.inputs[shape][PIXELS][row].transpose(1, 2, 0) for shape, row in cropped.images[0].crops]
    # Tiles are many, and large enough without.
    scale = SCALE if len(levels) == 1 else 1
    most = max(float(_root(one).max()) for one in crops)
    kept = [_dimmed(level, one) for level, one in zip(levels, crops, strict=True)]
    heat = [_heat(level.shape, one, most) for level, one in zip(levels, crops, strict=True)]
    left, right = (_arranged(pictures, cropped.images[0].arrangement, scale) for pictures in (kept, heat))
    canvas = Image.new("RGB", (left.width + GAP + right.width, left.height), (255, 255, 255))
    canvas.paste(left, (0, 0))
    canvas.paste(right, (left.width + GAP, 0))
    return canvas


def _arranged(pictures: Sequence[Levels], arrangement: Arrangement, scale: int) -> Image.Image:
    """Put the pictures of one image's crops together."""
    drawn = [
        Image.fromarray(one).resize((one.shape[1] * scale, one.shape[0] * scale), Image.Resampling.NEAREST) for one in pictures
    ]
    rows, columns = arrangement.tiles
    if not rows:
        return drawn[0]
    width, height = drawn[0].size
    thumbnail = {"none": [], "first": drawn[:1], "last": drawn[-1:]}[arrangement.thumbnail]
    tiles = drawn[1:] if arrangement.thumbnail == "first" else drawn
    below = height + GAP if thumbnail else 0
    canvas = Image.new("RGB", (columns * (width + SEAM) - SEAM, rows * (height + SEAM) - SEAM + below), (255, 255, 255))
    top = below if arrangement.thumbnail == "first" else 0
    for at in range(rows * columns):
        canvas.paste(tiles[at], (at % columns * (width + SEAM), top + at // columns * (height + SEAM)))
    for one in thumbnail:
        canvas.paste(one, (0, 0 if top else rows * (height + SEAM) - SEAM + GAP))
    return canvas


def _dimmed(levels: Levels, pruning: Pruning) -> Levels:
    """Darken levels (H, W, 3) where tokens were dropped."""
    kept = np.zeros(pruning.total, dtype=np.float32)
    kept[pruning.indices] = 1.0
    light = _patches(kept[pruning.shape.leading :], pruning.shape.grid, (levels.shape[0], levels.shape[1]))
    return (levels * (DIM + (1 - DIM) * light[:, :, None])).astype(np.uint8)


def _heat(size: tuple[int, ...], pruning: Pruning, most: float) -> Levels:
    """Colour attention over (H, W, 3), on a square root, since a few patches take most of it.

    Args:
        size: (H, W, 3).
        pruning: Of the crop.
        most: The root of the largest attention in the image.
    """
    return _colour(_patches(_root(pruning) / max(most, 1e-12), pruning.shape.grid, (size[0], size[1])))


def _root(pruning: Pruning) -> npt.NDArray[np.float32]:
    return np.sqrt(np.maximum(pruning.attention[pruning.shape.leading :], 0)).astype(np.float32)


def _patches(values: npt.NDArray[np.float32], grid: tuple[int, int], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Spread one value a patch (N,) over the pixels (H, W); pixels behind the last whole patch get 0."""
    patch = (size[0] // grid[0], size[1] // grid[1])
    covered = np.kron(values.reshape(grid), np.ones(patch, dtype=np.float32))
    padding = ((0, size[0] - covered.shape[0]), (0, size[1] - covered.shape[1]))
    return np.pad(covered, padding)


def _colour(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    stops = [stop for stop, _ in COLOURS]
    channels = [np.interp(values, stops, [colour[c] for _, colour in COLOURS]) for c in range(3)]
    return np.stack(channels, axis=2).astype(np.uint8)
