"""InternVL 3 and 3.5 (`model_type: internvl`) in transformers' layout: InternViT, a pixel shuffle, an MLP, Qwen2 or Qwen3.

An image is stretched to the grid of tiles whose proportions are nearest to its own, and a thumbnail of it comes last. Four
patches become one token. The class token ranks them, as the tower has one: a token's score is the sum over its patches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import InternVLForConditionalGeneration

from leanvlm.exporter import decoders
from leanvlm.exporter.families.base import Attention, Description, Frame, Parts
from leanvlm.exporter.families.model_family import ModelFamily, cells_of, feature_layers, language_model_key
from leanvlm.exporter.image_processor import check_tile, read_tile_processor
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import DecoderRanges, LlavaRanges, TowerRanges, check_ranges
from leanvlm.exporter.tokenizer import named_token
from leanvlm.exporter.towers.intern_vit import InternVit
from leanvlm.runtime.crops import MAX_TILES, CropRule, CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import shorten


class InternVlFamily(ModelFamily):
    """InternVL checkpoints in transformers' layout (`-hf`)."""

    model_type = "internvl"
    model: ClassVar[Callable[[Any], nn.Module]] = InternVLForConditionalGeneration
    towers: ClassVar[tuple[str, ...]] = ("internvl_vision",)

    def describe(self, config: Any) -> Description:
        """Read an `InternVLConfig`.

        Raises:
            UnsupportedModelError: A decoder, feature selection or tower that this family does not handle.
            CheckpointError: A number that is not possible.
        """
        self.check_config(config)
        vision = config.vision_config
        side, patch = (self._side(name, getattr(vision, name)) for name in ("image_size", "patch_size"))
        numbers = SimpleNamespace(**{**vars(vision), "image_size": side, "patch_size": patch})
        check_ranges(TowerRanges, numbers, "vision_config in config.json")
        check_ranges(DecoderRanges, config.text_config, "text_config in config.json")
        check_ranges(LlavaRanges, config, "config.json")
        if not isinstance(config.vision_feature_layer, int):
            layer = shorten(config.vision_feature_layer)
            raise UnsupportedModelError(f"vision_feature_layer {layer} is not supported: it must be one layer")
        if config.vision_feature_select_strategy != "default":
            strategy = shorten(repr(config.vision_feature_select_strategy))
            raise UnsupportedModelError(f"vision_feature_select_strategy {strategy} is not supported; supported: 'default'")
        return Description(
            grid=cells_of(side // patch, self._cell(config), "downsample_ratio"),
            image_size=(side, side),
            image_token_id=config.image_token_id,
            layers=feature_layers(config.vision_feature_layer, vision.num_hidden_layers),
            blocks=vision.num_hidden_layers,
        )

    @staticmethod
    def _side(name: str, size: Any) -> int:
        """Return the side of a square that a configuration writes as a number or as a pair."""
        height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
        if height != width or not isinstance(height, int):
            raise UnsupportedModelError(f"{name} {shorten(size)} is not supported: it must be a square")
        return height

    @staticmethod
    def _cell(config: Any) -> int:
        """Return the patches on each side of what becomes one token."""
        ratio = config.downsample_ratio
        cell = round(1 / ratio) if 0 < ratio <= 1 else 0
        if not cell or cell * ratio != 1:
            raise UnsupportedModelError(f"downsample_ratio {shorten(ratio)} is not supported: it must be 1, 1/2, 1/4, …")
        return cell

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the processors do; tiles are cut even where the image processor's `crop_to_patches` says no."""
        shape = self.describe(config).shape
        spec = read_tile_processor(processor, ["GotOcr2ImageProcessor"], [], shape.pixels)
        check_tile("size", processor.get("size"), shape)
        least, most = processor.get("min_patches", 1), processor.get("max_patches", 12)
        if [type(least), type(most)] != [int, int] or not 1 <= least <= most < MAX_TILES:
            raise UnsupportedModelError(
                f"the image processor's min_patches {shorten(least)} and max_patches {shorten(most)} are not supported"
            )
        marks = (("start_image_token", "<img>"), ("end_image_token", "</img>"))
        start, end = (named_token(tokenizer, name, usual) for name, usual in marks)
        layout = Layout(before=start, after=end)
        if most == 1:
            return Frame(spec, CropRule("whole", (shape,)), layout)
        # By area, and of one area by columns: which of two equally good ones counts depends on the order.
        sizes = [(rows, columns) for columns in range(1, most + 1) for rows in range(1, most + 1)]
        known = sorted((one for one in sizes if least <= one[0] * one[1] <= most), key=lambda one: one[0] * one[1])
        rule = CropRule("tiles", (shape,), choose="aspect", arrangements=tuple(known), thumbnail="last")
        return Frame(spec, rule, layout)

    def canonical_key(self, key: str) -> str:
        """Map a weight's name to one spelling."""
        return language_model_key(key)

    def finish(self, model: nn.Module) -> None:
        """Recompute what the decoder computes from its configuration."""
        core: Any = model
        decoders.finish(core.model.language_model)

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        vision, description = core.model.vision_tower, self.describe(core.config)
        (layer,), cell = description.layers, self._cell(core.config)
        # Only what is read as the tower's result has gone through its last norm.
        norm = vision.layernorm if core.config.vision_feature_layer == -1 else None

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> InternVit:
            return InternVit(vision, layer, description.scored_block(scored), image, norm, cell)

        def attention(block: int) -> Attention:
            module = vision.encoder.layer[block].attention
            return Attention(module, module.config, module.num_heads, module.q_norm, module.k_norm)

        def inputs(pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
            return {"pixel_values": pixels}

        return Parts(
            vision=vision,
            tower=tower,
            project=core.model.multi_modal_projector,
            attention=attention,
            skipped=1,
            decoder=decoders.causal_model(core.model.language_model, core.lm_head),
            inputs=inputs,
            cell=cell,
        )
