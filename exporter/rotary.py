"""Rotary embedding as towers and decoders apply it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of half a head's width apart by their position's angles: rotary embedding (arXiv 2104.09864).

    Args:
        states: (…, d), heads.
        cos: Of the angles, broadcast to `states`.
        sin: The same.
    """
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
