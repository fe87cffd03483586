"""What is cut of a picture, as data: how large each axis becomes, and which part of it is a crop; and the cutting, in Pillow.

The rules of models (`crops.py`) end as these records, and whatever makes levels begins with them: Pillow here, and on a device
a graph. So both cut the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

Levels = npt.NDArray[np.uint8]
Raster = Image.Image | Levels
"""A picture in RGB: Pillow's, or levels (H, W, 3)."""

Size = tuple[int, int]
# When Pillow resizes the height first, of (width, height) before and after: never, in releases up to 12.0; where a picture is
# very tall, in 12.2 and 12.3; and from 13.0 on where so much more of the height is lost.
ORDERS: dict[str, Callable[[Size, Size], bool]] = {
    "never": lambda source, size: False,
    "tall": lambda source, size: source[1] > 100 * source[0] and size[1] < source[1],
    "lossier": lambda source, size: source[1] - size[1] > max(0, 2 * (source[0] - size[0])),
}
# Sizes that the rules do not agree on, at and beside their borders.
PROBES: tuple[tuple[Size, Size], ...] = (
    ((9, 40), (8, 8)), ((40, 9), (8, 8)), ((20, 40), (10, 20)), ((20, 41), (10, 20)), ((3, 48), (30, 20)), ((9, 9), (20, 31)),
    ((2, 200), (9, 20)), ((2, 201), (9, 20)), ((2, 201), (9, 207)),
)  # fmt: skip


@dataclass(frozen=True)
class Window:
    """A part of one axis, once that is resized.

    Attributes:
        length: Pixels of the axis.
        resized: Pixels of the whole axis, resized.
        begin: The first pixel that is taken; those before 0 are black.
        end: Behind the last one; those from `resized` on are black.
    """

    length: int
    resized: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many pixels are taken."""
        return self.end - self.begin


@dataclass(frozen=True)
class Cut:
    """A picture resized, a part of it, and the crops of one size that the part is divided into.

    Attributes:
        rows: Of the height.
        columns: Of the width.
        tiles: Rows and columns of crops.
    """

    rows: Window
    columns: Window
    tiles: tuple[int, int] = (1, 1)

    @property
    def crops(self) -> int:
        """How many crops there are."""
        return self.tiles[0] * self.tiles[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a crop."""
        return self.rows.size // self.tiles[0], self.columns.size // self.tiles[1]

    def split(self, most: int) -> Iterator[Cut]:
        """Return cuts of `most` crops at most that make the same crops in the same order."""
        rows, columns = self.tiles
        high, wide = (1, most) if columns > most else (most // columns, columns)
        for row in range(0, rows, high):
            for column in range(0, columns, wide):
                tiles = min(high, rows - row), min(wide, columns - column)
                parts = _tiles(self.rows, self.size[0], row, tiles[0]), _tiles(self.columns, self.size[1], column, tiles[1])
                yield Cut(*parts, tiles)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture, and what is done to the whole of it before it is cut.

    Attributes:
        image: In RGB.
        resample: Pillow's number of the filter that it is resized with.
        before: Sizes (height, width) that it is resized to, one after the other.
    """

    image: Raster
    resample: int
    before: tuple[tuple[int, int], ...] = ()

    @property
    def steps(self) -> list[Cut]:
        """The sizes of `before` as cuts."""
        sizes = [size_of(self.image), *self.before]
        return [whole(size, resized) for size, resized in zip(sizes, self.before, strict=False)]


@dataclass(frozen=True, eq=False)
class Piece:
    """Crops of one picture."""

    picture: Picture
    cut: Cut


class Resizer(Protocol):
    """Cuts pieces on a device.

    Attributes:
        most: Crops that it is given at once.
    """

    most: int

    def takes(self, piece: Piece) -> bool:
        """Whether it can: otherwise the processor must."""
        ...


@dataclass(frozen=True)
class Uncut:
    """What stands for pixel values (C, 3, H, W) until a device has cut them."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, pieces: Sequence[Piece], resizer: Resizer | None) -> Uncut | None:
        """Return what a device is to cut, in pieces that it takes at once; None if it cannot cut all."""
        if resizer is None:
            return None
        # Half of what goes at once: parts of two pieces, and a thumbnail beside one, waste no run.
        most = resizer.most // 2 if any(piece.cut.crops > resizer.most for piece in pieces) else resizer.most
        small = tuple(Piece(piece.picture, cut) for piece in pieces for cut in piece.cut.split(most))
        return cls(small) if all(map(resizer.takes, small)) else None

    def __len__(self) -> int:
        return sum(piece.cut.crops for piece in self.pieces)

    def parts(self, at_once: int) -> list[Uncut]:
        """Return whole pieces together, of so many crops at most."""
        found: list[list[Piece]] = []
        count = at_once
        for piece in self.pieces:
            if count + piece.cut.crops > at_once:
                found.append([])
                count = 0
            found[-1].append(piece)
            count += piece.cut.crops
        return [Uncut(tuple(part)) for part in found]


def as_image(raster: Raster) -> Image.Image:
    """Return a picture as Pillow's."""
    return raster if isinstance(raster, Image.Image) else Image.fromarray(raster)


def size_of(raster: Raster) -> tuple[int, int]:
    """Return a picture's (height, width)."""
    return (raster.height, raster.width) if isinstance(raster, Image.Image) else raster.shape[:2]


def whole(size: tuple[int, int], resized: tuple[int, int]) -> Cut:
    """Return the cut that is all of a picture (height, width), resized."""
    return part(size, resized, (0, 0), resized)


def centred(size: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int], tiles: tuple[int, int] = (1, 1)) -> Cut:
    """Return the cut from the centre, or with black around it where that is larger.

    Args:
        size: The picture's (height, width).
        resized: What it is resized to.
        crop: (height, width) of all tiles.
        tiles: Rows and columns.
    """
    # Floor division of a negative difference puts the odd pixel of padding first, as processors that cut the centre do.
    begin = (resized[0] - crop[0]) // 2, (resized[1] - crop[1]) // 2
    return part(size, resized, begin, crop, tiles)


def part(
    size: tuple[int, int],
    resized: tuple[int, int],
    begin: tuple[int, int],
    crop: tuple[int, int],
    tiles: tuple[int, int] = (1, 1),
) -> Cut:
    """Return the cut of (height, width) `crop` that begins at a (row, column) of the resized picture."""
    rows, columns = (Window(*axis[:3], axis[2] + axis[3]) for axis in zip(size, resized, begin, crop, strict=True))
    return Cut(rows, columns, tiles)


def cut_pieces(pieces: Sequence[Piece]) -> list[Levels]:
    """Cut crops in Pillow.

    Returns:
        The crops of all pieces in order, levels (H, W, 3) each.
    """
    found: list[Levels] = []
    picture = None
    for piece in pieces:
        if piece.picture is not picture:
            picture, image = piece.picture, as_image(piece.picture.image)
            for height, width in picture.before:
                image = image.resize((width, height), Image.Resampling(picture.resample))
        found += _cut(image, piece.cut, Image.Resampling(piece.picture.resample))
    return found


def known_order() -> bool:
    """Whether it is known which axis this Pillow resizes first."""
    return order() is not None


def height_first(source: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether this Pillow resizes the height before the width, (width, height) to (width, height); in between it rounds."""
    rule = order()
    return rule is not None and ORDERS[rule](source, size)


def is_height_first(cut: Cut) -> bool:
    """Whether this Pillow resizes the height before the width; of those of which `known_order` is true."""
    return height_first((cut.columns.length, cut.rows.length), (cut.columns.resized, cut.rows.resized))


@lru_cache(maxsize=1)
def order() -> str | None:
    """Ask Pillow by which of `ORDERS` it goes: what pictures of noise become tells, since ringing is cut off between the axes.

    Returns:
        Its name; None where it goes by another.
    """
    # Not of numpy.random, whose import takes longer than all this.
    noise = (np.arange(210 * 48 * 3).reshape(210, 48, 3) ** 2 * 7919 % 65537 % 2 * 255).astype(np.uint8)
    left = list(ORDERS)
    for source, size in PROBES:
        image = Image.fromarray(np.ascontiguousarray(noise[: source[1], : source[0]]))
        made = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        steps = {False: (size[0], source[1]), True: (source[0], size[1])}
        found = {
            first: (made == image.resize(step, Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)).all()
            for first, step in steps.items()
        }
        left = [name for name in left if found[ORDERS[name](source, size)]]
    return left[0] if left else None


def resize(image: Image.Image, size: tuple[int, int], needed: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resize an image, leaving out what lies right of and below the needed part if that changes no level in it.

    Pillow computes the weights of output pixel i from i, the source's length, the start of the box and the scale, which is
    the box's length over the number of output pixels. A box from 0 to a whole pixel in the ratio of the whole image has the
    same scale to the last bit, and the filter reaches across its end. The left and the top are never left out: the start
    of the box is added to every position, and the sum is rounded.

    Args:
        image: The source.
        size: (width, height) of the whole image resized.
        needed: How many (columns, rows) are used, from the upper left; may be more than there are.
        resample: The filter.

    Returns:
        The upper left part of the whole image resized, at least as much of it as is needed.
    """
    part = _whole_steps(image.width, size[0], needed[0]), _whole_steps(image.height, size[1], needed[1])
    if not known_order() or height_first(image.size, part) != height_first(image.size, size):
        return image.resize(size, resample)
    end = part[0] * image.width // size[0], part[1] * image.height // size[1]
    return image.resize(part, resample, box=(0, 0, *end))


def _cut(image: Image.Image, cut: Cut, resample: Image.Resampling) -> list[Levels]:
    rows, columns = cut.rows, cut.columns
    if (columns.resized, rows.resized) != image.size:
        image = resize(image, (columns.resized, rows.resized), (columns.end, rows.end), resample)
    levels = np.asarray(image.crop((columns.begin, rows.begin, columns.end, rows.end)))
    (high, wide), (height, width) = cut.tiles, cut.size
    tiles = levels.reshape(high, height, wide, width, 3).swapaxes(1, 2)
    return list(tiles.reshape(-1, height, width, 3)) if cut.crops > 1 else [levels]


def _tiles(window: Window, size: int, first: int, count: int) -> Window:
    """Return the window of some tiles of a window."""
    begin = window.begin + first * size
    return Window(window.length, window.resized, begin, begin + count * size)


def _whole_steps(length: int, resized: int, needed: int) -> int:
    """Return the least number of output pixels, `needed` or more, that ends where a pixel of the source does."""
    # Pillow skips an axis that keeps its length, but not with a box; and a box is float32, which is exact up to 2^24.
    if needed >= resized or length == resized or length > 2**24:
        return resized
    step = resized // math.gcd(length, resized)
    return -(-needed // step) * step
