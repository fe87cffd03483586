"""The vision graph: pixels in, kept image embeddings out.

| direction | name | dtype | shape | meaning |
|---|---|---|---|---|
| in | `pixel_values` | float32 | (B, 3, H, W) | normalised as the checkpoint's processor does |
| in | `valid` | float32 | (B, N) | 1 where a token shows the image, 0 for padding; only where images are padded |
| out | `image_features` | float32 | (B, K, D) | the kept tokens, raster order; wider where they have planes |
| out | `keep_indices` | int64 | (B, K) | their indices among the N tokens, ascending |
| out | `effective_rank` | float32 | (B,) | of the centred features, estimated; 0 where the pruner's gate does not want it |
| out | `num_selected` | int64 | (B,) | kept on merit, before the back-fill |
| out | `converged` | bool | (B,) | whether the selection reached its fixed point |
| out | `feature_sum` | float32 | (B,) | sum of all features (or squares) and attentions: not finite if one of them is not |
| out | `attention` | float32 | (B, N) | how much each token is attended to, for pictures; 0 if the tower does not tell |

B is free; N and K are fixed. Each stage is a submodule, so the nodes of a stage share a scope: /vision, /project, /prune.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanvlm.exporter.pruners.base import Kept, Pruner, VisionTokens, choose, gather_tokens, widened
from leanvlm.exporter.towers.base import Seen


@dataclass(frozen=True)
class VisionPlan:
    """One vision graph.

    Attributes:
        shape: Index of the crop shape.
        budget: The bundle's budget that it serves.
        pruner: What it prunes with.
        kept: Image tokens that it keeps of a crop.
        file: Its name; graphs of one name are one.
    """

    shape: int
    budget: int
    pruner: Pruner
    kept: int
    file: str


class PruneStage(nn.Module):
    """Runs a pruner, applies its choice and completes the diagnostics that it left out."""

    def __init__(self, pruner: Pruner, grid: tuple[int, int], leading: int = 0) -> None:
        super().__init__()
        self.pruner = pruner
        self.grid = grid
        self.leading = leading

    def forward(self, features: Tensor, seen: Seen, valid: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Map the tokens of B crops to the `VISION_OUTPUTS`, with merged tokens still to be projected at the end.

        Returns:
            The outputs of the vision graph and the merged tokens (B, K, Dv); either the first or the last is None.
        """
        tokens = VisionTokens(features, seen, self.grid, self.leading, valid)
        shown = tokens.shown
        kept, saliency = choose(self.pruner, tokens, shown), shown.seen.saliency
        chosen = gather_tokens(tokens.wide, kept.indices) if kept.hidden is None else None
        attention = torch.zeros_like(features[:, :, 0], dtype=torch.float32) if saliency is None else saliency
        energy, deep = self._energy(kept, features), seen.deep
        energy = energy if deep is None else energy + deep.float().sum((1, 2))
        return chosen, kept.indices, *self._diagnostics(kept, energy, attention), kept.hidden

    def _diagnostics(self, kept: Kept, energy: Tensor, attention: Tensor) -> tuple[Tensor, ...]:
        given = kept.diagnostics
        every = torch.ones_like(kept.indices[:, 0])
        return (
            # 13 products, for which only a gate pays.
            given.get("effective_rank", torch.zeros_like(attention[:, 0])),
            given.get("num_selected", every * kept.indices.shape[1]),
            given.get("converged", every > 0),
            energy + attention.sum(1),
            attention,
        )

    def _energy(self, kept: Kept, features: Tensor) -> Tensor:
        """Return a sum (B,) that is finite only if all features are; what a pruner measures is of the patches alone."""
        measured = kept.diagnostics.get("energy")
        if measured is None:
            return features.float().sum((1, 2))
        return measured + features[:, : self.leading].float().sum((1, 2)) if self.leading else measured


class VisionGraph(nn.Module):
    """Tower, projector and pruner as one traceable module: what a bundle's graph computes, for measuring and comparing.

    Exports trace it in two parts (`vision_graphs.py`).
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, pruner: Pruner, grid: tuple[int, int], leading: int = 0) -> None:
        super().__init__()
        self.vision = tower
        self.project = projector
        self.prune = PruneStage(pruner, grid, leading)

    def forward(self, pixel_values: Tensor, valid: Tensor | None = None) -> tuple[Tensor, ...]:
        """Map pixel values (B, 3, H, W), and which tokens (B, N) show the image, to the outputs named in `VISION_OUTPUTS`."""
        seen: Seen = self.vision(pixel_values)
        return finished(self.prune(self.project(seen.hidden), seen, valid), seen, self.project)


def finished(outputs: tuple[Tensor | None, ...], seen: Seen, projector: nn.Module) -> tuple[Tensor, ...]:
    """Return what `PruneStage` gave with merged tokens projected."""
    chosen, indices, *others, merged = outputs
    assert indices is not None
    if merged is not None:
        # Planes are not merged: a cluster has its centre's.
        deep = None if seen.deep is None else gather_tokens(seen.deep, indices)
        chosen = widened(projector(merged), deep)
    assert chosen is not None
    return chosen, indices, *(value for value in others if value is not None)
