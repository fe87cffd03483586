"""A prompt: runs of text and of image tokens, and how they become rows, positions and embeddings.

Everything in a prompt is a row of a table: the text's tokens and a family's extra rows (such as one that ends a line) are
rows of the token table, the image tokens those that the vision graphs returned. A prompt is a plan: which row stands at
each position. The decoder carries it out where the embeddings are, in NumPy or on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.embeddings import TokenRows
from leanvlm.runtime.positions import PositionRule

Embeddings = npt.NDArray[np.floating[Any]]


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
    """One crop, encoded: embeddings (K, D) and what pruning did."""

    embeddings: Embeddings | DeviceTensor
    pruning: Pruning


@dataclass(frozen=True)
class ImageFeatures:
    """One image, encoded: its crops, in the order in which the prompt has them."""

    crops: tuple[CropFeatures, ...]


@dataclass(frozen=True)
class Layout:
    """What an image becomes in a prompt: these token ids, then its crops, then those.

    Attributes:
        before: Token ids before its crops.
        after: Token ids behind them.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What the decoder reads first.

    Attributes:
        text: (T, D), the text's embeddings in order.
        crops: The crops of all images, in order.
        index: (S,) int64, for each element of the prompt its row among the text's rows followed by the crops'.
        positions: (axes, S) int64, the position of each element for the decoder's rotary embedding.
        next_position: Where the answer's first token goes; it may be more than S, the cache's length.
        ids: The tokens as transformers' processor writes them, each crop all of its N placeholders; for generation settings.
    """

    text: Embeddings
    crops: tuple[CropFeatures, ...]
    index: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    next_position: int
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return S, the rows that the prompt takes."""
        return len(self.index)

    def embeddings(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return the prompt itself, (S, D), in the processor's memory."""
        rows = [np.asarray(part, dtype) for part in (self.text, *(crop.embeddings for crop in self.crops))]
        return np.concatenate(rows)[self.index]


Run = tuple[int, ...] | CropFeatures
"""Token ids, or the kept tokens of one crop."""


def compose(ids: Sequence[int], image_token_id: int, images: Sequence[ImageFeatures], layout: Layout) -> list[Run]:
    """Put images where their tokens are.

    Args:
        ids: Token ids with one image token for each image.
        image_token_id: The image token.
        images: The images, in order.
        layout: What one image becomes.

    Returns:
        The runs, none of them of no ids.
    """
    runs: list[Run] = []
    text: list[int] = []
    waiting: Iterator[ImageFeatures] = iter(images)
    for token in ids:
        if token != image_token_id:
            text.append(token)
            continue
        if text or layout.before:
            runs.append((*text, *layout.before))
        runs += next(waiting).crops
        text = list(layout.after)
    return [*runs, tuple(text)] if text else runs


def assemble(runs: Sequence[Run], table: TokenRows, rule: PositionRule, image_token_id: int) -> Prompt:
    """Plan a prompt.

    Args:
        runs: Text and crops, in order.
        table: Rows of the text's tokens.
        rule: How positions are counted.
        image_token_id: Stands for each of a crop's N tokens in `ids`.
    """
    texts = [run for run in runs if isinstance(run, tuple)]
    text = table.rows([token for run in texts for token in run])
    crops = tuple(run for run in runs if not isinstance(run, tuple))
    row, crop_row, position = 0, len(text), 0
    index: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    positions = [np.empty((rule.axes, 0), np.int64)]
    ids: list[int] = []
    for run in runs:
        if isinstance(run, tuple):
            index.append(row + np.arange(len(run)))
            positions.append(rule.text(position, len(run)))
            row, position = row + len(run), position + len(run)
            ids += run
            continue
        pruning = run.pruning
        index.append(crop_row + np.arange(pruning.kept))
        positions.append(rule.crop(position, pruning.shape, pruning.indices))
        crop_row, position = crop_row + pruning.kept, position + rule.width(pruning.shape, pruning.kept)
        ids += [image_token_id] * pruning.total
    return Prompt(text, crops, np.concatenate(index), np.concatenate(positions, axis=1), position, tuple(ids))
