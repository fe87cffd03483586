"""Muon: momentum whose update of every matrix is orthogonalised (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

All matrices of one shape are orthogonalised together. Updates have the size of AdamW's (factor 0.2 times the root of the
longer side; Liu et al., 2025, arXiv 2502.16982), so both take the same learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "orthogonalised"]


def orthogonalised(matrices: Tensor) -> Tensor:
    """Push the singular values of matrices (n, r, c), r <= c, to about 1 by five Newton-Schulz steps in bfloat16."""
    x: Tensor = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Muon:
    """The optimizer.

    Args:
        matrices: Each parameter (2-D), and the number of equal parts along its first axis that are matrices of their own.
        momentum: Share of the old momentum that stays, 0-1.
        decay: Weight decay.
        compiled: Whether to compile the orthogonalisation.
    """

    def __init__(self, matrices: Sequence[tuple[nn.Parameter, int]], momentum: float, decay: float, compiled: bool) -> None:
        self._matrices = list(matrices)
        self._momentum, self._decay = momentum, decay
        self._buffers = [torch.zeros_like(parameter) for parameter, _ in self._matrices]
        made: Any = torch.compile(orthogonalised, dynamic=False) if compiled else orthogonalised
        self._orthogonalised: Callable[[Tensor], Tensor] = made
        self._groups: dict[tuple[int, int], list[int]] = {}
        for index, (parameter, parts) in enumerate(self._matrices):
            sides = (parameter.shape[0] // parts, parameter.shape[1])
            self._groups.setdefault((min(sides), max(sides)), []).append(index)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every parameter from its gradient."""
        for (_, longer), members in self._groups.items():
            gradients = []
            for index in members:
                gradient = self._matrices[index][0].grad
                assert gradient is not None
                gradients.append(gradient)
            buffers = [self._buffers[index] for index in members]
            torch._foreach_lerp_(buffers, gradients, 1 - self._momentum)
            updates = torch._foreach_lerp(gradients, buffers, self._momentum)
            parts = [
                part if part.shape[0] <= part.shape[1] else part.mT
                for index, update in zip(members, updates, strict=True)
                for part in update.chunk(self._matrices[index][1])
            ]
            directions = iter(self._orthogonalised(torch.stack(parts)).float() * (0.2 * math.sqrt(longer)))
            for index in members:
                self._move(index, directions, rate)

    def _move(self, index: int, directions: Any, rate: float) -> None:
        parameter, count = self._matrices[index]
        shape = (parameter.shape[0] // count, parameter.shape[1])
        taken = [next(directions) for _ in range(count)]
        update = torch.cat([part if part.shape == shape else part.mT for part in taken])
        parameter.mul_(1 - rate * self._decay).add_(update, alpha=-rate)

    def state_dict(self) -> list[Tensor]:
        """The momentum, in the order of the parameters."""
        return self._buffers

    def load_state_dict(self, state: Sequence[Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for buffer, saved in zip(self._buffers, state, strict=True):
            buffer.copy_(saved)
