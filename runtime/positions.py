"""How the positions of a prompt are counted for the decoder's rotary embedding, and which of them see which.

With one axis an image's tokens count on as the text does. With three (M-RoPE, arXiv 2409.12191: time, height, width), text
has one number on all axes, an image's tokens have the image's start and their row and column in the grid, and text goes on
behind the longest side. `tests` compare with `get_rope_index` of transformers.

A position sees all before it. In some models the tokens of an image, or of the whole prompt, see those behind them too: then
the last row that a position sees is not its own, but the last of its image or of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.errors import ManifestError

Numbers = npt.NDArray[np.int64]
Visibility = Literal["causal", "blocks", "prefix"]


@dataclass(frozen=True)
class PositionRule:
    """How a family numbers a prompt.

    Attributes:
        kept: `compact` numbers the kept tokens in a row; `original` gives each the number that it has in the unpruned prompt.
        axes: How many coordinates a position has.
        image: `line`: tokens of a crop count on; `grid`: they have their row and column.
        visibility: `causal`: each position sees those up to its own; `blocks`: image tokens that stand together see each other;
            `prefix`: all of a prompt's see each other, and the answer's those up to their own.
    """

    kept: Literal["compact", "original"]
    axes: Literal[1, 3] = 1
    image: Literal["line", "grid"] = "line"
    visibility: Visibility = "causal"

    def __post_init__(self) -> None:
        """Check that the fields go together; raises ManifestError."""
        if (self.axes == 3) != (self.image == "grid") or (self.image == "grid" and self.kept == "compact"):
            raise ManifestError(f"{self.axes} axes with image {self.image} and {self.kept} positions do not go together")

    def width(self, shape: CropShape, kept: int) -> int:
        """Return how far text behind a crop is from its start, if `kept` of its tokens are there."""
        if self.image == "grid":
            return max(shape.grid)
        return kept if self.kept == "compact" else shape.tokens

    def text(self, start: int, count: int) -> Numbers:
        """Return the numbers (axes, count) of text that begins at `start`."""
        return np.tile(start + np.arange(count), (self.axes, 1))

    def crop(self, start: int, shape: CropShape, indices: Numbers) -> Numbers:
        """Return the numbers (axes, K) of a crop's kept tokens.

        Args:
            start: Number of the crop's first token.
            shape: The crop's.
            indices: (K,), which of its N tokens are kept, ascending.
        """
        if self.image == "grid":
            rows, columns = np.divmod(indices - shape.leading, shape.grid[1])
            return start + np.stack([np.zeros_like(rows), rows, columns])
        return (start + (np.arange(len(indices)) if self.kept == "compact" else indices))[None]

    def last_seen(self, runs: Sequence[tuple[int, bool]]) -> Numbers:
        """Return the last row of a prompt that each of its positions (S,) sees.

        Args:
            runs: How many positions each run has, and whether they are image tokens.
        """
        ends = np.cumsum([count for count, _ in runs], dtype=np.int64)
        seen = np.arange(ends[-1] if runs else 0)
        if self.visibility == "prefix":
            return np.full_like(seen, len(seen) - 1)
        for end, (count, image) in zip(ends, runs, strict=True):
            if image and self.visibility == "blocks":
                seen[end - count : end] = end - 1
        return seen


def as_input(positions: Numbers) -> Numbers:
    """Return positions (axes, S) as a decoder takes them: (1, S), or with three axes (3, 1, S)."""
    return positions if len(positions) == 1 else positions[:, None]
