"""The decoder of the TensorRT targets: the checkpoint's language model in standard operators, with its cache in the open.

The caches come in as they are, of any length, with a count of the rows that hold something; the new rows go out by
themselves. So nothing is copied but them, a decode step has the same shapes every time (which a captured CUDA graph needs),
and the runtime writes the new rows of all layers into one buffer with one strided copy.

| direction | name | shape | meaning |
|---|---|---|---|
| in | `inputs_embeds` | (1, S, D), or wider | text embeddings, image embeddings spliced between; behind each row its planes |
| in | `position_ids` | (1, S) int64, or (3, 1, S) | their positions in the sequence, or on three axes |
| in | `past_length` | (1,) int64 | how many rows of the caches hold something, from the first on |
| in | `last_position` | (1,) int64 | the position among the S whose logits are wanted; what is behind it is padding |
| in | `last_seen` | (1, S) int64 | only where some see positions behind them: the last row of the sequence that each sees |
| in | `past_key_values.<l>.key` / `.value` | (1, kv_heads, P, head_dim) | the caches; P may be 0 |
| out | `logits` | (1, 1, V) fp32 | of the position asked for |
| out | `next_token`, `top_logit` | (1, 1) | the most probable token, and its logit in fp32 |
| out | `new_key_values.<l>.key` / `.value` | (1, kv_heads, S, head_dim) | the rows of the S positions |

Attention is told what it may see by an additive mask, made in the graph: what a kernel of its own takes "causal" to mean
where there are more keys than queries has differed between versions. Place, type and order of the operations are those
of transformers' Llama; `tests` compare both. Decoders that differ in less than that are covered too: norms of the heads
(Qwen3), layers that do not turn (SmolLM3), queries scaled by position (Ministral 3), layers that turn by angles of their kind
and norms behind attention and gated block (Gemma 3), whatever a layer's own norms and gated blocks compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from leanvlm.exporter.decoders import (
    decoder_for,
    frequency_axes,
    head_dim,
    kv_heads,
    planes_of,
    query_scale,
    rotary_frequencies,
    rotary_kinds,
)
from leanvlm.exporter.rotary import rotated
from leanvlm.exporter.trace import trace
from leanvlm.runtime.positions import Visibility

# What is added where a position must not be seen. In half precision, together with any score, it stays a number.
HIDDEN = -3e4
PARTS = ("key", "value")
FUSED_OPSET = 23
# Smaller constants stay in the graph, where shape inference finds them.
THRESHOLD = 1024


class PortableDecoder(nn.Module):
    """A Llama-type decoder around the checkpoint's own modules.

    Args:
        decoder: Causal language model with `model` (layers, norm, rotary embedding) and `lm_head`.
        fused: Write attention as one operator, for parsers that know it (opset 23), or as products and a softmax.
        visibility: Which positions see which; where that is not the past alone, `last_seen` comes in front of the caches.
    """

    def __init__(self, decoder: Any, *, fused: bool, visibility: Visibility = "causal") -> None:
        super().__init__()
        self.layers = decoder.model.layers
        self.norm = decoder.model.norm
        self.kinds = rotary_kinds(decoder)
        # In fp32, also where the decoder is narrower: half precision would turn the angles of later positions by a radian.
        self.frequencies = {kind: rotary_frequencies(decoder, kind) for kind in sorted(set(self.kinds))}
        self.axes = frequency_axes(decoder) if decoder_for(decoder.config).axes == 3 else None
        self.query_scale = query_scale(decoder.config)
        self.lm_head = decoder.lm_head
        self.planes = planes_of(decoder)
        self.fused = fused
        self.masked = visibility != "causal"
        self.wide = decoder_for(decoder.config).is_wide

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, past_length: Tensor, last_position: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        """Map the inputs of the table above to its outputs, in its order; caches alternate key and value."""
        last_seen, caches = (caches[0], caches[1:]) if self.masked else (None, caches)
        hidden, *planes = inputs_embeds.chunk(1 + self.planes, dim=2) if self.planes else (inputs_embeds,)
        dtype = inputs_embeds.dtype
        hidden = hidden.float() if self.wide else hidden
        new: list[Tensor] = []
        mask = self._mask(inputs_embeds, past_length, caches[0].shape[2], last_seen)
        turns = {kind: self.rotation(position_ids, dtype, kind) for kind in self.frequencies}
        scale = None if self.query_scale is None else self._scale(position_ids, *self.query_scale).to(dtype)
        for index, layer in enumerate(self.layers):
            key, value = caches[2 * index], caches[2 * index + 1]
            states = layer.input_layernorm(hidden).to(dtype)
            mixed, rows = self._attention(layer.self_attn, states, *turns[self.kinds[index]], scale, mask, key, value)
            hidden = self._through_block(layer, hidden, mixed)
            if index < len(planes):
                hidden = hidden + planes[index]
            new += rows
        wanted = self.norm(hidden.index_select(1, last_position)).to(dtype)
        logits = self.lm_head(wanted).float()
        # Engines' maxima may pass over a NaN.
        ranked = torch.where(logits.isnan(), torch.inf, logits)
        return logits, logits.argmax(dim=-1), ranked.amax(dim=-1), *new

    @staticmethod
    def _through_block(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Return what a layer makes of its input (1, S, D) and its attention's output, in the input's dtype."""
        wide, narrow = hidden.dtype, mixed.dtype
        if not hasattr(layer, "pre_feedforward_layernorm"):
            hidden = hidden + mixed
            added: Tensor = layer.mlp(layer.post_attention_layernorm(hidden))
        else:
            hidden = hidden + layer.post_attention_layernorm(mixed.to(wide))
            gated = layer.mlp(layer.pre_feedforward_layernorm(hidden).to(narrow))
            added = layer.post_feedforward_layernorm(gated.to(wide))
        return hidden + added

    def rotation(self, position_ids: Tensor, dtype: torch.dtype, kind: str = "") -> tuple[Tensor, Tensor]:
        """Return cosine and sine of every position's angles in a kind of layers, both (1, 1, S, head_dim)."""
        frequencies, magnitude = self.frequencies[kind]
        if self.axes is None:
            angles = position_ids[:, None, :, None].float() * frequencies
        else:
            angles = (position_ids[self.axes].permute(1, 2, 0).float() * frequencies)[:, None]
        angles = torch.cat([angles, angles], dim=3)
        return (angles.cos() * magnitude).to(dtype), (angles.sin() * magnitude).to(dtype)

    @staticmethod
    def _scale(position_ids: Tensor, beta: float, length: int) -> Tensor:
        """Return what every position's query is scaled by (1, 1, S, 1), in fp32."""
        return (1 + beta * torch.log(1 + torch.floor(position_ids.float() / length)))[:, None, :, None]

    @staticmethod
    def _mask(inputs_embeds: Tensor, past_length: Tensor, past: int, last_seen: Tensor | None) -> Tensor:
        """Return what is added to the scores (1, 1, S, P + S): 0 for filled rows, and for new ones up to the last seen.

        That is the query's own, where `last_seen` (1, S) does not say otherwise.
        """
        count, device = inputs_embeds.shape[1], inputs_embeds.device
        positions = torch.arange(count, device=device)
        filled = (torch.arange(past, device=device) < past_length)[None].expand(count, -1)
        last = positions if last_seen is None else last_seen[0] - past_length
        seen = torch.cat([filled, positions[None] <= last[:, None]], dim=1)[None, None]
        zero = torch.zeros((), dtype=inputs_embeds.dtype, device=device)
        return torch.where(seen, zero, torch.full_like(zero, HIDDEN))

    def _attention(
        self,
        attn: Any,
        states: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: Tensor | None,
        mask: Tensor,
        past_key: Tensor,
        past_value: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return a layer's attention (1, S, D), and the new rows of its key and value (1, kv_heads, S, head_dim)."""

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:2], -1, attn.head_dim).transpose(1, 2)

        query, key, value = heads(attn.q_proj(states)), heads(attn.k_proj(states)), heads(attn.v_proj(states))
        if hasattr(attn, "q_norm"):
            query, key = attn.q_norm(query), attn.k_norm(key)
        if getattr(attn, "use_rope", True):
            query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        if scale is not None:
            query = query * scale
        keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
        groups = query.shape[1] // keys.shape[1]
        if groups > 1:
            keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attn.scaling)
        else:
            mixed = (query * attn.scaling @ keys.transpose(2, 3) + mask).softmax(dim=-1) @ values
        return attn.o_proj(mixed.transpose(1, 2).flatten(2)), (key, value)


def trace_decoder(decoder: Any, *, opset: int, dtype: torch.dtype, visibility: Visibility = "causal") -> ir.Model:
    """Trace a causal language model of a Llama type as one graph with an open cache.

    Args:
        decoder: With `model`, `lm_head` and `config`, in `dtype`.
        opset: From 23 on, attention in half precision is one operator; a dedicated kernel for fp32 is found nowhere.
        dtype: Of embeddings, caches and products; logits are fp32.
        visibility: Which positions see which.
    """
    config = decoder.config
    head, count, past, axes = head_dim(config), 7, 5, decoder_for(config).axes
    names = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in PARTS]
    inputs = {
        "inputs_embeds": torch.zeros(1, count, (1 + planes_of(decoder)) * config.hidden_size, dtype=dtype),
        "position_ids": torch.arange(count)[None] if axes == 1 else torch.arange(count).expand(axes, 1, -1),
        "past_length": torch.tensor([past]),
        "last_position": torch.tensor([count - 1]),
    }
    inputs |= {} if visibility == "causal" else {"last_seen": torch.arange(past, past + count)[None]}
    inputs |= {f"past_key_values.{name}": torch.zeros(1, kv_heads(config), past, head, dtype=dtype) for name in names}
    free = {
        "inputs_embeds": {1: "S"},
        "position_ids": {1 if axes == 1 else 2: "S"},
        "last_seen": {1: "S"},
        **{f"past_key_values.{name}": {2: "P"} for name in names},
    }
    fused = opset >= FUSED_OPSET and dtype != torch.float32
    outputs = ["logits", "next_token", "top_logit", *(f"new_key_values.{name}" for name in names)]
    graph = PortableDecoder(decoder, fused=fused, visibility=visibility).eval()
    return trace(graph, inputs, output_names=outputs, opset=opset, free=free)


def save_decoder(model: ir.Model, path: Path) -> None:
    """Write the graph, its weights beside it in one file."""
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=THRESHOLD)
