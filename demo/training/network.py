"""The built-in model for training: a CLIP tower, a projector and a Llama, with all questions of an image in one pass.

It computes what a `LlavaForConditionalGeneration` of the same weights computes, for several prompts that share their image.
What stands before the image and the image itself are read once; each question stands in a slot of its own behind them, sees
them and itself, and has the positions that it would have alone. `leanvlm.demo.training.checkpoint` writes the weights as
that model.

Shapes: B images; N = 576 image tokens, of which the first K given are read; P tokens before and of the image; S tokens of all
slots; D the width of the part at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from leanvlm.demo.scenes import SIZE
from leanvlm.demo.training.batches import CAPTION_TOKENS, CONTENTS, NO_DIGIT, QUESTION_TOKENS, QUESTIONS
from leanvlm.demo.training.canvas import COLOR_CLASSES, DIGIT_CLASSES, PATCH, PATCHES, SHAPE_CLASSES

__all__ = ["SIZES", "AuxiliaryHeads", "Size", "Twin", "normalised", "slots"]

VOCABULARY = 640
ROPE_BASE = 10000.0
EPSILON = 1e-5
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_SIDE = SIZE // PATCH


@dataclass(frozen=True)
class Size:
    """Widths, layers, heads and the widths inside the MLPs of the tower and of the decoder."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    width: int
    layers: int
    heads: int
    mlp: int


# Decoder heads are multiples of 16 wide, which ONNX Runtime's CPU kernel wants.
SIZES = {
    "base": Size(192, 6, 6, 768, 256, 6, 4, 512),
    "small": Size(96, 5, 3, 384, 128, 4, 4, 256),
    "tiny": Size(64, 2, 2, 128, 64, 2, 2, 128),
}


class VisionBlock(nn.Module):
    """One layer of the tower; (B, 1 + N, D) → the same."""

    def __init__(self, width: int, mlp: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=EPSILON), nn.LayerNorm(width, eps=EPSILON)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, mlp), nn.Linear(mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then the MLP with CLIP's quick GELU."""
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        hidden = self.fc1(self.norm2(x))
        mixed: Tensor = x + self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return mixed


class VisionTower(nn.Module):
    """A CLIP vision tower."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.vision_width
        self.patch = nn.Linear(3 * PATCH * PATCH, width, bias=False)
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.positions = nn.Parameter(torch.randn(PATCHES + 1, width) * 0.02)
        self.pre_norm, self.post_norm = nn.LayerNorm(width, eps=EPSILON), nn.LayerNorm(width, eps=EPSILON)
        blocks = [VisionBlock(width, size.vision_mlp, size.vision_heads) for _ in range(size.vision_layers)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images.

        Args:
            pixels: (B, 3, 336, 336), normalised; their dtype is that of the residual stream.

        Returns:
            (B, 1 + N, D) states before the last layer, and (B, D) the normalised state of [CLS] after it.
        """
        patches = pixels.view(-1, 3, _SIDE, PATCH, _SIDE, PATCH).permute(0, 2, 4, 1, 3, 5)
        x = self.patch(patches.reshape(-1, PATCHES, 3 * PATCH * PATCH))
        x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1) + self.positions.to(x.dtype)
        x = self.pre_norm(x).to(pixels.dtype)
        for block in self.blocks[:-1]:
            x = block(x)
        return x, self.post_norm(self.blocks[-1](x)[:, 0])


class RMSNorm(nn.Module):
    """Llama's norm, computed in fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last axis to unit mean square."""
        exact = x.float()
        scaled = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + EPSILON)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)


class DecoderBlock(nn.Module):
    """One layer of the decoder, in two halves: attention lies between them, and differs for the prefix and the slots."""

    def __init__(self, width: int, mlp: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * mlp, bias=False), nn.Linear(mlp, width, bias=False)

    def split(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values of (B, S, D): each (B, H, S, D / H)."""
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return _rotate(query, cos, sin), _rotate(key, cos, sin), value

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what was attended to (B, H, S, D / H), then the MLP."""
        batch, heads, length, width = attended.shape
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, heads * width))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        mixed: Tensor = x + self.down(functional.silu(gate) * up)
        return mixed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class Decoder(nn.Module):
    """A Llama that reads a prefix once for many slots."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList([DecoderBlock(size.width, size.mlp, size.heads) for _ in range(size.layers)])
        self.norm, self.head = RMSNorm(size.width), nn.Linear(size.width, VOCABULARY, bias=False)
        self.head_width = size.width // size.heads

    def forward(self, prefix: Tensor, answers: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Predict the next token at every position of the slots.

        Args:
            prefix: (B, P, D) embeddings.
            answers: (B, S, D) embeddings of all slots.
            positions: (S,), counted along each slot.
            visible: (S, P + S) bool, what each of them sees.

        Returns:
            Logits (B, S, V).
        """
        cos, sin = self._angles(torch.arange(prefix.shape[1], device=prefix.device), prefix.dtype)
        slot_cos, slot_sin = self._angles(positions, prefix.dtype)
        x, y = prefix, answers
        for number, block in enumerate(self.blocks, 1):
            assert isinstance(block, DecoderBlock)
            query, key, value = block.split(x, cos, sin)
            slot_query, slot_key, slot_value = block.split(y, slot_cos, slot_sin)
            keys, values = torch.cat([key, slot_key], dim=2), torch.cat([value, slot_value], dim=2)
            y = block.finish(y, functional.scaled_dot_product_attention(slot_query, keys, values, attn_mask=visible))
            if number < len(self.blocks):
                x = block.finish(x, functional.scaled_dot_product_attention(query, key, value, is_causal=True))
        logits: Tensor = self.head(self.norm(y))
        return logits

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        steps = torch.arange(0, self.head_width, 2, device=positions.device).float() / self.head_width
        angles = positions.float()[:, None] * ROPE_BASE**-steps
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Twin(nn.Module):
    """The model; new ones have random weights, with every layer's contribution zero."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.vision, self.decoder = VisionTower(size), Decoder(size)
        self.projector1, self.projector2 = nn.Linear(size.vision_width, size.width), nn.Linear(size.width, size.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in (*self.vision.blocks, *self.decoder.blocks):
            assert isinstance(block, VisionBlock | DecoderBlock)
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.fc2.weight if isinstance(block, VisionBlock) else block.down.weight)
        nn.init.normal_(self.decoder.embed.weight, std=0.3)
        nn.init.normal_(self.decoder.head.weight, std=0.02)

    def project(self, states: Tensor) -> Tensor:
        """Image tokens (B, N, D) of the decoder from the tower's states (B, 1 + N, D)."""
        projected: Tensor = self.projector2(functional.gelu(self.projector1(states[:, 1:])))
        return projected

    def answer(self, head: Tensor, tokens: Tensor, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Logits (B, S, V) of slots (B, S) behind a prompt's beginning (tokens) and image tokens (B, K, D)."""
        embed = self.decoder.embed
        before = embed(head).to(tokens.dtype).expand(len(tokens), -1, -1)
        logits: Tensor = self.decoder(torch.cat([before, tokens], dim=1), embed(ids).to(tokens.dtype), positions, visible)
        return logits


class AuxiliaryHeads(nn.Module):
    """What training asks of states in between; not part of the model that is written.

    What the scene holds and the sign's digits are read off [CLS], after the last layer and before it; shape, colour and digit
    off each patch's state before the last layer; row and column, its own and of the centre of what it shows, off each projected
    token.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, scene = size.vision_width, CONTENTS + 4 * (NO_DIGIT + 1)
        patch = SHAPE_CLASSES + COLOR_CLASSES + DIGIT_CLASSES
        self.last = nn.Linear(width, scene)
        self.before_last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, scene))
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, patch))
        self.place = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, 4 * _SIDE))


def slots(prefix: int) -> tuple[Tensor, Tensor]:
    """Lay out the slots of a batch behind a prefix of P tokens.

    Returns:
        Positions (S,), and what each position sees, bool (S, P + S): the prefix, and what stands before it in its own slot.
    """
    lengths = [QUESTION_TOKENS] * QUESTIONS + [CAPTION_TOKENS]
    offset = torch.cat([torch.arange(length) for length in lengths])
    slot = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = (slot[:, None] == slot[None, :]) & (offset[:, None] >= offset[None, :])
    return prefix + offset, torch.cat([torch.ones(len(offset), prefix, dtype=torch.bool), own], dim=1)


def normalised(images: Tensor, dtype: torch.dtype) -> Tensor:
    """CLIP's normalisation of uint8 images (B, 3, H, W)."""
    mean = torch.tensor(MEAN, device=images.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(STD, device=images.device).view(1, 3, 1, 1) * 255
    return ((images.float() - mean) / std).to(dtype)
