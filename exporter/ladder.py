"""A ladder of shapes for models whose images may have any size: a graph has one, so a bundle holds a few of one weights file.

Every shape costs its graphs and the time to trace them; an image goes to the nearest (`runtime/crops.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from leanvlm.exporter.config import ImageSize
from leanvlm.exporter.families.base import Description, Frame
from leanvlm.exporter.ranges import MAX_TOKENS
from leanvlm.runtime.crops import NARROWEST, CropShape, Limit, own_size
from leanvlm.runtime.errors import InputError

# A square, a camera's 640 x 480 lying and standing, and 1280 x 720: 200 to 1,200 tokens with tokens of 28 or 32 pixels.
USUAL = ((720, 1280), (480, 640), (640, 480), (448, 448))


def usual_shapes(factor: int, limit: Limit) -> tuple[CropShape, ...]:
    """Return the shapes that an export has if none are named.

    Args:
        factor: Pixels on each side of a token.
        limit: Of an image's pixels or of its longer side.
    """
    sizes = dict.fromkeys(own_size(size, factor, limit) for size in USUAL)
    return _shapes(tuple(sizes), factor)


def in_sizes(description: Description, frame: Frame, sizes: Sequence[ImageSize] | None) -> tuple[Description, Frame]:
    """Return what a family reads of a checkpoint, for images of named sizes, or where none are named as it is.

    Args:
        description: What the family reads of the configuration.
        frame: What it reads of the processors.
        sizes: (height, width) each.

    Raises:
        InputError: The model has one size, or takes none of these.
    """
    rule = frame.crops
    if rule.kind != "nearest":
        if sizes is not None:
            taken = " x ".join(map(str, frame.image.size))
            raise InputError(f"--image-size is for models whose images may have any size; this one takes {taken}")
        return description, frame
    if sizes is not None:
        for size in sizes:
            _check(size, rule.factor, rule.limit)
        rule = replace(rule, shapes=_shapes(sizes, rule.factor))
    largest = rule.shapes[0]
    spec = replace(description, grid=largest.grid, image_size=largest.pixels)
    return spec, replace(frame, image=replace(frame.image, resize=largest.pixels), crops=rule)


def _shapes(sizes: Sequence[ImageSize], factor: int) -> tuple[CropShape, ...]:
    """Return the shapes of some sizes, the largest first."""
    ordered = sorted(sizes, key=lambda size: size[0] * size[1], reverse=True)
    return tuple(CropShape(size, (size[0] // factor, size[1] // factor)) for size in ordered)


def _check(size: ImageSize, factor: int, limit: Limit) -> None:
    """Refuse a size that the model's own processor would not leave as it is; raises InputError."""
    height, width = size
    said, area = f"--image-size {height}x{width}", height * width
    if height % factor or width % factor:
        near = "x".join(str(max(round(side / factor), 1) * factor) for side in size)
        raise InputError(f"{said} is not possible: sides are multiples of {factor} for this model, such as {near}")
    if max(size) > NARROWEST * min(size):
        raise InputError(f"{said} is too narrow: one side may be {NARROWEST} times the other")
    if isinstance(limit, int) and max(size) > limit:
        raise InputError(f"{said} is too long; the model's image processor makes images of at most {limit} pixels a side")
    if not isinstance(limit, int) and not limit[0] <= area <= limit[1]:
        raise InputError(f"{said} has {area} pixels; the model's image processor makes images of {limit[0]} to {limit[1]}")
    tokens = area // factor**2
    if tokens > MAX_TOKENS:
        raise InputError(f"{said} makes {tokens} image tokens, over {MAX_TOKENS}")
