"""Decoders: the language models that a bundle can hold, by the `model_type` of their text configuration.

A decoder here does what transformers does, or is refused by name. Some models do not do the same at every length: beyond an
attention window they forget, beyond a pretraining length they turn by other angles. `context_length` is how far they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanvlm.exporter.targets import MIN_ONNXRUNTIME, TARGETS
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.positions import Visibility
from leanvlm.runtime.records import shorten

# Rotary scalings whose angles are fixed for a position, up to `context_length` at least.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# What makes the cache of transformers forget the older tokens, of a Llama too, whose own attention knows no window.
WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}
# Bounds that logits are held under, softly.
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Beta and length: a query is scaled by 1 + beta ln(1 + floor(position / length)).
QUERY_SCALE = ("llama_4_scaling_beta", "original_max_position_embeddings")
# What the model builder writes of a gated block's activation, in transformers' spelling.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")


@dataclass(frozen=True)
class DecoderKind:
    """One text `model_type`.

    Attributes:
        architecture: The name that the model builder reads in a configuration.
        builder: The builder's class.
        is_portable: Whether the arithmetic of `PortableDecoder` covers it.
        is_scaled: Whether a token's embedding is its row of the table times a factor.
        is_partial: Whether heads may be rotated in part.
        scales_queries: Whether queries are scaled by their positions, from a pretraining length on, as Llama 4's are.
        axes: Coordinates of a position; with 3 each frequency turns by one of them.
        written_as: The `model_type` that the builder reads, where it is another than the checkpoint's.
        activation: The configuration's name for the activation.
        is_capped: Whether logits may be held under a bound, of the attention or of the output.
        is_wide: Whether what its layers add up may be beyond half precision, so that the sum is kept in fp32.
        onnxruntime: The least ONNX Runtime with its operators, where that is newer than what every bundle asks for.
    """

    architecture: str
    builder: str
    is_portable: bool = True
    is_scaled: bool = False
    is_partial: bool = False
    scales_queries: bool = False
    axes: Literal[1, 3] = 1
    written_as: str | None = None
    activation: str = "hidden_act"
    is_capped: bool = False
    is_wide: bool = False
    onnxruntime: str | None = None


DECODERS: dict[str, DecoderKind] = {
    "gemma": DecoderKind("GemmaForCausalLM", "GemmaModel", is_scaled=True),
    "gemma2": DecoderKind(
        "Gemma2ForCausalLM",
        "Gemma2Model",
        is_portable=False,
        is_scaled=True,
        activation="hidden_activation",
        is_capped=True,
    ),
    # The builder's own class for it reads the angles of its kinds of layers from where transformers has none.
    "gemma3_text": DecoderKind(
        "Gemma2ForCausalLM",
        "Gemma2Model",
        is_scaled=True,
        written_as="gemma2",
        activation="hidden_activation",
        is_wide=True,
    ),
    "llama": DecoderKind("LlamaForCausalLM", "LlamaModel"),
    "ministral3": DecoderKind("MistralForCausalLM", "MistralModel", scales_queries=True, written_as="mistral"),
    "mistral": DecoderKind("MistralForCausalLM", "MistralModel"),
    "phi3": DecoderKind("Phi3ForCausalLM", "Phi3MiniModel", is_portable=False, is_partial=True),
    "qwen2": DecoderKind("Qwen2ForCausalLM", "QwenModel"),
    "qwen2_5_vl_text": DecoderKind("Qwen2ForCausalLM", "QwenModel", axes=3, written_as="qwen2"),
    "qwen3": DecoderKind("Qwen3ForCausalLM", "Qwen3Model"),
    "qwen3_vl_text": DecoderKind("Qwen3ForCausalLM", "Qwen3Model", axes=3, written_as="qwen3"),
    "qwen3_5_text": DecoderKind(
        "Qwen3_5ForCausalLM", "Qwen35TextModel", is_portable=False, is_partial=True, axes=3, onnxruntime="1.30"
    ),
    # The builder's own class for it turns the layers that have no positions.
    "smollm3": DecoderKind("SmolLM3ForCausalLM", "LlamaModel"),
}

# Those whose positions are numbers, which any family may have.
ORDINARY = tuple(name for name, kind in DECODERS.items() if kind.axes == 1)


def decoder_for(config: Any) -> DecoderKind:
    """Return the decoder of a text configuration.

    Raises:
        UnsupportedModelError: There is none.
    """
    if config.model_type not in DECODERS:
        raise UnsupportedModelError(
            f"a {shorten(repr(config.model_type))} decoder is not supported; supported: {', '.join(DECODERS)}"
        )
    return DECODERS[config.model_type]


def check_decoder(config: Any, target: str, visibility: Visibility = "causal") -> None:
    """Check that a decoder of this text configuration can be written for a target.

    Args:
        config: The text configuration.
        target: The target.
        visibility: Which positions see which.

    Raises:
        UnsupportedModelError: A decoder type, activation, rotary scaling, attention mask or head size that cannot be written.
    """
    decoder, record = decoder_for(config), TARGETS[target]
    if visibility != "causal" and record.masked is None:
        others = ", ".join(name for name, other in TARGETS.items() if other.masked is not None)
        raise UnsupportedModelError(
            f"image tokens of this model see those behind them, which the attention of {target} does not let them; "
            f"--target takes it: {others}"
        )
    if record.decoder == "portable" and not decoder.is_portable:
        others = ", ".join(name for name, other in TARGETS.items() if other.decoder == "genai")
        raise UnsupportedModelError(f"a {config.model_type!r} decoder is not written for {target}; --target takes it: {others}")
    activation = getattr(config, decoder.activation)
    if record.decoder == "genai" and activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UnsupportedModelError(f"{decoder.activation} {shorten(repr(activation))} is not supported; supported: {known}")
    _check_kinds(config)
    head = head_dim(config)
    for rope in _ropes(config).values():
        _check_rope(rope, config, target)
    for name in CAPS:
        if getattr(config, name, None) is not None and not decoder.is_capped:
            cap = shorten(getattr(config, name))
            raise UnsupportedModelError(f"{name} {cap} is not supported for a {config.model_type!r}; it must be null")
    for name in WINDOWS:
        window = getattr(config, name, None)
        if window is not None and not (isinstance(window, int) and window > 0):
            raise UnsupportedModelError(f"{name} {shorten(repr(window))} is not a number of tokens; correct it in text_config")
    if getattr(config, "use_bidirectional_attention", None) and visibility != "prefix":
        raise UnsupportedModelError("use_bidirectional_attention is not supported: a decoder's tokens see those before them")
    if head % record.head_multiple:
        raise UnsupportedModelError(
            f"the decoder's heads are {head} wide; the attention of {target} wants a multiple of {record.head_multiple}"
        )


def least_onnxruntime(config: Any, target: str, visibility: Visibility) -> str:
    """Return the least ONNX Runtime that runs a bundle.

    Args:
        config: The text configuration.
        target: The target.
        visibility: Which positions see which.
    """
    masked = None if visibility == "causal" else TARGETS[target].masked
    asked = [version for version in (masked, decoder_for(config).onnxruntime) if version is not None]
    return max(asked, key=lambda version: tuple(map(int, version.split("."))), default=MIN_ONNXRUNTIME)


def _check_kinds(config: Any) -> None:
    """Refuse kinds of layers that have no angles, where each kind has its own; raises UnsupportedModelError."""
    own = [name for name, rope in (getattr(config, "rope_parameters", None) or {}).items() if isinstance(rope, Mapping)]
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(own)) if own else []
    if unknown:
        raise UnsupportedModelError(
            f"layers of the kind {shorten(repr(unknown[0]))} are not supported for a {config.model_type!r}; supported: "
            f"{', '.join(sorted(own))}"
        )


def _check_rope(rope: Mapping[str, Any], config: Any, target: str) -> None:
    """Refuse rotary angles that cannot be written; raises UnsupportedModelError."""
    decoder, multiple = decoder_for(config), TARGETS[target].head_multiple
    kind = str(rope.get("rope_type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(f"rope type {shorten(repr(kind))} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor") not in (None, 1) and not decoder.is_partial:
        raise UnsupportedModelError(
            f"partial_rotary_factor {shorten(rope['partial_rotary_factor'])} is not supported: the heads of a "
            f"{config.model_type!r} are rotated whole; remove it from text_config"
        )
    if decoder.scales_queries and any(rope.get(name) is None for name in QUERY_SCALE):
        raise UnsupportedModelError(
            f"a {config.model_type!r} decoder scales its queries by {' and '.join(QUERY_SCALE)}; give both in the "
            "rope_parameters of text_config"
        )
    head = head_dim(config)
    turned = int(head * (rope.get("partial_rotary_factor") or 1))
    if head % multiple == 0 and turned % multiple:
        raise UnsupportedModelError(
            f"{turned} numbers of each of the decoder's heads are rotated; {target} wants a multiple of {multiple}"
        )


def head_dim(config: Any) -> int:
    """Return the width of one attention head of a text configuration."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(config: Any) -> int:
    """Return the key and value heads of a text configuration: as many as queries where it does not say."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def context_length(config: Any) -> int:
    """Return up to how many tokens, from the first on, a decoder attends to all of them and turns them by the same angles."""
    kinds = getattr(config, "layer_types", None)
    limits = [config.max_position_embeddings]
    for name, kind in WINDOWS.items():
        window = getattr(config, name, None)
        if window is not None and (kinds is None or kind in kinds):
            limits.append(window)
    ropes = _ropes(config).values()
    limits += [rope["original_max_position_embeddings"] for rope in ropes if rope.get("rope_type") == "longrope"]
    return int(min(limits))


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Return the rotary parameters of each kind of layers, `""` where all turn alike."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ())
    return {kind: given[kind] for kind in sorted(kinds)} if kinds and kinds <= set(given) else {"": given}


def query_scale(config: Any) -> tuple[float, int] | None:
    """Return beta and length of a decoder that scales its queries, as `QUERY_SCALE` says; None for one that does not."""
    if not decoder_for(config).scales_queries:
        return None
    beta, length = (config.rope_parameters[name] for name in QUERY_SCALE)
    return float(beta), int(length)


def rotary_embedding(decoder: Any) -> Any:
    """Return a decoder's rotary embedding as its configuration makes it: with angles in fp32, whatever the decoder is in."""
    return type(decoder.model.rotary_emb)(decoder.config)


def rotary_kinds(decoder: Any) -> list[str]:
    """Return for each layer of a decoder the kind that says by which angles it turns, `""` where all turn alike."""
    config, kinds = decoder.config, _ropes(decoder.config)
    return [kind if kind in kinds else "" for kind in getattr(config, "layer_types", None) or [""] * config.num_hidden_layers]


def rotary_frequencies(decoder: Any, kind: str) -> tuple[Tensor, float]:
    """Return the frequencies (head_dim / 2,) by which layers of a kind turn, and what cosine and sine are multiplied by."""
    rotary, prefix = rotary_embedding(decoder), f"{kind}_" if kind else ""
    return getattr(rotary, f"{prefix}inv_freq"), float(getattr(rotary, f"{prefix}attention_scaling"))


def frequency_axes(decoder: Any) -> Tensor:
    """Return which coordinate of a position each rotary frequency turns by (head_dim / 2,), of a decoder with three.

    The decoder's own code is asked, with positions that are 1 on one axis and 0 on the others: families lay the axes out
    in sections or interleaved.
    """
    _, sin = rotary_embedding(decoder)(torch.zeros(1), torch.eye(3, dtype=torch.long)[:, None])
    axes: Tensor = sin[0, :, : sin.shape[2] // 2].abs().argmax(dim=0)
    return axes


class CausalModel(nn.Module):
    """A causal language model around a checkpoint's layers and head, for those of which transformers has none by itself.

    Args:
        language: The layers.
        head: The output head.
        planes: Further planes of image tokens that it adds behind its first layers, one each (DeepStack, arXiv 2406.04334).
            They stand in the rows of `inputs_embeds` behind the embedding, zeros where there is no image.
    """

    def __init__(self, language: Any, head: nn.Module, planes: int = 0) -> None:
        super().__init__()
        self.model, self.lm_head, self.config, self.planes = language, head, language.config, planes

    def get_input_embeddings(self) -> nn.Module:
        """Return the token table."""
        table: nn.Module = self.model.embed_tokens
        return table

    def forward(self, *, inputs_embeds: Tensor, logits_to_keep: int, **inputs: Any) -> SimpleNamespace:
        """Return the logits (B, logits_to_keep, V) of the last positions of embeddings (B, S, W)."""
        embeddings, *planes = inputs_embeds.chunk(1 + self.planes, dim=2)
        if planes:
            every = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
            inputs |= {"visual_pos_masks": every, "deepstack_visual_embeds": [plane[every] for plane in planes]}
        hidden = self.model(inputs_embeds=embeddings, **inputs).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden[:, -logits_to_keep:]))


def planes_of(decoder: nn.Module) -> int:
    """Return how many further planes of image tokens a decoder adds behind its first layers."""
    return int(getattr(decoder, "planes", 0))


def causal_model(language: Any, head: nn.Module, planes: int = 0) -> nn.Module:
    """Return a causal language model around a checkpoint's own modules: its layers and its output head.

    Args:
        language: The layers.
        head: The output head.
        planes: Further planes of image tokens; see `CausalModel`.
    """
    from transformers import AutoModelForCausalLM

    if decoder_for(language.config).axes == 3:
        return CausalModel(language, head, planes).eval()
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(language.config)
    decoder.model, decoder.lm_head = language, head
    result: nn.Module = decoder.eval()
    return result


def finish(language: Any) -> None:
    """Give real values to what a language model computes from its configuration and no checkpoint stores.

    Raises:
        UnsupportedModelError: This transformers would scale image features with the tokens.
    """
    language.rotary_emb = type(language.rotary_emb)(language.config)
    if decoder_for(language.config).is_scaled:
        table = language.embed_tokens
        if not hasattr(table, "scalar_embed_scale"):
            kind = language.config.model_type
            raise UnsupportedModelError(f"a {kind!r} decoder needs a newer transformers, whose token table scales by itself")
        table.embed_scale = torch.tensor(table.scalar_embed_scale)


def token_rows(decoder: Any, ids: Tensor | None = None) -> Tensor:
    """Return the embeddings of token ids (T,), or of all tokens (V, D), as the decoder reads them.

    The rows of the table, where a decoder scales them in fp32 and scaled; image features are never scaled.
    """
    table = decoder.get_input_embeddings()
    rows: Tensor = table.weight.detach()
    rows = rows if ids is None else rows[ids]
    return rows.float() * torch.tensor(table.scalar_embed_scale) if decoder_for(decoder.config).is_scaled else rows
