"""Putting image embeddings between the text's, and numbering the result.

A prompt is a plan: which row of the text's or the images' embeddings stands at each place. The decoder carries it out where
the embeddings are, in NumPy or on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.answer import Pruning

Embeddings = npt.NDArray[np.floating[Any]]


class Rows(Protocol):
    """Embeddings (K, D) on a device; `numpy.asarray` brings them to the processor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(K, D)."""
        ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """Return them as an array."""
        ...


@dataclass(frozen=True)
class ImageFeatures:
    """One image, encoded: embeddings (K, D) and what pruning did."""

    embeddings: Embeddings | Rows
    pruning: Pruning


@dataclass(frozen=True)
class Prompt:
    """What the decoder reads first.

    Attributes:
        text: (T, D), the text's embeddings in order.
        images: The images, in order.
        places: (S,) int64, for each place of the prompt its row among the text's rows followed by the images'.
        positions: (S,) int64, ascending, the place of each for the decoder's rotary embedding.
        next_position: Where the answer's first token goes; with original positions it is more than S, the cache's length.
        ids: The tokens as transformers' processor writes them, each image all of its N placeholders; for generation settings.
    """

    text: Embeddings
    images: tuple[ImageFeatures, ...]
    places: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    next_position: int
    ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return S, the places that the prompt takes."""
        return len(self.places)

    def embeddings(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return the prompt itself, (S, D), in the processor's memory."""
        rows = [np.asarray(part, dtype) for part in (self.text, *(image.embeddings for image in self.images))]
        return np.concatenate(rows)[self.places]


def splice(segments: Sequence[Embeddings], images: Sequence[ImageFeatures], positions: str) -> Prompt:
    """Plan a prompt of text segments and the images between them.

    Args:
        segments: The text's embeddings (T, D), one more than there are images; a segment may be empty.
        images: The images, in order.
        positions: `compact` counts what is there; `original` counts dropped image tokens too, so every kept one has the
            place that it has in the unpruned sequence.
    """
    text = np.concatenate(segments)
    # Next free row of the text, of the images behind it, and next free position.
    row, image_row, at = len(segments[0]), len(text), len(segments[0])
    rows, numbers = [np.arange(row)], [np.arange(at)]
    for image, segment in zip(images, segments[1:], strict=True):
        kept = image.embeddings.shape[0]
        if positions == "original":
            offsets, width = image.pruning.indices, image.pruning.total
        else:
            offsets, width = np.arange(kept), kept
        rows += [image_row + np.arange(kept), row + np.arange(len(segment))]
        numbers += [at + offsets, at + width + np.arange(len(segment))]
        row, image_row, at = row + len(segment), image_row + kept, at + width + len(segment)
    places, order = np.concatenate(rows).astype(np.int64), np.concatenate(numbers).astype(np.int64)
    return Prompt(text, tuple(images), places, order, at)
