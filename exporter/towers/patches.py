"""Image levels to patch embeddings: the processor's arithmetic folded into the patch convolution.

What a processor computes of a level v of channel c, (v r - m_c) / s_c, and a convolution over whole patches are both linear, so
one matrix does both. In half precision the levels are centred and scaled first, u = (v - 128) / 128, which is exact in 11 bits;
the matrix then keeps the convolution's magnitude, where dividing it by 255 would leave subnormal numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanvlm.runtime.preprocess import ImageSpec

CENTRE = 128.0
# Tensor cores want rows of whole 16 bytes.
MULTIPLE = 8


class LevelPatches(nn.Module):
    """Levels (B, 3, H, W) uint8 -> patch embeddings (B, N, Dv), as the processor and `conv` would make them.

    Args:
        conv: The tower's patch convolution, stride equal to its kernel.
        image: The processor that it was trained behind.
    """

    weight: Tensor

    def __init__(self, conv: Any, image: ImageSpec) -> None:
        super().__init__()
        self.patch = int(conv.kernel_size[0])
        kernel = conv.weight.detach().double()  # (Dv, 3, P, P)
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (image.image_mean, image.image_std)
        )
        scaled = kernel * (CENTRE * image.rescale_factor / std)
        bias = (kernel * ((CENTRE * image.rescale_factor - mean) / std)).sum(dim=(1, 2, 3))
        if conv.bias is not None:
            bias = bias + conv.bias.detach().double()
        # The bias is the weight of one more column, in which every patch has a one; zeros fill up to the multiple.
        flat = torch.cat([scaled.flatten(1), bias[:, None]], dim=1)
        self.fill = -flat.shape[1] % MULTIPLE
        flat = nn.functional.pad(flat, (0, self.fill))
        self.register_buffer("weight", flat.to(conv.weight.dtype))

    def forward(self, levels: Tensor) -> Tensor:
        """Embed the patches, in raster order."""
        size = self.patch
        rows, columns = levels.shape[2] // size, levels.shape[3] // size
        centred = (levels.to(self.weight.dtype) - CENTRE) / CENTRE
        if (rows * size, columns * size) != tuple(levels.shape[2:]):
            # What fills no patch, right and below, is left out, as the convolution does.
            centred = centred[:, :, : rows * size, : columns * size]
        patches = centred.reshape(-1, 3, rows, size, columns, size)  # (B, 3, rows, P, columns, P)
        flat = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 3 P P)
        return nn.functional.pad(flat, (0, 1 + self.fill), value=1.0) @ self.weight.T
