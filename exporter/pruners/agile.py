"""AgilePruner (arXiv 2603.01236, ICLR 2026): attention ranks the tokens, image complexity sets how alike they may be.

Tokens are visited from the most to the least attended. The r-th of all N tokens, if still alive, is kept and silences every
later token nearer than a cosine distance of min(r * ratio * step, max_distance), where `ratio` is the image's complexity over
its reference: a busy image (high ratio) demands more variety. The first K survivors stay; if there are fewer, the most
attended silenced tokens fill up. The constants are those of the authors' release (step 0.01, cap 0.25, reference rank 90).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from leanvlm.exporter.pruners.base import (
    Kept,
    ScoredBlock,
    Signal,
    VisionTokens,
    diagonal,
    enforce,
    first_by,
    keep_all,
    precedes,
)
from leanvlm.exporter.pruners.gates import attention_entropy, rank_and_gram


@dataclass(frozen=True)
class AgilePruner:
    """Greedy suppression of near-duplicates under an image-complexity gate.

    Uses no text and merges nothing. The release's: the walk with its thresholds and back-fill, centred
    features for the rank and un-centred ones for the distances. Ours, each of which can move a token near its threshold:

    - The effective rank is estimated (see `gates`), since ONNX has no decomposition; the release's is exact.
    - Distances are measured in fp32, the release's in the model's fp16. Run in fp32, the release centres its features in
      place and measures centred distances, so there it differs from us, and from itself in fp16.
    - Each crop has a rank and distances of its own; the release takes crop 0's.
    - Equal scores rank by index.
    - The gate `entropy` as H / `entropy_ref` is our own choice: the paper has such a variant, no source gives its formula.
      Its ratio spans 0.94 to 1.06 where the rank's spans 0.64 to 1.36.

    Attributes:
        keep: K, tokens kept of each crop.
        gate: What measures complexity: `erank` (effective rank of the centred features), `entropy` (of the attention, nats)
            or `none` (ratio 1).
        erank_ref: Mean effective rank over the model's training images; 90 in the release, for LLaVA-1.5.
        entropy_ref: Mean attention entropy in nats; 4.7 is between the paper's simple (4.5) and complex (4.9) images.
        step: Distance that each rank adds to the threshold.
        max_distance: Largest threshold, as cosine distance in 0..2.
        sweeps: Iterations of the fixed point; 360 scenes of the built-in model needed at most 17, random sets 9. Too few are
            reported as not converged.
    """

    scored_block: ClassVar[ScoredBlock] = "feature"
    needs: ClassVar[frozenset[Signal]] = frozenset({"saliency"})

    keep: int = 64
    gate: Literal["erank", "entropy", "none"] = "erank"
    erank_ref: float = 90.0
    entropy_ref: float = 4.7
    step: float = 0.01
    max_distance: float = 0.25
    sweeps: int = 18

    def __post_init__(self) -> None:
        for name in ("keep", "erank_ref", "entropy_ref", "sweeps"):
            enforce(getattr(self, name) > 0, f"agile: {name}={getattr(self, name)} is not positive")
        enforce(self.step >= 0.0, f"agile: step={self.step} is below 0")
        enforce(0.0 <= self.max_distance <= 2.0, f"agile: max_distance={self.max_distance} is not in 0..2")

    def __call__(self, tokens: VisionTokens) -> Kept:
        """Choose K tokens; the diagnostics say the gate's ratio, how many survived before the back-fill, and convergence."""
        if self.keep >= tokens.count:
            return keep_all(tokens)
        ratio, gram, diagnostics = self._gate(tokens)
        indices, num_selected, converged = select_by_gram(
            tokens.saliency,
            gram,
            ratio,
            keep=self.keep,
            step=self.step,
            max_distance=self.max_distance,
            sweeps=self.sweeps,
        )
        energy = diagonal(gram).sum(1)
        return Kept(indices, None, {**diagnostics, "energy": energy, "num_selected": num_selected, "converged": converged})

    def _gate(self, tokens: VisionTokens) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the ratio (B,), the tokens' dot products (B, N, N) and what was measured."""
        if self.gate == "erank":
            rank, gram = rank_and_gram(tokens.features)
            return rank / self.erank_ref, gram, {"effective_rank": rank}
        features = tokens.features.float()
        gram = features @ features.transpose(1, 2)
        if self.gate == "entropy":
            entropy = attention_entropy(tokens.saliency)
            return entropy / self.entropy_ref, gram, {"attention_entropy": entropy}
        return torch.ones_like(tokens.saliency[:, 0], dtype=torch.float32), gram, {}


def select_tokens(
    attention: Tensor,
    features: Tensor,
    ratio: Tensor,
    *,
    keep: int,
    step: float = 0.01,
    max_distance: float = 0.25,
    sweeps: int = 18,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select `keep` tokens by the rule of AgilePruner, exactly, with static shapes and no loop over tokens.

    The greedy walk is the unique fixed point of alive_i = not any_j (silences_ji and alive_j) over the tokens in order of
    attention; sweeping from all-alive reaches it, since after n sweeps the first n tokens are final.

    Args:
        attention: (B, N) scores; equal ones rank by index.
        features: (B, N, D) tokens compared by un-centred cosine distance.
        ratio: (B,) image complexity over its reference.
        keep: K, at most N.
        step: Distance that each rank adds to the threshold.
        max_distance: Largest threshold.
        sweeps: Iterations.

    Returns:
        Indices (B, K) int64 ascending; num_selected (B,) int64, the survivors among the K before the back-fill;
        converged (B,) bool, whether one more sweep would change nothing.
    """
    features = features.float()
    gram = features @ features.transpose(1, 2)
    return select_by_gram(attention, gram, ratio, keep=keep, step=step, max_distance=max_distance, sweeps=sweeps)


def select_by_gram(
    attention: Tensor, gram: Tensor, ratio: Tensor, *, keep: int, step: float, max_distance: float, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Select as `select_tokens` does, from the tokens' dot products `gram` (B, N, N) in fp32."""
    count = attention.shape[1]
    before = precedes(attention.float())
    rank = before.float().sum(dim=2)  # (B, N), 0 for the most attended
    threshold = ((rank + 1.0) * (ratio.float()[:, None] * step)).clamp(max=max_distance)  # (B, N)
    # The norms are the roots of the diagonal: no normalised copy of the tokens is made.
    norms = diagonal(gram).clamp(min=1e-16).sqrt()
    # 1 - cosine < threshold, with the norms moved to the other side.
    near = gram > norms[:, :, None] * (norms * (1.0 - threshold))[:, None, :]
    # One row a token: -1 for each token that, if alive, silences it, and 1 for a last one that always lives; so one product
    # and a relu are one sweep.
    silenced = torch.where(near & before, -1.0, 0.0)
    chain = pad(pad(silenced, (0, 0, 0, 1)), (0, 1), value=1.0)  # (B, N + 1, N + 1)
    alive = previous = torch.ones_like(chain[:, :, :1])
    for _ in range(sweeps):
        previous = alive
        alive = (chain @ alive).relu()
    # The sweeps close in on the fixed point from above and below in turn, each set inside the one before it or around it; so
    # two of the same size are the same.
    living = alive.sum(dim=1)[:, 0]
    converged = living == previous.sum(dim=1)[:, 0]
    alive = alive[:, :count, 0]
    # The living by rank, then the others by rank: early stop and back-fill at once.
    indices = first_by(rank - alive * count, keep)
    num_selected = (living - 1.0).clamp(max=keep).to(torch.int64)
    return indices, num_selected, converged
