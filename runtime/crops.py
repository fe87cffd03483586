"""How an image becomes crops: the pieces of fixed shapes that the vision graphs take.

The sizes follow transformers' image processors to the pixel, which the tests compare level by level: `resolution` is the
choice of its `select_best_resolution`, `aspect` that of `get_optimal_tiled_canvas`, `longest_edge` that of processors whose
size is a `longest_edge`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from leanvlm.runtime.cuts import Cut, Picture, Piece, Raster, Resizer, Uncut, as_image, cut_pieces, part, size_of
from leanvlm.runtime.errors import InputError, ManifestError
from leanvlm.runtime.preprocess import (
    MAX_PIXELS,
    Edge,
    ImageSource,
    ImageSpec,
    PixelValues,
    centre,
    load_image,
    load_raster,
    normalised,
)
from leanvlm.runtime.records import Between, Count, Size

Array = npt.NDArray[Any]
Level = Annotated[int, Between(0, 255)]
Thumbnail = Literal["none", "first", "last"]

PIXELS, VALID = "pixel_values", "valid"
NARROWEST = 200
"""Times that one side of an image may be the other, where a model has a rule of its own for sizes."""
MAX_TILES = 256
"""Of one image; each is a run through the tower."""
Tiles = Annotated[int, Between(1, MAX_TILES)]
Limit = tuple[int, int] | int
"""The least and the most pixels of an image, or the most of its longer side."""


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
    def text(self) -> str:
        """Its pixels in words, height first: 448x616."""
        return f"{self.pixels[0]}x{self.pixels[1]}"

    @property
    def tokens(self) -> int:
        """N, the image tokens of a crop before pruning."""
        return self.leading + self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class CropRule:
    """Which crops are cut of an image.

    Attributes:
        kind: `whole`: the image is one crop. `tiles`: it is resized to a grid of tiles, and each is a crop. `nearest`: it is
            one crop, stretched to the shape that is nearest to the size that the model's own rule gives it.
        shapes: Shapes of the crops, one set of vision graphs each; tiles and thumbnail have the first. The first is the
            largest.
        choose: How many tiles. `resolution`: of `arrangements` that which keeps most of the image's pixels and wastes fewest.
            `aspect`: that whose sides are most like the image's; of equal ones the larger, if the image fills half of it.
            `longest_edge`: as many as the image covers, once its longer side is `longest_edge`.
        arrangements: Rows and columns to choose from; of equal ones the first counts with `resolution`.
        fit: `stretch`: the tiles show the image with other proportions. `pad`: with its own, black around it.
        thumbnail: Where a crop stands that shows all of the image, beside the tiles.
        longest_edge: The longer side, in pixels, that every image is resized to before anything else; with `nearest` the most
            that the model's own rule leaves it.
        several: Of a prompt with several images, `alike`: each is cut by this rule; `square`: each is one crop, padded to a
            square.
        background: Colour of that padding.
        pixels: The least and the most pixels that the model's own rule makes of an image, with `nearest`; it has this or
            `longest_edge`.
    """

    kind: Literal["whole", "tiles", "nearest"]
    shapes: tuple[CropShape, ...]
    choose: Literal["resolution", "aspect", "longest_edge"] = "resolution"
    arrangements: tuple[tuple[Tiles, Tiles], ...] = ()
    fit: Literal["stretch", "pad"] = "stretch"
    thumbnail: Thumbnail = "none"
    longest_edge: Edge | None = None
    several: Literal["alike", "square"] = "alike"
    background: tuple[Level, Level, Level] = (0, 0, 0)
    pixels: tuple[Size, Size] | None = None

    def __post_init__(self) -> None:
        """Check that the fields go together; raises ManifestError."""
        if not self.shapes:
            raise ManifestError("shapes is empty; it must hold at least one")
        for shape in self.shapes:
            if any(cells > side for cells, side in zip(shape.grid, shape.pixels, strict=True)):
                raise ManifestError(f"a crop of {list(shape.pixels)} pixels has no grid of {list(shape.grid)} tokens")
            if shape.leading and self.is_padded:
                raise ManifestError("tokens in front of a crop's grid have no place among tiles with padding")
        if self.kind != "nearest" and self.pixels is not None:
            raise ManifestError("pixels, the least and the most of an image, go with nearest shapes and nothing else")
        if self.kind == "nearest" and (self.pixels is None) == (self.longest_edge is None):
            raise ManifestError("pixels, the least and the most of an image, go with nearest shapes, or longest_edge does")
        if self.kind == "nearest" and len({self._token(shape) for shape in self.shapes}) > 1:
            raise ManifestError("the tokens of all nearest shapes must stand for as many pixels")
        if self.shapes[0].tokens < max(shape.tokens for shape in self.shapes):
            raise ManifestError("the first of the shapes must be the largest")
        if self.kind == "tiles" and (self.choose == "longest_edge") != (not self.arrangements):
            raise ManifestError("tiles are chosen by longest_edge, or of arrangements: give one or the other")
        if self.kind == "tiles" and self.choose == "longest_edge" and self.longest_edge is None:
            raise ManifestError("tiles are chosen by longest_edge, which is missing")
        if self.most > MAX_TILES:
            raise ManifestError(f"an image would become {self.most} crops; at most {MAX_TILES} are supported")
        height, width = self.shapes[0].pixels
        if self.most * height * width > MAX_PIXELS:
            raise ManifestError(
                f"an image would become {self.most} crops of {height} x {width}; they may have {MAX_PIXELS // 10**6} megapixels"
            )

    @staticmethod
    def _token(shape: CropShape) -> tuple[float, float]:
        """Return the pixels, high and wide, that one token stands for."""
        return shape.pixels[0] / shape.grid[0], shape.pixels[1] / shape.grid[1]

    @property
    def limit(self) -> Limit:
        """Of nearest shapes: what the model's own rule holds an image to."""
        limit = self.pixels or self.longest_edge
        assert limit is not None
        return limit

    @property
    def factor(self) -> int:
        """Of nearest shapes: sides are whole multiples of so many pixels."""
        return self.shapes[0].pixels[0] // self.shapes[0].grid[0]

    @property
    def is_padded(self) -> bool:
        """Whether some of a tile may be padding, so that the vision graphs are told which tokens show the image."""
        return self.kind == "tiles" and self.fit == "pad"

    @property
    def most(self) -> int:
        """The most crops that one image becomes."""
        if self.kind != "tiles":
            return 1
        tiles = max((rows * columns for rows, columns in self.arrangements), default=0)
        if self.longest_edge is not None:
            # The shorter side is rounded up to an even number, and so may be longer by one.
            longest = self.longest_edge + self.longest_edge % 2
            height, width = (-(-longest // side) for side in self.shapes[0].pixels)
            tiles = max(tiles, height * width)
        return tiles + (self.thumbnail != "none")


@dataclass(frozen=True)
class Arrangement:
    """How one image was cut.

    Attributes:
        tiles: Rows and columns of its tiles; (0, 0) for an image that is one crop.
        thumbnail: Where among the crops that one stands that shows all of the image.
        inner: Of the grid that the tokens of all tiles make together, the part that shows the image: rows from the first number
            up to the second, columns from the third up to the fourth; the rest is padding. None where all of it does.
        shape: Index of its crops' shape.
    """

    tiles: tuple[int, int] = (0, 0)
    thumbnail: Thumbnail = "none"
    inner: tuple[int, int, int, int] | None = None
    shape: int = 0

    @property
    def crops(self) -> int:
        """How many crops there are."""
        return self.tiles[0] * self.tiles[1] + (self.thumbnail != "none") or 1


@dataclass(frozen=True)
class CroppedImage:
    """How an image was cut, and its crops in order: the index of the shape, and the row of that shape's batch."""

    arrangement: Arrangement
    crops: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cropped:
    """The crops of some images, those of one shape in one batch.

    Attributes:
        inputs: Index of the shape to what its vision graphs take, by name: pixel values (C, 3, H, W), and where images are
            padded which tokens (C, N) show the image.
        images: One entry an image.
    """

    inputs: Mapping[int, Mapping[str, Array]]
    images: tuple[CroppedImage, ...]


def arrange(size: tuple[int, int], rule: CropRule, among: int = 1) -> Arrangement:
    """Say how an image will be cut.

    Args:
        size: Its (height, width) in pixels.
        rule: Which crops.
        among: How many images its prompt has.

    Raises:
        InputError: The model takes no image so narrow.
    """
    if rule.kind == "nearest":
        return Arrangement(shape=_nearest(size, rule))
    if rule.kind == "whole" or (rule.several == "square" and among > 1):
        return Arrangement()
    tile, grid = rule.shapes[0].pixels, rule.shapes[0].grid
    if rule.choose == "longest_edge":
        covered = _whole_tiles(_longest_edge(size, rule.longest_edge), tile)
        rows, columns = covered[0] // tile[0], covered[1] // tile[1]
    elif rule.choose == "aspect":
        rows, columns = _most_alike(size, rule.arrangements, tile)
    else:
        rows, columns = _best_resolution(size, rule.arrangements, tile)
    if (rows, columns) == (1, 1) and rule.choose != "resolution":
        return Arrangement()
    inner = _shown(size, (rows * grid[0], columns * grid[1])) if rule.fit == "pad" else None
    return Arrangement((rows, columns), rule.thumbnail, inner)


def crop(
    images: Sequence[ImageSource], spec: ImageSpec, rule: CropRule, among: int | None = None, resizer: Resizer | None = None
) -> Cropped:
    """Cut images, at least one, into crops.

    Args:
        images: Each as `load_image` takes it.
        spec: How one crop becomes pixel values.
        rule: Which crops.
        among: How many images the prompt has; None: these.
        resizer: Cuts later on a device what it can; None: all is cut here.

    Raises:
        InputError: An image cannot be used.
    """
    found: dict[int, list[Piece]] = {}
    cut: list[CroppedImage] = []
    for source in images:
        image = load_image(source) if resizer is None else load_raster(source)
        arrangement = arrange(size_of(image), rule, among or len(images))
        square = rule.several == "square" and (among or len(images)) > 1
        pieces = _pieces(_squared(as_image(image), rule) if square else image, spec, rule, arrangement)
        alike = found.setdefault(arrangement.shape, [])
        first, count = (sum(piece.cut.crops for piece in some) for some in (alike, pieces))
        cut.append(CroppedImage(arrangement, tuple((arrangement.shape, first + row) for row in range(count))))
        alike += pieces
    inputs: dict[int, dict[str, Any]] = {}
    for shape, alike in found.items():
        later = Uncut.of(alike, resizer)
        inputs[shape] = {PIXELS: _pixels(alike, spec) if later is None else later}
    if rule.is_padded:
        inputs[0][VALID] = np.concatenate([shown_tokens(image.arrangement, rule.shapes[0]) for image in cut])
    return Cropped(inputs, tuple(cut))


def cuts_of(size: tuple[int, int], spec: ImageSpec, rule: CropRule, among: int = 1) -> tuple[tuple[int, int], list[Cut]]:
    """Say where the crops of an image lie, without it.

    Args:
        size: Its (height, width) in pixels.
        spec: How one crop becomes pixel values.
        rule: Which crops.
        among: How many images its prompt has.

    Returns:
        The (height, width) of what is cut, which is a square around the image where the rule pads it; and the cuts, in order.
    """
    arrangement = arrange(size, rule, among)
    if rule.several == "square" and among > 1:
        size = (max(size), max(size))
    # All of its pixels are one byte.
    blank = np.broadcast_to(np.zeros(1, np.uint8), (*size, 3))
    return size, [piece.cut for piece in _pieces(blank, spec, rule, arrangement)]


def _pixels(pieces: list[Piece], spec: ImageSpec) -> PixelValues:
    """Return what a vision graph takes of pieces of one shape."""
    return normalised(np.ascontiguousarray(np.stack(cut_pieces(pieces)).transpose(0, 3, 1, 2)), spec)


def shown_tokens(arrangement: Arrangement, shape: CropShape) -> npt.NDArray[np.float32]:
    """Return for each crop of an image (C, N) which tokens show the image, 1, and which are padding, 0."""
    shown = np.ones((arrangement.crops, shape.tokens), np.float32)
    (rows, columns), (height, width) = arrangement.tiles, shape.grid
    if arrangement.inner is None:
        return shown
    top, bottom, left, right = arrangement.inner
    picture = np.zeros((rows * height, columns * width), np.float32)
    picture[top:bottom, left:right] = 1.0
    tiles = picture.reshape(rows, height, columns, width).transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    first = int(arrangement.thumbnail == "first")
    shown[first : first + len(tiles)] = tiles
    return shown


def _pieces(image: Raster, spec: ImageSpec, rule: CropRule, arrangement: Arrangement) -> list[Piece]:
    """Say how the crops of an image are cut, in order."""
    size, before = size_of(image), []
    if rule.kind == "nearest":
        stretched = replace(spec, resize=rule.shapes[arrangement.shape].pixels)
        return [Piece(Picture(image, spec.resample), centre(size, stretched))]
    rows, columns = arrangement.tiles
    tile = rule.shapes[0].pixels
    if rule.longest_edge is not None:
        before.append(size := _longest_edge(size, rule.longest_edge))
    if rule.kind == "tiles" and rule.choose == "longest_edge":
        # Also of an image that fits one tile; and the thumbnail is made of what comes out.
        before.append(size := _whole_tiles(size, tile))
    picture = Picture(image, spec.resample, tuple(before))
    if not rows:
        return [Piece(picture, centre(size, spec))]
    canvas = rows * tile[0], columns * tile[1]
    resized = _fitted(size, canvas, rule)
    # The odd pixel of padding comes last.
    top, left = (-((side - given) // 2) for side, given in zip(canvas, resized, strict=True))
    tiles = Piece(picture, part(size, resized, (top, left), canvas, (rows, columns)))
    if arrangement.thumbnail == "none":
        return [tiles]
    thumbnail = Piece(picture, centre(size, spec))
    return [thumbnail, tiles] if arrangement.thumbnail == "first" else [tiles, thumbnail]


def _fitted(size: tuple[int, int], canvas: tuple[int, int], rule: CropRule) -> tuple[int, int]:
    """Return what an image (height, width) is resized to, with its proportions or not, for a canvas."""
    if rule.fit == "stretch":
        return canvas
    high, wide = canvas[0] / size[0], canvas[1] / size[1]
    if wide < high:
        return min(math.ceil(size[0] * wide), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * high), canvas[1])


def _squared(image: Image.Image, rule: CropRule) -> Image.Image:
    """Pad an image to a square.

    Raises:
        InputError: It would have too many pixels.
    """
    side = max(image.size)
    if side * side > MAX_PIXELS:
        raise InputError(
            f"an image of {image.width} x {image.height} is too narrow: padding it would make {side} x {side} pixels"
        )
    canvas = Image.new("RGB", (side, side), rule.background)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _best_resolution(size: tuple[int, int], among: Sequence[tuple[int, int]], tile: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns that keep most pixels of an image (height, width), and of those that waste fewest."""
    height, width = size

    def merit(rows: int, columns: int) -> tuple[int, int]:
        high, wide = rows * tile[0], columns * tile[1]
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - high * wide

    return max(among, key=lambda arrangement: merit(*arrangement))


def _nearest(size: tuple[int, int], rule: CropRule) -> int:
    """Return which shape is nearest to what the model's own rule makes of an image's (height, width).

    Proportions count twice as much as area, both as log ratios: a picture that is larger than all shapes is rather made smaller
    than distorted.

    Raises:
        InputError: One side is over 200 times the other.
    """
    if max(size) > NARROWEST * min(size):
        raise InputError(f"an image of {size[1]} x {size[0]} is too narrow: one side may be {NARROWEST} times the other")
    height, width = own_size(size, rule.factor, rule.limit)

    def distance(shape: CropShape) -> float:
        high, wide = math.log(shape.pixels[0] / height), math.log(shape.pixels[1] / width)
        return abs(high - wide) + abs(high + wide) / 2

    return min(range(len(rule.shapes)), key=lambda at: distance(rule.shapes[at]))


def own_size(size: tuple[int, int], factor: int, limit: Limit) -> tuple[int, int]:
    """Return the (height, width) that a model resizes an image to without a ladder of shapes.

    That is transformers' `smart_resize`, or where a side is limited `get_resize_output_image_size`, which rounds up.

    Args:
        size: The image's.
        factor: Both sides are multiples of it.
        limit: Of its pixels or of its longer side.
    """
    if isinstance(limit, int):
        ratio = max(*(side / limit for side in size), 1)
        high, wide = (max(math.floor(side / ratio), 1) for side in size)
        return -(-high // factor) * factor, -(-wide // factor) * factor
    (height, width), (least, most) = size, limit
    high, wide = (round(side / factor) * factor for side in size)
    if high * wide > most:
        scale = math.sqrt(height * width / most)
        return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in size)  # type: ignore[return-value]
    if high * wide < least:
        scale = math.sqrt(least / (height * width))
        return tuple(math.ceil(side * scale / factor) * factor for side in size)  # type: ignore[return-value]
    return high, wide


def _most_alike(size: tuple[int, int], among: Sequence[tuple[int, int]], tile: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns whose proportions are nearest to an image's (height, width)."""
    height, width = size
    best, least = (1, 1), math.inf
    for rows, columns in among:
        difference = abs(width / height - columns / rows)
        larger = difference == least and width * height > 0.5 * tile[0] * tile[1] * rows * columns
        if difference < least or larger:
            best, least = (rows, columns), difference
    return best


def _longest_edge(size: tuple[int, int], longest: int | None) -> tuple[int, int]:
    """Return (height, width) with the longer side as given and the shorter one rounded up to an even number."""
    if longest is None:
        return size
    height, width = size
    if width >= height:
        shorter = int(longest / (width / height))
        return max(shorter + shorter % 2, 1), longest
    shorter = int(longest * (width / height))
    return longest, max(shorter + shorter % 2, 1)


def _whole_tiles(size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """Return the size in whole tiles that an image of (height, width) is enlarged to."""
    height, width = size
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile[1]) * tile[1]
        return math.ceil(int(width / aspect) / tile[0]) * tile[0], width
    height = math.ceil(height / tile[0]) * tile[0]
    return height, math.ceil(int(height * aspect) / tile[1]) * tile[1]


def _shown(size: tuple[int, int], cells: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return which of (rows, columns) of cells show a padded image (height, width), as `Arrangement.inner`."""
    (height, width), (rows, columns) = size, cells
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return padding, rows - padding, 0, columns
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, padding, columns - padding
