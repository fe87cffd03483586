"""A picture of pruning: the image as the model sees it, dimmed where tokens were dropped, beside the attention map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.outputs import png_bytes, write_outputs
from leanvlm.runtime.preprocess import ImageSpec, preprocess

SCALE = 2
DIM = 0.22
GAP = 12
# Black, violet, orange, yellow, white: dark to light for colour-blind eyes too.
COLOURS = ((0.0, (8, 8, 20)), (0.35, (110, 30, 110)), (0.65, (225, 95, 45)), (0.9, (250, 210, 80)), (1.0, (255, 255, 255)))


def save_overlay(path: Path, image: Image.Image, pruning: Pruning, spec: ImageSpec) -> None:
    """Write the picture for one image; it shows what the model sees, so the crop is cut off."""
    write_outputs({path: png_bytes(draw_overlay(image, pruning, spec))})


def draw_overlay(image: Image.Image, pruning: Pruning, spec: ImageSpec) -> Image.Image:
    """Return kept tokens and attention side by side, each (SCALE * H, SCALE * W)."""
    levels = preprocess([image], replace(spec, layout="uint8"))[0].transpose(1, 2, 0)
    height, width = levels.shape[:2]
    size = (width * SCALE, height * SCALE)
    kept = np.zeros(pruning.total, dtype=np.float32)
    kept[pruning.indices] = 1.0
    grid, leading = pruning.shape.grid, pruning.shape.leading
    light = _patches(kept[leading:], grid, (height, width))
    dimmed = (levels * (DIM + (1 - DIM) * light[:, :, None])).astype(np.uint8)
    heat = _colour(_patches(_relative(pruning.attention[leading:]), grid, (height, width)))
    canvas = Image.new("RGB", (2 * size[0] + GAP, size[1]), (255, 255, 255))
    canvas.paste(Image.fromarray(dimmed).resize(size, Image.Resampling.NEAREST), (0, 0))
    canvas.paste(Image.fromarray(heat).resize(size, Image.Resampling.NEAREST), (size[0] + GAP, 0))
    return canvas


def _patches(values: npt.NDArray[np.float32], grid: tuple[int, int], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Spread one value a patch (N,) over the pixels (H, W); pixels behind the last whole patch get 0."""
    patch = (size[0] // grid[0], size[1] // grid[1])
    covered = np.kron(values.reshape(grid), np.ones(patch, dtype=np.float32))
    padding = ((0, size[0] - covered.shape[0]), (0, size[1] - covered.shape[1]))
    return np.pad(covered, padding)


def _relative(attention: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale attention to 0..1 on a square root, since a few patches take most of it."""
    root = np.sqrt(np.maximum(attention, 0))
    return (root / max(float(root.max()), 1e-12)).astype(np.float32)


def _colour(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    stops = [stop for stop, _ in COLOURS]
    channels = [np.interp(values, stops, [colour[c] for _, colour in COLOURS]) for c in range(3)]
    return np.stack(channels, axis=2).astype(np.uint8)
