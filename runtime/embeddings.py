"""The token table, memory-mapped: only the rows that a prompt uses are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from leanvlm.runtime.errors import BundleError

TENSOR = "embed_tokens.weight"


class TokenTable:
    """Rows of the decoder's token embedding, (V, D), read from a safetensors file as they are asked for.

    Raises:
        BundleError: The file cannot be read or holds no token table.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._rows = safe_open(path, framework="numpy").get_slice(TENSOR)
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path.name} cannot be read: {error}") from error
        self.vocab_size, self.width = self._rows.get_shape()

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the embeddings of token ids, (len(ids), D) in fp32."""
        out = np.empty((len(ids), self.width), dtype=np.float32)
        for row, token in enumerate(ids):
            out[row] = self._rows[token : token + 1][0]
        return out
