"""What a session need not do again: pictures that it has encoded, and the beginning of a prompt that a cache still holds."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.layout import ImageFeatures
from leanvlm.runtime.preprocess import ImageSource, load_image
from leanvlm.runtime.prompt import Prompt

MEGABYTE = 2**20
# 130 pictures of 64 tokens of a 7B model in half precision; unpruned in fp32, 7.
CACHE_MB = 64.0
# Larger files are not read twice to find out whether they are known.
MAX_FILE = 64 * MEGABYTE


def content_key(image: ImageSource) -> Hashable | None:
    """Return what tells a picture from every other: a checksum of its file's bytes, or of its levels.

    Returns:
        None where it cannot be had: an open file, which can be read once, or what is no picture.
    """
    if isinstance(image, (str, Path)):
        try:
            if Path(image).stat().st_size > MAX_FILE:
                return None
            image = Path(image).read_bytes()
        except (OSError, ValueError):
            return None
    if isinstance(image, (bytes, bytearray, memoryview)):
        return "file", hashlib.sha256(image).digest()
    if hasattr(image, "read"):
        return None
    try:
        # 1280 x 960 levels take 2.2 ms where they lie, and 5 by way of an image.
        is_levels = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        levels = np.ascontiguousarray(image if is_levels else load_image(image))
    except InputError:
        return None
    return "levels", levels.shape, hashlib.sha256(levels.data).digest()


class ImageCache:
    """Encoded pictures, those that were asked for last; threads may share it.

    Args:
        limit: Bytes of embeddings and of what pruning did that are kept at most; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._held: OrderedDict[Hashable, ImageFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> ImageFeatures | None:
        """Return a picture, which then was asked for last; or None."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: Hashable, image: ImageFeatures) -> None:
        """Keep a picture, in place of those that nobody asked for longest."""
        size = _bytes(image)
        with self._lock:
            if size > self.limit or key in self._held:
                return
            self._held[key] = image
            self.bytes += size
            while self.bytes > self.limit:
                self.bytes -= _bytes(self._held.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._held.clear()
            self.bytes = 0


def _bytes(image: ImageFeatures) -> int:
    # On a device they may be narrower.
    told = sum(crop.pruning.indices.nbytes + crop.pruning.attention.nbytes for crop in image.crops)
    return told + sum(4 * int(np.prod(crop.embeddings.shape)) for crop in image.crops)


@dataclass
class Held:
    """What the rows of a cache were made of, from the first on.

    Attributes:
        keys: Of each row the token, or which row of which picture; see `Prompt.keys`.
        positions: Of each row the position on every axis.
        last_seen: Of each row the last one that it saw.
        is_known: False once somebody had the cache itself, and may have filled it with anything.
    """

    keys: list[Hashable] = field(default_factory=list)
    positions: list[tuple[int, ...]] = field(default_factory=list)
    last_seen: list[int] = field(default_factory=list)
    is_known: bool = True

    def __len__(self) -> int:
        return len(self.keys)

    def shared(self, prompt: Prompt) -> int:
        """Return how many rows a prompt begins with that are held; at least one of the prompt is not counted.

        None of them may see a row behind them: that would be another one now.
        """
        if not self.is_known:
            return 0
        rows = zip(prompt.keys(), prompt.positions.T.tolist(), prompt.last_seen.tolist(), strict=True)
        held = zip(self.keys, self.positions, self.last_seen, strict=True)
        count = 0
        for (key, position, seen), old in zip(rows, held, strict=False):
            if (key, tuple(position), seen) != old:
                break
            count += 1
        count = min(count, len(prompt) - 1)
        seen_last = prompt.last_seen[:count]
        while count and (beyond := np.flatnonzero(seen_last[:count] >= count)).size:
            count = int(beyond[0])
        return count

    def cut(self, count: int) -> None:
        """Forget all but the first rows."""
        for part in (self.keys, self.positions, self.last_seen):
            del part[count:]

    def add(self, keys: Sequence[Hashable], positions: npt.NDArray[np.int64], last_seen: Sequence[int]) -> None:
        """Note rows that were appended; positions are (axes, S)."""
        self.keys += keys
        self.positions += [tuple(position) for position in positions.T.tolist()]
        self.last_seen += last_seen


@dataclass(frozen=True)
class SavedRows:
    """The first rows of a cache, in the processor's memory: of each layer's key and value, and states."""

    rows: Sequence[npt.NDArray[Any]]
    states: Sequence[npt.NDArray[Any]] = ()
