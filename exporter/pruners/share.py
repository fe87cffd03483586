"""How a budget is split between attention and diversity by the image's effective rank.

AgilePruner (arXiv 2603.01236, tables 5 and 6) maps the rank linearly to the share of diversity tokens in other methods: the
richer the image, the more of them. The paper's own constants were not available; the ends of the map are parameters here.
"""

from __future__ import annotations

from torch import Tensor


def diversity_share(rank: Tensor, reference: float, least: float, most: float) -> Tensor:
    """Map effective ranks (B,) to shares (B,): `least` at half the reference and below, `most` at 1.5 times and above."""
    return least + (most - least) * (rank / reference - 0.5).clamp(0.0, 1.0)
