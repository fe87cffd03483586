"""How an image becomes crops: the pieces of fixed shapes that the vision graphs take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from leanvlm.runtime.errors import ManifestError
from leanvlm.runtime.preprocess import ImageSource, ImageSpec, PixelValues, preprocess
from leanvlm.runtime.records import Count, Size

Cell = tuple[int, int]


@dataclass(frozen=True)
class CropShape:
    """One shape of crops.

    Attributes:
        pixels: (height, width).
        grid: Rows and columns of its image tokens, behind any pooling.
        leading: Tokens before those of the grid, such as a class token that is kept.
    """

    pixels: tuple[Size, Size]
    grid: tuple[Size, Size]
    leading: Count = 0

    @property
    def tokens(self) -> int:
        """N, the image tokens of a crop before pruning."""
        return self.leading + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class CropRule:
    """Which crops are cut of an image.

    Attributes:
        kind: `whole`: the image is one crop, of the first shape.
        shapes: Shapes of the crops, one set of vision graphs each.
    """

    kind: Literal["whole"]
    shapes: tuple[CropShape, ...]

    def __post_init__(self) -> None:
        """Check that there is a shape; raises ManifestError."""
        if not self.shapes:
            raise ManifestError("shapes is empty; it must hold at least one")


@dataclass(frozen=True)
class Cropped:
    """The crops of some images, those of one shape in one batch.

    Attributes:
        pixels: Index of the shape to pixel values (C, 3, H, W).
        images: For each image its crops, in order: the index of the shape, and the row of that shape's batch.
    """

    pixels: Mapping[int, PixelValues]
    images: tuple[tuple[tuple[int, int], ...], ...]


def crop(images: Sequence[ImageSource], spec: ImageSpec, rule: CropRule) -> Cropped:
    """Cut images, at least one, into crops.

    Args:
        images: Each as `load_image` takes it.
        spec: How one crop becomes pixel values.
        rule: Which crops.

    Raises:
        InputError: An image cannot be used.
    """
    assert rule.kind == "whole"
    return Cropped({0: preprocess(images, spec)}, tuple(((0, row),) for row in range(len(images))))
