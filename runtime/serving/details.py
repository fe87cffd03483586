"""What pruning kept of a request's images, for whoever draws it: which part of the picture each crop shows, and its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from leanvlm.runtime.answer import Answer, Pruning
from leanvlm.runtime.crops import CropShape, cuts_of
from leanvlm.runtime.cuts import Window
from leanvlm.runtime.manifest import Manifest

# EXIF's orientations that turn a picture by a quarter.
SIDEWAYS = (5, 6, 7, 8)
Box = list[float]
"""Left, top, right and bottom as fractions of a picture; below 0 or above 1 where padding is around it."""


def begun_details(known: Answer, sizes: Sequence[tuple[int, int]], manifest: Manifest, budget: int) -> dict[str, Any]:
    """Return what is known before the first token.

    Args:
        known: The answer so far.
        sizes: (height, width) of each image, upright.
        manifest: Of the bundle.
        budget: Image tokens kept per crop.
    """
    crops = iter(known.pruning)
    images = []
    for size, image in zip(sizes, known.images, strict=True):
        own = list(islice(crops, image.crops))
        boxes = crop_boxes(size, own[0].shape, manifest, len(sizes))
        drawn = [_crop(one, box) for one, box in zip(own, boxes, strict=True)]
        images.append({"kept": image.kept, "total": image.total, "tiles": list(image.tiles), "crops": drawn})
    return {"budget": budget, "images": images}


def ended_details(answer: Answer) -> dict[str, Any]:
    """Return what is known at the end: the times of the stages, and what was not done again."""
    times = {stage: round(value, 3) for stage, value in answer.timings.to_dict().items()}
    reused = {"images": answer.timings.reused_images, "positions": answer.timings.reused_positions}
    return {"timings_ms": times, "reused": reused}


def crop_boxes(size: tuple[int, int], shape: CropShape, manifest: Manifest, among: int = 1) -> list[Box]:
    """Return which part of a picture (height, width) the token grid of each of its crops shows.

    Args:
        size: Of the picture, upright.
        shape: Of its crops.
        manifest: Of the bundle.
        among: How many images the prompt has.
    """
    canvas, cuts = cuts_of(size, manifest.image, manifest.crops, among)
    return [
        _of_picture([left, top, right, bottom], canvas, size)
        for cut in cuts
        for top, bottom in _spans(cut.rows, cut.tiles[0], shape.pixels[0], shape.grid[0])
        for left, right in _spans(cut.columns, cut.tiles[1], shape.pixels[1], shape.grid[1])
    ]


def upright_size(data: bytes) -> tuple[int, int]:
    """Return the (height, width) of an image file once it is turned as its EXIF says; it was checked before."""
    with Image.open(BytesIO(data)) as image:
        try:
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
        except Exception:  # Pillow raises nearly anything on damaged data, and will again when the picture is decoded.
            lies = False
        return (image.width, image.height) if lies else (image.height, image.width)


def _spans(window: Window, tiles: int, pixels: int, cells: int) -> list[tuple[float, float]]:
    """Return where each of a window's tiles begins and ends; pixels behind the last whole cell are not the grid's."""
    step, covered = window.size // tiles, pixels // cells * cells / pixels
    begins = [window.begin + step * tile for tile in range(tiles)]
    return [(begin / window.resized, (begin + covered * step) / window.resized) for begin in begins]


def _of_picture(box: Box, canvas: tuple[int, int], size: tuple[int, int]) -> Box:
    """Turn fractions of a canvas (height, width), in whose middle a picture stands, into those of the picture."""
    found = []
    for value, axis in zip(box, (1, 0, 1, 0), strict=True):
        offset = (canvas[axis] - size[axis]) // 2
        found.append(round((value * canvas[axis] - offset) / size[axis], 6))
    return found


def _crop(pruning: Pruning, box: Box) -> dict[str, Any]:
    leading = pruning.shape.leading
    kept = pruning.indices[pruning.indices >= leading] - leading
    attention = np.maximum(pruning.attention[leading:].astype(np.float64), 0)
    scaled = np.round(attention / max(float(attention.max(initial=0)), 1e-12), 4)
    return {"grid": list(pruning.shape.grid), "box": box, "kept": kept.tolist(), "attention": scaled.tolist()}
