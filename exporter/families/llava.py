"""LLaVA-1.5 (`model_type: llava`): a CLIP tower, an MLP projector, a Llama-type decoder.

The tower is cut at the feature layer or at the scored block, whichever is deeper; what lies behind never runs. The class
token's attention of the scored block is computed apart, one row only: every block keeps its fused attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from leanvlm.exporter.families.base import FamilySpec
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.towers.patches import LevelPatches
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.preprocess import ImageSpec

DECODERS = ("llama",)


class ClipTower(nn.Module):
    """The first blocks of a CLIP vision model: the hidden states `feature_layer`, with the scores of block `scored`.

    Shapes: pixel_values (B, 3, H, W) -> hidden (B, N, Dv), keys (B, N, H, d), attention and unsplit attention (B, N) in fp32.
    With `image`, the pixels are uint8 levels and the processor's normalisation is folded in.
    """

    def __init__(self, clip: nn.Module, feature_layer: int, scored: int, image: ImageSpec | None = None) -> None:
        super().__init__()
        self.patches = None if image is None else LevelPatches(clip.embeddings.patch_embedding, image)  # type: ignore[union-attr]
        self.feature_layer, self.scored = feature_layer, scored
        self.embeddings: Any = clip.embeddings
        self.pre_norm: Any = clip.pre_layrnorm
        depth = max(feature_layer, scored + 1)
        self.blocks = nn.ModuleList(list(clip.encoder.layers)[:depth])  # type: ignore[union-attr,arg-type]

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the tower; the class token is left out of all results."""
        states = [self.pre_norm(self._embed(pixel_values))]
        # Of a scored block behind the feature layer only the scores are computed.
        for block in self.blocks[: max(self.feature_layer, self.scored)]:
            states.append(block(states[-1], None))
        keys, attention, unsplit = self._class_attention(self.blocks[self.scored], states[self.scored])
        return states[self.feature_layer][:, 1:], keys[:, 1:], attention[:, 1:], unsplit[:, 1:]

    def _embed(self, pixel_values: Tensor) -> Tensor:
        if self.patches is None:
            patches = self.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # (B, N, Dv)
        else:
            patches = self.patches(pixel_values)
        first = self.embeddings.class_embedding.expand(patches.shape[0], 1, -1)
        position: Tensor = self.embeddings.position_embedding.weight
        return torch.cat([first, patches], dim=1) + position

    @staticmethod
    def _class_attention(block: Any, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the keys (B, N + 1, H, d) and softmax(q_cls K^T), averaged over heads and un-split, both (B, N + 1)."""
        attn = block.self_attn
        states = block.layer_norm1(states)
        query, keys = attn.q_proj(states[:, :1]).float(), attn.k_proj(states)  # (B, 1, Dv), (B, N + 1, Dv)
        split = keys.unflatten(2, (-1, attn.head_dim))
        heads = query.unflatten(2, (-1, attn.head_dim)).transpose(1, 2)  # (B, H, 1, d)
        scores = (heads * attn.scale) @ split.float().permute(0, 2, 3, 1)
        unsplit = (query * query.shape[2] ** -0.5) @ keys.float().transpose(1, 2)
        return split, scores.softmax(dim=-1).mean(dim=1)[:, 0], unsplit.softmax(dim=-1)[:, 0]


class LlavaFamily:
    """LLaVA-1.5 checkpoints of any size, in the key layouts of all transformers versions."""

    model_type = "llava"

    def spec(self, config: Any) -> FamilySpec:
        """Read sizes from a `LlavaConfig`.

        Raises:
            UnsupportedModelError: A tower, decoder, feature selection or projector that this family does not handle.
        """
        self._check(config)
        vision, layer = config.vision_config, self._layers(config)[0]
        depth = vision.num_hidden_layers
        feature_layer = layer if layer >= 0 else depth + 1 + layer
        if not 1 <= feature_layer <= depth:
            raise UnsupportedModelError(f"vision_feature_layer {layer} is outside a tower of {depth} blocks")
        side = vision.image_size // vision.patch_size
        return FamilySpec(
            tokens_per_crop=side * side,
            grid=(side, side),
            image_size=(vision.image_size, vision.image_size),
            image_token_id=config.image_token_id,
            feature_layer=feature_layer,
            blocks=depth,
        )

    @staticmethod
    def _layers(config: Any) -> list[int]:
        """Return the vision feature layers, of which a configuration names one, as a number or in a list."""
        layers = config.vision_feature_layer
        return [layers] if isinstance(layers, int) else list(layers)

    @staticmethod
    def _check(config: Any) -> None:
        vision, text = config.vision_config.model_type, config.text_config.model_type
        if vision != "clip_vision_model":
            raise UnsupportedModelError(f"LLaVA with a {vision!r} tower is not supported; supported: clip_vision_model")
        if text not in DECODERS:
            raise UnsupportedModelError(f"LLaVA with a {text!r} decoder is not supported; supported: {', '.join(DECODERS)}")
        if len(LlavaFamily._layers(config)) != 1:
            raise UnsupportedModelError("LLaVA with several vision feature layers is not supported; supported: one layer")
        if config.vision_feature_select_strategy != "default":
            strategy = config.vision_feature_select_strategy
            raise UnsupportedModelError(f"vision_feature_select_strategy {strategy!r} is not supported; supported: 'default'")

    def empty(self, config: Any) -> nn.Module:
        """Build the model on the meta device: structure, no memory."""
        with torch.device("meta"):
            model: nn.Module = LlavaForConditionalGeneration(config)
        return model.eval()

    def canonical_key(self, key: str) -> str:
        """Map `language_model.model.x`, `model.language_model.x`, `vision_tower.vision_model.x` … to one spelling."""
        key = key.removeprefix("model.")
        for old, new in (
            ("language_model.model.", "language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.vision_model.", "vision_tower."),
        ):
            if key.startswith(old):
                return new + key[len(old) :]
        return key

    def materialise_buffers(self, model: nn.Module) -> None:
        """Recompute the tower's position ids and the decoder's rotary frequencies, which checkpoints do not store."""
        core: Any = model
        embeddings = self._clip(model).embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)
        language = core.model.language_model
        language.rotary_emb = type(language.rotary_emb)(language.config)

    def tower(self, model: nn.Module, scored: ScoredBlock = "feature", image: ImageSpec | None = None) -> nn.Module:
        """Return the CLIP tower up to the feature layer, or to the scored block behind it; for levels if `image` is given."""
        config: Any = model.config
        spec = self.spec(config)
        return ClipTower(self._clip(model), spec.feature_layer, spec.scored_block(scored), image)

    def projector(self, model: nn.Module) -> nn.Module:
        """Return the two-layer MLP."""
        projector: nn.Module = model.model.multi_modal_projector  # type: ignore[union-attr,assignment]
        return projector

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return a causal language model of the text configuration around the checkpoint's own modules."""
        core: Any = model
        with torch.device("meta"):
            decoder: Any = AutoModelForCausalLM.from_config(core.config.text_config)
        decoder.model, decoder.lm_head = core.model.language_model, core.lm_head
        result: nn.Module = decoder.eval()
        return result

    def embed_tokens(self, model: nn.Module) -> Tensor:
        """Return the decoder's token table (V, D)."""
        core: Any = model
        table: Tensor = core.model.language_model.embed_tokens.weight
        return table.detach()

    @staticmethod
    def _clip(model: nn.Module) -> Any:
        """Return the CLIP transformer; some transformers versions keep it one level deeper."""
        tower: Any = model.model.vision_tower  # type: ignore[union-attr]
        return getattr(tower, "vision_model", tower)
