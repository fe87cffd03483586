"""Putting image embeddings between the text's, and numbering the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.answer import Pruning

Embeddings = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ImageFeatures:
    """One image, encoded: embeddings (K, D) and what pruning did."""

    embeddings: Embeddings
    pruning: Pruning


@dataclass(frozen=True)
class Prompt:
    """What the decoder reads first.

    Attributes:
        embeddings: (S, D), text and kept image tokens in order.
        positions: (S,) int64, ascending, the place of each for the decoder's rotary embedding.
        next_position: Where the answer's first token goes; with original positions it is more than S, the cache's length.
    """

    embeddings: Embeddings
    positions: npt.NDArray[np.int64]
    next_position: int


def splice(segments: Sequence[Embeddings], images: Sequence[ImageFeatures], positions: str) -> Prompt:
    """Join the embeddings of text segments and of the images between them.

    Args:
        segments: The text's embeddings (T, D), one more than there are images; a segment may be empty.
        images: The images, in order.
        positions: `compact` counts what is there; `original` counts dropped image tokens too, so every kept one has the
            place that it has in the unpruned sequence.
    """
    parts, places, at = [segments[0]], [np.arange(len(segments[0]))], len(segments[0])
    for image, text in zip(images, segments[1:], strict=True):
        parts += [image.embeddings, text]
        if positions == "original":
            kept, width = image.pruning.indices, image.pruning.total
        else:
            kept, width = np.arange(len(image.embeddings)), len(image.embeddings)
        places += [at + kept, at + width + np.arange(len(text))]
        at += width + len(text)
    return Prompt(np.concatenate(parts), np.concatenate(places).astype(np.int64), at)
