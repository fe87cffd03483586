"""Which part of a picture a crop shows, read off the crops of a picture whose levels say where each pixel is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leanvlm.runtime.crops import PIXELS, CropRule, CropShape, crop
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.serving.details import crop_boxes

SPEC = ImageSpec((56, 56), None, layout="uint8")
CENTRED = ImageSpec(56, (56, 56), layout="uint8")
SHAPE = CropShape((56, 56), (4, 4))
GRIDS = tuple((rows, columns) for rows in range(1, 4) for columns in range(1, 4) if rows * columns > 1)

RULES: dict[str, tuple[ImageSpec, CropRule, int]] = {
    "whole, stretched": (SPEC, CropRule("whole", (SHAPE,)), 1),
    "whole, its sides cut off": (CENTRED, CropRule("whole", (SHAPE,)), 1),
    "tiles like the image, thumbnail last": (
        SPEC, CropRule("tiles", (SHAPE,), "aspect", GRIDS, thumbnail="last"), 1,
    ),
    "tiles in padding, thumbnail first": (
        SPEC, CropRule("tiles", (SHAPE,), "resolution", GRIDS, fit="pad", thumbnail="first"), 1,
    ),
    "tiles of the longer edge": (SPEC, CropRule("tiles", (SHAPE,), "longest_edge", thumbnail="last", longest_edge=112), 1),
    "the nearest shape": (SPEC, CropRule("nearest", (CropShape((56, 84), (4, 6)), SHAPE), pixels=(56 * 56, 56 * 84)), 1),
    "several, in a square": (
        SPEC, CropRule("tiles", (SHAPE,), "resolution", GRIDS, fit="pad", thumbnail="first", several="square"), 2,
    ),
}  # fmt: skip


def positions(height: int, width: int) -> Any:
    """Return a picture whose red says the column and whose green the row, from 20 on, and whose blue is full."""
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[:, :, 0] = 20 + 200 * (np.arange(width) + 0.5) / width
    picture[:, :, 1] = (20 + 200 * (np.arange(height) + 0.5) / height)[:, None]
    return picture


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (240, 240), (100, 280)])
def test_boxes_are_what_the_crops_show(name: str, size: tuple[int, int]) -> None:
    spec, rule, among = RULES[name]
    cropped = crop([positions(*size)], spec, rule, among)
    (image,) = cropped.images
    shape = rule.shapes[image.arrangement.shape]
    manifest: Any = SimpleNamespace(image=spec, crops=rule)
    boxes = crop_boxes(size, shape, manifest, among)
    assert len(boxes) == image.arrangement.crops
    for box, (at, row) in zip(boxes, image.crops, strict=True):
        levels = cropped.inputs[at][PIXELS][row].transpose(1, 2, 0).astype(np.float64)
        shown = levels[:, :, 2] > 250  # Padding has no blue.
        rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
        # Where inner pixels lie in the picture, by their levels and by the box.
        for axis, channel, line, count in ((0, 0, columns[2:-2], shape.pixels[1]), (1, 1, rows[2:-2], shape.pixels[0])):
            if len(line) < 4:
                continue
            middle = rows[len(rows) // 2] if axis == 0 else columns[len(columns) // 2]
            found = levels[middle, line, 0] if axis == 0 else levels[line, middle, 1]
            low, high = box[axis], box[axis + 2]
            assert (found - 20) / 200 == pytest.approx(low + (high - low) * (line + 0.5) / count, abs=0.02), (channel, box)


def test_pixels_behind_the_last_cell_are_not_in_the_box() -> None:
    rule = CropRule("whole", (CropShape((58, 58), (4, 4)),))
    manifest: Any = SimpleNamespace(image=replace(SPEC, resize=(58, 58)), crops=rule)
    assert crop_boxes((580, 1160), rule.shapes[0], manifest) == [pytest.approx([0, 0, 56 / 58, 56 / 58], abs=1e-5)]
