"""The weights with which Pillow resizes an axis, for a device that computes in floating point and is still exact.

Pillow makes an output level of the source's levels under a filter: their sum with whole weights of 22 bits behind the point and
half a level, shifted down and clipped, first along one axis and then, from the clipped levels, along the other. Its weights
are not computed again here but asked for. A picture of 32-bit whole numbers is resized with the same weights and rounded to
whole numbers, so one that is black but for pixels of 2^22 becomes the weights themselves, whatever the processor and Pillow's
release make of the last bit. Bright pixels that are further apart than the filter reaches need not wait for each other.

A weight is then the sum of three whole numbers of 8 bits, times 2^16, 2^8 and 1. A level times such a part has 16 bits, and up
to 2^24 every whole number is one in fp32, so the sum over the taps of each is exact in any order, and with factors that are
first cut to the 10 bits of TF32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from leanvlm.runtime.cuts import Window

PRECISION_BITS = 22
PARTS = 3
"""Whole numbers of 8 bits that a weight is the sum of."""
SUPPORT = {0: 0.5, 1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 1.0}
"""How far Pillow's filters reach at most, by number, in pixels of the longer axis."""
MAX_TAPS = 512
"""Source pixels under a filter: more might not sum exactly. 128 times smaller with the bicubic filter."""
WINDOWS = 32
"""Kept: of one picture two to eight are used, and each is some 4 MB at most, of a side of 8192, and mostly far below 1 MB."""


@dataclass(frozen=True, eq=False)
class Taps:
    """The weights of a window, n pixels of T taps each.

    Attributes:
        index: (3 n, T) int32, the source pixel of each tap; those of a pixel differ.
        weights: (3 n, T) float32, first the parts of 2^16 of all pixels, then those of 2^8, then those of 1, these over 2^8.
    """

    index: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


@lru_cache(maxsize=WINDOWS)
def taps(window: Window, resample: int) -> Taps | None:
    """Return the weights of a window, or None if a sum of parts might not be exact.

    Args:
        window: Which pixels of a resized axis.
        resample: Pillow's number of the filter.
    """
    support = SUPPORT[resample] * max(window.length / window.resized, 1.0)
    # Two pixels more than Pillow may use on each side, whichever way it rounds.
    count = min(math.ceil(2 * support) + 4, window.length)
    if count > MAX_TAPS:
        return None
    first, last = max(window.begin, 0), min(window.end, window.resized)
    pixels = np.arange(first, last)
    centres = (pixels + 0.5) * (window.length / window.resized)
    starts = np.clip(np.floor(centres - support).astype(np.int64) - 1, 0, window.length - count)
    index = np.zeros((window.size, count), np.int32)
    index[:] = np.arange(count)
    weights = np.zeros((window.size, count), np.int32)
    inside = slice(first - window.begin, last - window.begin)
    index[inside] += starts[:, None].astype(np.int32)
    weights[inside] = asked(window.length, window.resized, resample, count)[index[inside] % count, pixels[:, None]]
    parts = split(weights)
    if np.abs(parts).sum(axis=2, dtype=np.int64).max(initial=0) * 255 >= 2**24 - 2**17:
        return None
    scaled = parts * np.array([1, 1, 2.0**-8], np.float32)[:, None, None]
    return Taps(np.tile(index, (PARTS, 1)), np.ascontiguousarray(scaled.reshape(-1, count), np.float32))


def asked(length: int, resized: int, resample: int, period: int) -> npt.NDArray[np.int32]:
    """Ask Pillow for the weights of an axis.

    Args:
        length: Pixels of the axis.
        resized: Pixels that it becomes.
        resample: The filter.
        period: More pixels than the filter reaches over.

    Returns:
        (period, resized): row r, column i has the weight in output pixel i of that source pixel under the filter whose place
        leaves r when divided by `period`.
    """
    places = np.arange(length)
    bright = np.zeros((period, length), np.int32)
    bright[places % period, places] = 1 << PRECISION_BITS
    found: Any = np.asarray(Image.fromarray(bright).resize((resized, period), Image.Resampling(resample)))
    return found  # type: ignore[no-any-return]


def split(weights: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return whole numbers (…) as those of 8 bits (3, …) that they are the sum of, times 2^16, 2^8 and 1."""
    parts = []
    for _ in range(PARTS - 1):
        low = ((weights + 128) & 255) - 128
        parts.append(low)
        weights = (weights - low) >> 8
    return np.stack([weights, *parts[::-1]])
