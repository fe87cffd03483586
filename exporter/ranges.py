"""What the numbers of a configuration may be: held to before anything is built of them.

transformers' own classes check types and a few relations, but no ranges, and would build a model of 10^12 layers for ever. The
upper ends are some times what published models have. A field that is not here shapes nothing that an export computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from transformers.activations import ACT2FN

from leanvlm.runtime.errors import CheckpointError
from leanvlm.runtime.records import Between, Count, read, shorten

Width = Annotated[int, Between(1, 2**16)]
Inner = Annotated[int, Between(1, 2**20)]
# A layer takes 2 ms to build, however wide it is.
Layers = Annotated[int, Between(1, 256)]
Heads = Annotated[int, Between(1, 1024)]
Epsilon = Annotated[float, Between(0, 1)]
Positive = Annotated[float, Between(1e-6, 1e12)]
NotNegative = Annotated[float, Between(0, 1e12)]

# Of one image: the checkpoint's attention, for the verification, is this squared for every head. LLaVA-1.5 has 576.
MAX_TOKENS = 4096


@dataclass(frozen=True)
class TowerRanges:
    """A vision tower: CLIP or SigLIP."""

    hidden_size: Width
    intermediate_size: Inner
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_channels: Literal[3]
    image_size: Annotated[int, Between(1, 4096)]
    patch_size: Annotated[int, Between(1, 4096)]
    layer_norm_eps: Epsilon
    hidden_act: str

    def __post_init__(self) -> None:
        check_activation("hidden_act", self.hidden_act)
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(f"hidden_size {self.hidden_size} is not a multiple of its {self.num_attention_heads} heads")
        if self.patch_size > self.image_size:
            raise CheckpointError(f"patch_size {self.patch_size} is more than image_size {self.image_size}")
        tokens = (self.image_size // self.patch_size) ** 2
        if tokens > MAX_TOKENS:
            raise CheckpointError(
                f"image_size {self.image_size} makes {tokens} patches of {self.patch_size}, over {MAX_TOKENS}"
            )


@dataclass(frozen=True)
class DecoderRanges:
    """A decoder."""

    hidden_size: Width
    intermediate_size: Inner
    num_hidden_layers: Layers
    num_attention_heads: Heads
    vocab_size: Annotated[int, Between(1, 2**22)]
    # Rotary tables have a row for every position.
    max_position_embeddings: Annotated[int, Between(1, 2**22)]
    rms_norm_eps: Epsilon
    hidden_act: str | None = None
    num_key_value_heads: Heads | None = None
    head_dim: Annotated[int, Between(1, 4096)] | None = None
    # An activation's other name, which counts where it is there.
    hidden_activation: str | None = None
    # Scores are divided by its root.
    query_pre_attn_scalar: Positive | None = None

    def __post_init__(self) -> None:
        check_activation("hidden_act", self.hidden_activation or self.hidden_act)
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )


@dataclass(frozen=True)
class DepthRanges:
    """What transformers makes lists of while it reads a tower's or decoder's configuration."""

    num_hidden_layers: Layers


@dataclass(frozen=True)
class RopeRanges:
    """Rotary angles; a number out of these makes them infinite, or none at all."""

    rope_theta: Positive | None = None
    factor: Positive | None = None
    attention_factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    llama_4_scaling_beta: NotNegative | None = None
    mscale: NotNegative | None = None
    mscale_all_dim: NotNegative | None = None
    partial_rotary_factor: Annotated[float, Between(0, 1)] | None = None
    original_max_position_embeddings: Annotated[int, Between(1, 2**22)] | None = None


@dataclass(frozen=True)
class ImageTokenRanges:
    """What is outside the parts of a model whose image tokens are the tower's."""

    image_token_id: Count


@dataclass(frozen=True)
class LlavaRanges:
    """What is outside the parts of a LLaVA."""

    image_token_id: Count
    projector_hidden_act: str

    def __post_init__(self) -> None:
        check_activation("projector_hidden_act", self.projector_hidden_act)


def check_ranges(kind: type, config: Any, name: str) -> None:
    """Hold a configuration, as transformers resolved it, to the ranges of its kind.

    Raises:
        CheckpointError: A number out of range or of another type, numbers that do not go together, an unknown activation.
    """
    given = {field.name: getattr(config, field.name, None) for field in fields(kind)}
    read(kind, given, name, CheckpointError)
    angles = getattr(config, "rope_parameters", None)
    # Layers of several kinds may have their own.
    ropes = [angles, *angles.values()] if isinstance(angles, Mapping) else []
    for rope in (rope for rope in ropes if isinstance(rope, Mapping)):
        known = {field.name: rope[field.name] for field in fields(RopeRanges) if field.name in rope}
        read(RopeRanges, known, f"rope_parameters in {name}", CheckpointError)


def check_depth(part: Mapping[str, Any], name: str) -> None:
    """Hold the layers of a part of `config.json`, as it stands there, to their range.

    Raises:
        CheckpointError: There are too many.
    """
    layers = part.get("num_hidden_layers")
    if type(layers) is int and layers > 0:
        read(DepthRanges, {"num_hidden_layers": layers}, name, CheckpointError)


def check_axial_heads(hidden: int, heads: int) -> None:
    """Check the width of a tower whose heads turn by half by the row and half by the column, in pairs.

    Raises:
        CheckpointError: It is no multiple of 4 for each head.
    """
    if hidden % (4 * heads):
        raise CheckpointError(f"hidden_size {hidden} is not a multiple of 4 for each of {heads} heads")


def check_activation(field: str, name: str | None) -> None:
    """Check that transformers has an activation of this name.

    Raises:
        CheckpointError: It has none.
    """
    if name not in ACT2FN:
        raise CheckpointError(f"{field} {shorten(repr(name))} is no activation function of transformers, such as gelu or silu")
