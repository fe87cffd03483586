"""What an image becomes in a prompt: the text around its crops, and the order in which its tokens stand.

The text is written into the prompt before it is tokenised, as transformers' processors do, since tokens may merge across the
seam: where a line break ends a row of tiles and another begins the whole picture, the two may be one token.

Tiles may be laid out as one picture, line by line across them: each line then ends with a row that the model learned, padding
is left out, and of a pruned picture only the lines of which something is kept have an end. Or a token of the vocabulary stands
between the lines of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.answer import ImageTokens, Pruning
from leanvlm.runtime.crops import Arrangement, CropShape, shown_tokens
from leanvlm.runtime.errors import ManifestError
from leanvlm.runtime.records import Size

Embeddings = npt.NDArray[np.floating[Any]]
Numbers = npt.NDArray[np.int64]

SHRINK_ABOVE = 1.1
"""How many times longer than its limit the side of an unpruned picture must be to be shrunk, in `pack_image_features`."""

MAX_MARK = 256
"""Characters of a text around crops; the longest of a published model has 48."""


class DeviceTensor(Protocol):
    """Embeddings (K, D) on a device; `numpy.asarray` brings them to the processor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, D)."""
        ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return them as an array."""
        ...


@dataclass(frozen=True)
class CropFeatures:
    """One crop, encoded: embeddings (K, D) and what pruning did.

    Attributes:
        key: Equal to that of no other crop, also of one that was made of this one.
    """

    embeddings: Embeddings | DeviceTensor
    pruning: Pruning
    key: object = field(default_factory=object, init=False, repr=False)


@dataclass(frozen=True)
class ImageFeatures:
    """One image, encoded: its crops in order, and how it was cut."""

    crops: tuple[CropFeatures, ...]
    arrangement: Arrangement = field(default_factory=Arrangement)


@dataclass(frozen=True)
class Layout:
    """What an image becomes in a prompt.

    Attributes:
        written: What a chat template writes for an image, where that is not the image token itself.
        before: Text before all of its crops.
        after: Text behind them.
        before_tile: Text before each tile; `{row}` and `{column}` in it are the tile's, counted from 1.
        after_row: Text behind each row of tiles.
        before_thumbnail: Text before the crop that shows all of an image beside its tiles.
        before_whole: Text before the crop of an image that has no tiles.
        mosaic: The tokens of all tiles stand line by line, as in one picture, instead of tile by tile.
        row_end: Name of the extra row that ends each such line.
        line_break: Text of the token that stands between the lines of a crop's tokens, where a model has one; of a pruned crop
            between those of which something is kept.
        limit: Of a mosaic that no pruning has touched: the tiles that its tokens may be as many as; more are interpolated to
            about as many.
    """

    before: str = ""
    after: str = ""
    before_tile: str = ""
    after_row: str = ""
    before_thumbnail: str = ""
    before_whole: str = ""
    mosaic: bool = False
    row_end: str | None = None
    line_break: str = ""
    limit: Size | None = None
    written: str = ""

    def __post_init__(self) -> None:
        """Check the texts' lengths, each of which may stand in a prompt hundreds of times; raises ManifestError."""
        if any(len(text) > MAX_MARK for text in self.texts):
            raise ManifestError(f"layout has a text of more than {MAX_MARK} characters")
        if self.line_break and (self.mosaic or self.row_end is not None):
            raise ManifestError("line_break is for crops by themselves: it goes with neither mosaic nor row_end")

    @property
    def marks(self) -> tuple[str, ...]:
        """All texts around crops."""
        tiles = (self.before_tile, self.after_row, self.before_thumbnail)
        return (self.before, self.after, *tiles, self.before_whole, self.line_break)

    @property
    def texts(self) -> tuple[str, ...]:
        """The same, and what is written for an image."""
        return (self.written, *self.marks)

    def runs(self, arrangement: Arrangement) -> int:
        """Return how many runs of image tokens an image has."""
        rows, columns = arrangement.tiles
        return (1 if self.mosaic and rows else max(rows * columns, 1)) + (arrangement.thumbnail != "none")

    def text(self, arrangement: Arrangement, token: str) -> str:
        """Return an image's text, with one image token for each of its runs."""
        rows, columns = arrangement.tiles
        if not rows:
            return self.before + self.before_whole + token + self.after
        thumbnail = "" if arrangement.thumbnail == "none" else self.before_thumbnail + token
        tiles = token
        if not self.mosaic:
            marks = [[self._mark(row, column) + token for column in range(columns)] for row in range(rows)]
            tiles = "".join("".join(row) + self.after_row for row in marks)
        parts = (thumbnail, tiles) if arrangement.thumbnail == "first" else (tiles, thumbnail)
        return self.before + "".join(parts) + self.after

    def _mark(self, row: int, column: int) -> str:
        return self.before_tile.replace("{row}", str(row + 1)).replace("{column}", str(column + 1))

    def expand(self, text: str, token: str, images: Sequence[Arrangement]) -> str:
        """Replace what is written for images in a text, as many times as there are images, by what they become."""
        first, *others = text.split(self.written or token)
        return first + "".join(self.text(image, token) + other for image, other in zip(images, others, strict=True))


@dataclass(frozen=True)
class ImageRun:
    """Image tokens that stand together in a prompt.

    Attributes:
        crops: Whose embeddings.
        rows: (k,), for each its row among these crops' rows one behind another, or -1 for the end of a line.
        shape: Of what they are the kept tokens: a crop, a picture with the ends of its lines as its last column, or all in one
            line.
        indices: (k,), which of its tokens they are, ascending.
        placeholders: Tokens that transformers' processor writes for them, as for an unpruned image.
        broken: Of these the image tokens before each that is the end of a line; 0 where all are image tokens.
    """

    crops: tuple[CropFeatures, ...]
    rows: Numbers
    shape: CropShape
    indices: Numbers
    placeholders: int
    broken: int = 0

    @property
    def ends(self) -> int:
        """How many of them end a line."""
        return int((self.rows < 0).sum())

    @property
    def kept(self) -> int:
        """How many of them are image tokens."""
        return len(self.rows) - self.ends

    def written(self, image_token_id: int, line_end: int) -> list[int]:
        """Return the tokens that transformers' processor writes for an unpruned image."""
        if not self.broken:
            return [image_token_id] * self.placeholders
        line = [image_token_id] * self.broken + [line_end]
        return (line * (self.placeholders // len(line) + 1))[: self.placeholders]


def image_runs(image: ImageFeatures, layout: Layout) -> list[ImageRun]:
    """Return an encoded image's runs, one for each image token of its text."""
    arrangement, crops = image.arrangement, image.crops
    if layout.line_break:
        return [_broken_run(crop) for crop in crops]
    tiles = arrangement.tiles[0] * arrangement.tiles[1]
    if not tiles or not layout.mosaic:
        return [_crop_run(crop, ended=layout.row_end is not None and not tiles) for crop in crops]
    first = int(arrangement.thumbnail == "first")
    mosaic = _mosaic_run(crops[first : first + tiles], arrangement, layout)
    others = [_crop_run(crop, ended=False) for crop in (*crops[:first], *crops[first + tiles :])]
    return [*others, mosaic] if first else [mosaic, *others]


def image_tokens(image: ImageFeatures, layout: Layout) -> ImageTokens:
    """Count the tokens of an encoded image in a prompt; the ends of lines are not the image's."""
    first = image.crops[0].pruning
    # The kept tokens are chosen of all; only those of an unpruned image are interpolated to fewer.
    limit = layout.limit if first.kept == first.total else None
    shape, plain = first.shape, replace(layout, row_end=None, line_break="", limit=limit)
    total = least_positions(image.arrangement, plain, shape, shape.tokens, "compact")
    # An unpruned picture may be interpolated, which takes long.
    kept = total if first.kept == first.total else sum(run.kept for run in image_runs(image, layout))
    return ImageTokens(kept, total, len(image.crops), image.arrangement.tiles)


def least_positions(arrangement: Arrangement, layout: Layout, shape: CropShape, budget: int, kept: str) -> int:
    """Return the least positions that the runs of an image take together, whatever is kept of it.

    Args:
        arrangement: How it is cut.
        layout: What it becomes.
        shape: Of its crops.
        budget: Tokens kept of a crop.
        kept: How positions are counted: `compact` or `original`.
    """
    whole = budget >= shape.tokens
    tiles = arrangement.tiles[0] * arrangement.tiles[1]
    single = min(budget, shape.tokens) if kept == "compact" else shape.tokens
    if layout.line_break:
        # As few lines as hold them.
        return arrangement.crops * (single + -(-single // shape.grid[1]) - 1)
    if not tiles or not layout.mosaic:
        return arrangement.crops * single + (layout.row_end is not None and not tiles)
    picture = _picture_shape(arrangement, layout, shape, whole)
    if whole or kept == "original":
        return (arrangement.crops - tiles) * single + picture.tokens
    # Of a crop with fewer tokens that show the image all of them are kept; each line may have its end besides.
    return int(np.minimum(shown_tokens(arrangement, shape).sum(axis=1), budget).sum())


def _crop_run(crop: CropFeatures, ended: bool) -> ImageRun:
    """Return the run of one crop, with the end of a line behind it or not."""
    pruning = crop.pruning
    rows, indices, shape = np.arange(pruning.kept), pruning.indices, pruning.shape
    if ended:
        shape = replace(shape, grid=(1, shape.tokens + 1 - shape.leading))
        rows, indices = np.append(rows, -1), np.append(indices, pruning.total)
    return ImageRun((crop,), rows, shape, indices, shape.tokens)


def _broken_run(crop: CropFeatures) -> ImageRun:
    """Return the run of one crop with breaks between its lines, or between those of which something is kept."""
    pruning, (rows, columns) = crop.pruning, crop.pruning.shape.grid
    line, place = np.divmod(pruning.indices, columns)
    broken = np.unique(line)[:-1]
    indices = np.concatenate([line * (columns + 1) + place, broken * (columns + 1) + columns])
    source = np.concatenate([np.arange(pruning.kept), np.full(len(broken), -1)])
    order, count = np.argsort(indices), rows * (columns + 1) - 1
    return ImageRun((crop,), source[order], replace(pruning.shape, grid=(1, count)), indices[order], count, columns)


def _mosaic_run(tiles: tuple[CropFeatures, ...], arrangement: Arrangement, layout: Layout) -> ImageRun:
    """Return the run of tiles laid out as one picture."""
    shape = tiles[0].pruning.shape
    pruned = any(tile.pruning.kept < tile.pruning.total for tile in tiles)
    picture = _picture_shape(arrangement, layout, shape, whole=not pruned)
    row, column = _cells(tiles, arrangement)
    top, bottom, left, right = _inner(arrangement, shape)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    source, line, place = np.flatnonzero(inside), row[inside] - top, column[inside] - left
    ended = layout.row_end is not None
    columns = picture.grid[1] - ended
    if (bottom - top, right - left) != (picture.grid[0], columns):
        order = np.lexsort((place, line))
        tiles = (_shrunk(tiles, source[order], (bottom - top, right - left), picture, columns),)
        line, place = np.divmod(np.arange(picture.grid[0] * columns), max(columns, 1))
        source = np.arange(len(line))
    indices = line * picture.grid[1] + place
    if ended:
        # Unpruned all have one, even of a picture so narrow that they hold nothing else.
        lines = np.unique(line) if pruned else np.arange(picture.grid[0])
        ends = lines * picture.grid[1] + columns
        indices, source = np.concatenate([indices, ends]), np.concatenate([source, np.full(len(ends), -1)])
    order = np.argsort(indices)
    placeholders = _picture_shape(arrangement, layout, shape, whole=True).tokens
    return ImageRun(tiles, source[order], picture, indices[order], placeholders)


def _cells(tiles: Sequence[CropFeatures], arrangement: Arrangement) -> tuple[Numbers, Numbers]:
    """Return row and column of all kept tokens in the grid that the tiles make together."""
    rows, columns = [], []
    for at, tile in enumerate(tiles):
        height, width = tile.pruning.shape.grid
        row, column = np.divmod(tile.pruning.indices, width)
        rows.append(row + at // arrangement.tiles[1] * height)
        columns.append(column + at % arrangement.tiles[1] * width)
    return np.concatenate(rows), np.concatenate(columns)


def _inner(arrangement: Arrangement, shape: CropShape) -> tuple[int, int, int, int]:
    """Return what `Arrangement.inner` means, where it is None too."""
    (rows, columns), (height, width) = arrangement.tiles, shape.grid
    return arrangement.inner or (0, rows * height, 0, columns * width)


def _picture_shape(arrangement: Arrangement, layout: Layout, shape: CropShape, whole: bool) -> CropShape:
    """Return the shape of tiles as one picture, with the ends of its lines; unpruned it may be shrunk."""
    top, bottom, left, right = _inner(arrangement, shape)
    height, width = bottom - top, right - left
    if whole and layout.limit is not None:
        ratio = math.sqrt(height * width / (layout.limit * shape.grid[0] ** 2))
        if ratio > SHRINK_ABOVE:
            height, width = max(int(height // ratio), 1), max(int(width // ratio), 1)
    return CropShape(shape.pixels, (height, width + (layout.row_end is not None)))


def _shrunk(
    tiles: Sequence[CropFeatures], source: Numbers, size: tuple[int, int], picture: CropShape, columns: int
) -> CropFeatures:
    """Interpolate the tokens of unpruned tiles, (rows, columns) = `size`, to those of a smaller picture."""
    rows = np.concatenate([np.asarray(tile.embeddings, np.float32) for tile in tiles])[source]
    grid = rows.reshape(*size, -1)
    for axis, length in enumerate((picture.grid[0], columns)):
        low, high, share = _between(size[axis], length)
        share = share.reshape([-1 if at == axis else 1 for at in range(3)])
        grid = grid.take(low, axis) * (1 - share) + grid.take(high, axis) * share
    count = picture.grid[0] * columns
    shape = CropShape(picture.pixels, (picture.grid[0], columns))
    first = tiles[0].pruning
    pruning = replace(first, kept=count, indices=np.arange(count), shape=shape, attention=np.zeros(count, np.float32))
    return CropFeatures(grid.reshape(count, -1), pruning)


def _between(length: int, wanted: int) -> tuple[Numbers, Numbers, npt.NDArray[np.float32]]:
    """Return for each of the wanted points its two neighbours among `length`, and the second's share, as bilinear does."""
    at = np.maximum((np.arange(wanted, dtype=np.float32) + np.float32(0.5)) * np.float32(length / wanted) - np.float32(0.5), 0)
    low = np.minimum(at.astype(np.int64), length - 1)
    return low, np.minimum(low + 1, length - 1), at - low.astype(np.float32)
