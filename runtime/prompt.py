"""A prompt: runs of text and of image tokens, and how they become rows, positions and embeddings.

Everything in a prompt is a row of a table: the text's tokens and a family's extra rows (such as one that ends a line) are
rows of the token table, the image tokens those that the vision graphs returned. A prompt is a plan: which row stands at
each position. The decoder carries it out where the embeddings are, in NumPy or on a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.embeddings import TokenRows
from leanvlm.runtime.layout import CropFeatures, ImageFeatures, ImageRun, Layout, image_runs
from leanvlm.runtime.positions import PositionRule

Run = tuple[int, ...] | ImageRun
"""Token ids, or kept image tokens that stand together."""


@dataclass(frozen=True)
class Prompt:
    """What the decoder reads first.

    Attributes:
        text: (T, D), the rows of the token table, in order.
        crops: The crops of all images, in order.
        index: (S,) int64, for each element of the prompt its row among the text's rows followed by the crops'.
        positions: (axes, S) int64, the position of each element for the decoder's rotary embedding.
        next_position: Where the answer's first token goes; it may be more than S, the cache's length.
        last_seen: (S,) int64, the last row of the prompt that each element sees.
        ids: The tokens as transformers' processor writes them, all placeholders of an image; for generation settings.
        listed: (T,), which row of the token table each row of text is.
    """

    text: npt.NDArray[np.floating[Any]]
    crops: tuple[CropFeatures, ...]
    index: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    next_position: int
    last_seen: npt.NDArray[np.int64]
    ids: tuple[int, ...] = ()
    listed: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return S, the rows that the prompt takes."""
        return len(self.index)

    def embeddings(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return the prompt itself, (S, D), in the processor's memory."""
        rows = [np.asarray(part, dtype) for part in (self.text, *(crop.embeddings for crop in self.crops))]
        return np.concatenate(rows)[self.index]

    def keys(self) -> list[Hashable]:
        """Return what stands at each place (S,): a row of the token table, or which row of which crop's embeddings."""
        # Rows of no known tokens are equal to nothing.
        named: list[Hashable] = [*self.listed] if len(self.listed) == len(self.text) else [object() for _ in self.text]
        for crop in self.crops:
            named += [(crop.key, row) for row in range(crop.embeddings.shape[0])]
        return [named[row] for row in self.index]

    def tail(self, start: int) -> Prompt:
        """Return the prompt without its first places, and without text and crops that only those used."""
        index, text = self.index[start:], len(self.text)
        first = int(index[index < text].min(initial=text))
        starts = text + np.cumsum([0, *(crop.embeddings.shape[0] for crop in self.crops)])
        crop = int(np.searchsorted(starts, index[index >= text].min(initial=starts[-1]), side="right")) - 1
        moved = np.where(index < text, index - first, index - starts[crop] + text - first)
        return Prompt(
            self.text[first:],
            self.crops[crop:],
            moved,
            self.positions[:, start:],
            self.next_position,
            self.last_seen[start:],
            self.ids,
            self.listed[first:],
        )


def compose(ids: Sequence[int], image_token_id: int, images: Sequence[ImageFeatures], layout: Layout) -> list[Run]:
    """Put images where their tokens are.

    Args:
        ids: Token ids with one image token for each run of image tokens, as `Layout.expand` has them.
        image_token_id: The image token.
        images: The images, in order.
        layout: What one image becomes.

    Returns:
        The runs, none of them of no ids.
    """
    runs: list[Run] = []
    text: list[int] = []
    waiting = iter([run for image in images for run in image_runs(image, layout)])
    for token in ids:
        if token != image_token_id:
            text.append(token)
            continue
        if text:
            runs.append(tuple(text))
        runs.append(next(waiting))
        text = []
    return [*runs, tuple(text)] if text else runs


def assemble(runs: Sequence[Run], table: TokenRows, rule: PositionRule, image_token_id: int, line_end: int = -1) -> Prompt:
    """Plan a prompt.

    Args:
        runs: Text and crops, in order.
        table: Rows of the text's tokens.
        rule: How positions are counted.
        image_token_id: Stands for each of a crop's N tokens in `ids`.
        line_end: Row of the table that ends a line of image tokens, where the layout has one; of a token its id.
    """
    listed: list[int] = []
    for run in runs:
        listed += run if isinstance(run, tuple) else [line_end] * run.ends
    text = table.rows(listed)
    row, crop_row, position = 0, len(text), 0
    index: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
    positions = [np.empty((rule.axes, 0), np.int64)]
    counts = [(len(run), False) if isinstance(run, tuple) else (len(run.rows), True) for run in runs]
    ids: list[int] = []
    crops: list[CropFeatures] = []
    for run, (count, _) in zip(runs, counts, strict=True):
        if isinstance(run, tuple):
            index.append(row + np.arange(count))
            positions.append(rule.text(position, count))
            row, position = row + count, position + count
            ids += run
            continue
        rows = crop_row + run.rows
        rows[run.rows < 0] = row + np.arange(run.ends)
        index.append(rows)
        positions.append(rule.crop(position, run.shape, run.indices))
        row, position = row + run.ends, position + rule.width(run.shape, count)
        crop_row += sum(crop.embeddings.shape[0] for crop in run.crops)
        crops += run.crops
        ids += run.written(image_token_id, line_end)
    numbers = np.concatenate(positions, axis=1)
    return Prompt(
        text, tuple(crops), np.concatenate(index), numbers, position, rule.last_seen(counts), tuple(ids), tuple(listed)
    )
