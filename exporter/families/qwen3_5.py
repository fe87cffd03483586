"""Qwen3.5 (`model_type: qwen3_5`): Qwen3-VL's tower without DeepStack, and a decoder of which most layers are recurrent.

Three of four layers are gated delta nets, which keep states of one size in place of keys and values. They see tokens in their
order and know no positions: a kept image token follows the one kept before it. The others have positions of three axes, in a
quarter of each head, and a gate on what their attention mixes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn
from transformers import Qwen3_5ForConditionalGeneration

from leanvlm.exporter.decoders.recurrent import FULL, LINEAR
from leanvlm.exporter.families.base import Description
from leanvlm.exporter.families.qwen3_vl import Qwen3VlFamily
from leanvlm.exporter.ranges import Heads, check_ranges
from leanvlm.runtime.errors import CheckpointError, UnsupportedModelError
from leanvlm.runtime.records import Between, shorten

HeadWidth = Annotated[int, Between(1, 4096)]


@dataclass(frozen=True)
class DeltaNetRanges:
    """The recurrent layers of a decoder."""

    linear_conv_kernel_dim: Annotated[int, Between(2, 64)]
    linear_key_head_dim: HeadWidth
    linear_value_head_dim: HeadWidth
    linear_num_key_heads: Heads
    linear_num_value_heads: Heads

    def __post_init__(self) -> None:
        if self.linear_num_value_heads % self.linear_num_key_heads:
            raise CheckpointError(
                f"linear_num_value_heads {self.linear_num_value_heads} is not a multiple of linear_num_key_heads "
                f"{self.linear_num_key_heads}"
            )


class Qwen35Family(Qwen3VlFamily):
    """Qwen3.5 checkpoints; images and positions are as Qwen2.5-VL's."""

    model_type = "qwen3_5"
    model: ClassVar[Callable[[Any], nn.Module]] = Qwen3_5ForConditionalGeneration
    # Older files name the model there.
    towers: ClassVar[tuple[str, ...]] = ("qwen3_5_vision", "qwen3_5")
    texts: ClassVar[tuple[str, ...]] = ("qwen3_5_text",)

    def describe(self, config: Any) -> Description:
        """Read a configuration."""
        found, text = super().describe(config), config.text_config
        check_ranges(DeltaNetRanges, text, "text_config in config.json")
        kinds = text.layer_types
        known = isinstance(kinds, list) and len(kinds) == text.num_hidden_layers and set(kinds) <= {LINEAR, FULL}
        if not known or FULL not in kinds:
            raise UnsupportedModelError(
                f"layer_types {shorten(kinds)} is not supported: each of {text.num_hidden_layers} layers must be {LINEAR} or "
                f"{FULL}, and one at least the latter"
            )
        if text.hidden_act != "silu":
            raise UnsupportedModelError(
                f"hidden_act {shorten(repr(text.hidden_act))} is not supported for a {text.model_type!r}; it must be silu"
            )
        return found

    def deep(self, vision: Any) -> list[int]:
        """Return nothing: no planes are made."""
        return []
