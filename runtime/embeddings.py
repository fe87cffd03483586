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
# The file begins with its header's length in 8 bytes; a header of one tensor has a hundred.
LENGTH, MAX_HEADER = 8, 1 << 20


class TokenRows(Protocol):
    """Looks the embeddings of token ids up."""

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.floating[Any]]:
        """Return what the decoder reads for them, (len(ids), W)."""
        ...


class TokenTable:
    """Rows of the decoder's token embedding, (V, D), read from a safetensors file as they are asked for.

    The library checks the file; the rows are then taken through a map of its last bytes, since a slice of the library's
    costs ten times as long a row, and the table is the file's only tensor.

    Args:
        path: The file.
        vocab_size: V, as the manifest has it.
        width: D, as the manifest has it.
        row_width: W, of what the decoder reads for a token: zeros stand behind the embedding. None is D.

    Raises:
        BundleError: The file cannot be read, or holds no token table of this model.
    """

    def __init__(self, path: Path, vocab_size: int, width: int, row_width: int | None = None) -> None:
        self._name = path.name
        self._behind = (row_width or width) - width
        try:
            with path.open("rb") as start:
                header = int.from_bytes(start.read(LENGTH), "little")
            if header > MAX_HEADER:
                raise ValueError(f"its header has {header} bytes")
            with safe_open(path, framework="numpy") as file:
                if list(file.keys()) != [TENSOR]:
                    raise ValueError(f"it does not hold {TENSOR} alone")
                table = file.get_slice(TENSOR)
                shape, dtype = table.get_shape(), table.get_dtype()
            if dtype not in DTYPES:
                raise ValueError(f"its dtype is {dtype}, which is none of {', '.join(DTYPES)}")
            if shape != [vocab_size, width]:
                raise ValueError(f"its shape is {shape}, where the model's is {[vocab_size, width]}")
            self._rows = np.memmap(path, DTYPES[dtype], mode="r", offset=LENGTH + header, shape=(vocab_size, width))
        except (SafetensorError, OSError, ValueError) as error:
            raise BundleError(f"the token table {path.name} cannot be read: {error}") from error

    def row(self, token: int) -> npt.NDArray[np.floating[Any]]:
        """Return a token's row (W,) as it is, for whoever asks `rows` for it too, which checks it, and has no time for that."""
        found: npt.NDArray[np.floating[Any]] = self._rows[token]
        return np.pad(found, (0, self._behind)) if self._behind else found

    def rows(self, ids: Sequence[int]) -> npt.NDArray[np.floating[Any]]:
        """Return the rows of token ids, (len(ids), W), their embeddings as they are stored.

        NumPy converts half precision at a few ns a number, which for a prompt is a millisecond: whoever needs fp32 converts.

        Raises:
            BundleError: A token without a row, or a row with a value that is not finite.
        """
        wanted = np.asarray(ids, dtype=np.int64)
        beyond = wanted[wanted >= len(self._rows)]
        if len(beyond):
            raise BundleError(
                f"the token table {self._name} ends at {len(self._rows) - 1}, and the prompt has token {beyond[0]}: "
                "the tokenizer is another model's; copy or export the bundle again"
            )
        rows = np.asarray(self._rows[wanted])
        if not _finite(rows):
            token = wanted[~np.isfinite(rows).all(axis=1)][0]
            raise BundleError(
                f"the token table {self._name} has a value for token {token} that is not finite (NaN or infinity): "
                "copy or export the bundle again"
            )
        return np.pad(rows, ((0, 0), (0, self._behind))) if self._behind else rows


def _finite(rows: npt.NDArray[np.floating[Any]]) -> bool:
    """Return whether there is neither NaN nor infinity, by the bits: in half precision NumPy's own is 30 times as slow.

    As integers the bits of floats are in the order of the numbers, infinity and NaN behind them: as signed ones those of the
    positive numbers, as unsigned ones those of the negative.
    """
    infinite = np.array([np.inf, -np.inf], rows.dtype)
    signed, unsigned = (np.dtype(f"{kind}{rows.itemsize}") for kind in "iu")
    highest = rows.view(signed).max(initial=-1), rows.view(unsigned).max(initial=0)
    return bool(highest[0] < infinite.view(signed)[0] and highest[1] < infinite.view(unsigned)[1])
