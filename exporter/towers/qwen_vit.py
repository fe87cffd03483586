"""The vision transformer of the Qwen-VL models: images of any size, 2 x 2 patches to a token, rotary positions on two axes.

Here the size is fixed, so what depends on it is a table. Blocks with windows attend inside them; the tokens of the last
windows of a row or column may be fewer. Patches are put in an order in which each window is one stretch and windows of one
size follow one another: then attention in windows is a batch for each of up to four sizes, without masks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from leanvlm.exporter.rotary import rotated
from leanvlm.exporter.towers.base import Seen, received_scores, summed_stretches
from leanvlm.exporter.towers.patches import LevelPatches
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.preprocess import ImageSpec

CELL = 2


class Stretch(NamedTuple):
    """Windows of one size, in the order of the patches: where the first begins, how many there are, of how many patches."""

    start: int
    windows: int
    length: int


class QwenVit(nn.Module):
    """Pixel values (B, 3, H, W) of one shape -> `Seen`, whose hidden states are those of a token's four patches side by side.

    Args:
        visual: The checkpoint's tower.
        shape: Of the crops.
        scored: The 0-based block whose attention scores the tokens; it must see the whole image.
        image: The processor whose normalisation is folded in, so that the pixels are uint8 levels; None: they are normalised.
        window: Tokens on each side of a window; None where all blocks see the whole image.
        whole: The blocks that see the whole image beside those in windows.
        positions: Added to the patches (N', Dv), in raster order.
        deep: Block to what makes a plane of the tokens behind it, in order.
    """

    order: Tensor
    cells: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor | None

    def __init__(
        self,
        visual: Any,
        shape: CropShape,
        scored: int,
        image: ImageSpec | None,
        *,
        window: int | None = None,
        whole: Collection[int] = (),
        positions: Tensor | None = None,
        deep: Mapping[int, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.convolution = _flat_convolution(visual.patch_embed.proj)
        self.patches = None if image is None else LevelPatches(self.convolution, image)
        self.blocks = visual.blocks
        self.deep_blocks = tuple(deep or {})
        self.deep_mergers = nn.ModuleList(MergedTokens(merger) for merger in (deep or {}).values())
        self.scored, self.window, self.whole = scored, window, frozenset(whole)
        cells, self.stretches = window_order(shape.grid, window)
        rows, columns = torch.div(cells, shape.grid[1], rounding_mode="floor"), cells % shape.grid[1]
        inner = torch.arange(CELL)
        high = (CELL * rows[:, None, None] + inner[:, None]).expand(-1, -1, CELL).flatten()
        wide = (CELL * columns[:, None, None] + inner).expand(-1, CELL, -1).flatten()
        self.register_buffer("order", high * CELL * shape.grid[1] + wide, persistent=False)
        self.register_buffer("cells", cells.argsort(), persistent=False)
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), torch.stack([high, wide], dim=1))
        self.register_buffer("cos", cos[:, None], persistent=False)
        self.register_buffer("sin", sin[:, None], persistent=False)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, pixel_values: Tensor) -> Seen:
        """Run the tower."""
        states = self._embed(pixel_values)[:, self.order]
        told: tuple[Tensor, Tensor, None] | None = None
        planes: list[Tensor] = []
        for at, block in enumerate(self.blocks):
            normed = block.norm1(states)
            query, key, value = self._projected(block.attn, normed)
            if at == self.scored:
                told = received_scores(query.flatten(2), key.flatten(2), block.attn.num_heads)
            states = states + block.attn.proj(self._attend(query, key, value, at))
            states = states + block.mlp(block.norm2(states))
            if at in self.deep_blocks:
                planes.append(self.deep_mergers[self.deep_blocks.index(at)](self._tokens(states)))
        assert told is not None
        keys, saliency = (summed_stretches(part, CELL * CELL)[:, self.cells] for part in told[:2])
        return Seen(self._tokens(states), keys, saliency, None, torch.cat(planes, dim=2) if planes else None)

    def _tokens(self, states: Tensor) -> Tensor:
        """Put the patches of each token side by side: (B, N', Dv) -> (B, N, 4 Dv), tokens in raster order."""
        return states.reshape(states.shape[0], len(self.cells), -1)[:, self.cells]

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """Return the patches (B, N', Dv) in raster order."""
        if self.patches is not None:
            embedded: Tensor = self.patches(pixel_values)
        else:
            embedded = self.convolution(pixel_values).flatten(2).transpose(1, 2)
        return embedded if self.positions is None else embedded + self.positions

    def _projected(self, attn: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, both turned, and values (B, N', H, d)."""
        query, key, value = attn.qkv(states).reshape(*states.shape[:2], 3, attn.num_heads, -1).unbind(2)
        return rotated(query, self.cos, self.sin), rotated(key, self.cos, self.sin), value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, at: int) -> Tensor:
        """Return what a block's attention mixes (B, N', Dv), of the whole image or in windows."""
        count = query.shape[1]
        narrow = self.window is not None and at not in self.whole
        stretches = self.stretches if narrow else [Stretch(0, 1, count)]
        mixed = [_mixed(*(_windows(part, stretch) for part in (query, key, value))) for stretch in stretches]
        mixed = [part.reshape(query.shape[0], -1, part.shape[2]) for part in mixed]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)


class MergedTokens(nn.Module):
    """A checkpoint's merger, applied to tokens whose patches lie side by side: (…, 4 Dv) -> (…, D)."""

    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, hidden: Tensor) -> Tensor:
        """Make features of hidden states."""
        merged: Tensor = self.merger(hidden.reshape(-1, hidden.shape[-1] // (CELL * CELL)))
        return merged.reshape(*hidden.shape[:-1], merged.shape[1])


def _windows(part: Tensor, stretch: Stretch) -> Tensor:
    """Return the windows of a stretch of (B, N', H, d) as a batch (B * windows, H, length, d)."""
    start, windows, length = stretch
    if (start, windows * length) != (0, part.shape[1]):
        part = part[:, start : start + windows * length]
    return part.reshape(-1, length, *part.shape[2:]).transpose(1, 2)


def _mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the attention of windows (B * windows, H, length, d) as (B * windows, length, Dv)."""
    return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def packed_patches(pixels: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return what the checkpoint itself takes of pixel values (C, 3, H, W).

    Returns:
        Patches (C * N', 3 * 2 * P * P), token by token, each as two equal frames; and (C, 3), frames, rows and columns of them.
    """
    count, channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    split = pixels.reshape(count, channels, rows // CELL, CELL, patch, columns // CELL, CELL, patch)
    # (C, rows, columns, 2, 2, 3, P, P)
    patches = split.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(*[-1] * 6, 2, -1, -1)
    return patches.reshape(count * rows * columns, -1), torch.tensor([[1, rows, columns]] * count, device=pixels.device)


def packed_places(grid: tuple[int, int], window: int | None) -> Tensor:
    """Return for each patch (N',) in raster order its place in the checkpoint's own sequence: window after window."""
    rows, columns = grid
    side = window or max(grid)
    numbers = torch.arange(rows * columns * CELL * CELL).view(rows, CELL, columns, CELL)
    corners = [(top, left) for top in range(0, rows, side) for left in range(0, columns, side)]
    windows = [numbers[top : top + side, :, left : left + side].transpose(1, 2).flatten() for top, left in corners]
    return torch.cat(windows).argsort()


def window_order(grid: tuple[int, int], window: int | None) -> tuple[Tensor, Sequence[Stretch]]:
    """Return tokens (N,) ordered by windows, those of one size together, and these stretches, counted in patches.

    Args:
        grid: Rows and columns of the tokens.
        window: Tokens on each side of a window; None for one that holds all.
    """
    rows, columns = grid
    side = window or max(grid)
    numbers = torch.arange(rows * columns).view(rows, columns)
    sizes: dict[int, list[Tensor]] = {}
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            part = numbers[top : top + side, left : left + side].flatten()
            sizes.setdefault(len(part), []).append(part)
    stretches, start = [], 0
    for count, windows in sizes.items():
        stretches.append(Stretch(start, len(windows), CELL * CELL * count))
        start += stretches[-1].windows * stretches[-1].length
    return torch.cat([part for windows in sizes.values() for part in windows]), stretches


def _flat_convolution(conv: Any) -> nn.Conv2d:
    """Return the patch convolution, in fp32, for a still picture, which the checkpoint's own sees as two equal frames."""
    weight = conv.weight.detach().float().sum(dim=2)
    flat = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], weight.shape[2:], bias=conv.bias is not None)
    flat.weight = nn.Parameter(weight, requires_grad=False)
    if conv.bias is not None:
        flat.bias = nn.Parameter(conv.bias.detach().float(), requires_grad=False)
    return flat
