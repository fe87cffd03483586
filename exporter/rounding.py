"""Weights quantised to 8 or 4 bits and dequantised, in torch: the model that a quantised decoder is compared with.

The rounding is that of ONNX Runtime's `MatMulNBits` without zero points, written from the operator's documentation: blocks
along the input axis, each with one scale, set so that its value of largest magnitude becomes the lowest level. Its
quantiser rounds halves up, and of two values of equal magnitude lets the negative one set the scale (found by trying); values
of half precision meet both often enough to matter over 32 layers. The exporter's quantiser is not used, so its mistakes would
show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from leanvlm.exporter.decoders.recurrent import DENSE

# Precision of a decoder to bits of a weight, where weights are quantised.
BITS = {"int8": 8, "int4": 4}
BLOCK = 32


def rounded(weight: Tensor, bits: int, dtype: torch.dtype, block: int = BLOCK) -> Tensor:
    """Return a weight quantised and dequantised, as a graph with quantised weights computes with it.

    Args:
        weight: Matrix (outputs, inputs).
        bits: Bits of one level, 2 to 8.
        dtype: In which the graph computes; weights are brought to it before they are quantised, and scales are kept in it.
        block: Inputs that share a scale.

    Returns:
        Matrix of the same shape, fp32.
    """
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.to(dtype).float(), (0, -columns % block))
    blocks = padded.reshape(rows, -1, block)
    highest, lowest = blocks.amax(dim=2, keepdim=True), blocks.amin(dim=2, keepdim=True)
    bottom = -(2 ** (bits - 1))
    scale = torch.where(highest > -lowest, highest, lowest) / bottom
    # Levels are counted from the lowest up, as they are stored. A block of zeros has scale 0.
    levels = blocks * torch.where(scale == 0, 0.0, 1 / scale) - bottom
    levels = (levels + 0.5).floor().clamp(0, -2 * bottom - 1) + bottom
    result: Tensor = (levels * scale.to(dtype).float()).reshape(rows, -1)[:, :columns]
    return result


@contextlib.contextmanager
def weights_rounded(module: nn.Module, bits: int, dtype: torch.dtype, block: int = BLOCK) -> Iterator[None]:
    """Quantise and dequantise the weights of the linear layers of a module, each only while it runs; see `rounded`.

    All but those that no decoder has quantised.
    """
    handles = []
    for name, leaf in module.named_modules():
        if isinstance(leaf, nn.Linear) and name.rpartition(".")[2] not in DENSE:
            handles.append(leaf.register_forward_pre_hook(_round(bits, dtype, block)))
            handles.append(leaf.register_forward_hook(_restore(leaf.weight.data)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round(bits: int, dtype: torch.dtype, block: int) -> Any:
    def hook(leaf: nn.Linear, args: Any) -> None:
        leaf.weight.data = rounded(leaf.weight.data, bits, dtype, block)

    return hook


def _restore(before: Tensor) -> Any:
    def hook(leaf: nn.Linear, args: Any, output: Any) -> None:
        leaf.weight.data = before

    return hook
