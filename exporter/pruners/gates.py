"""Image-complexity gates: effective rank and attention entropy, in operators that ONNX has."""

from __future__ import annotations

from torch import Tensor


def attention_entropy(attention: Tensor) -> Tensor:
    """Return the entropy of `attention` (B, N) normalised to sum 1, in nats: (B,), 0..ln N."""
    share = attention.float() / attention.float().sum(dim=1, keepdim=True)
    return -(share * share.clamp(min=1e-12).log()).sum(dim=1)


def effective_rank(features: Tensor) -> Tensor:
    """Estimate the effective rank of `features` (B, N, D) about their token mean: (B,)."""
    centred = features.float() - features.float().mean(dim=1, keepdim=True)
    gram = centred @ centred.transpose(1, 2)
    trace = gram.diagonal(dim1=1, dim2=2).sum(dim=1)
    return trace * trace / (gram * gram).sum(dim=(1, 2)).clamp(min=1e-12)
