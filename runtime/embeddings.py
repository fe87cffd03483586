"""The token table, memory-mapped: only the rows that a prompt uses are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from leanvlm.runtime.errors import BundleError

TENSOR = "embed_tokens.weight"
DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


class TokenRows(Protocol):
    """Looks the embeddings of token ids up."""

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.floating[Any]]:
        """Return the embeddings, (len(ids), D)."""
        ...


class TokenTable:
    """Rows of the decoder's token embedding, (V, D), read from a safetensors file as they are asked for.

    The library checks the file; the rows are then taken through a map of its last bytes, since a slice of the library's
    costs ten times as long a row, and the table is the file's only tensor.

    Raises:
        BundleError: The file cannot be read or holds no token table.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy") as file:
                if list(file.keys()) != [TENSOR]:
                    raise ValueError(f"it does not hold {TENSOR} alone")
                table = file.get_slice(TENSOR)
                (vocab, width), dtype = table.get_shape(), DTYPES[table.get_dtype()]
            begin = path.stat().st_size - vocab * width * dtype.itemsize
            self._rows = np.memmap(path, dtype, mode="r", offset=begin, shape=(vocab, width))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise BundleError(f"{path.name} cannot be read: {error}") from error
        self.vocab_size, self.width = int(vocab), int(width)

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.floating[Any]]:
        """Return the embeddings of token ids, (len(ids), D), as they are stored.

        NumPy converts half precision at a few ns a number, which for a prompt is a millisecond: whoever needs fp32 converts.
        """
        return np.asarray(self._rows[np.asarray(ids, dtype=np.int64)])
