"""Qwen2.5-VL (`model_type: qwen2_5_vl`): images of any size, a ViT with windows, 2 x 2 patches to a token, M-RoPE.

An image becomes one crop of the nearest shape of a ladder, where transformers would take whatever size its rule gives. A token
has the row and column of its place for positions, and keeps them when others are pruned. The tower has no class token: a
token's score is the attention that its patches receive from all patches in the last block without windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from leanvlm.exporter import decoders
from leanvlm.exporter.families.base import Attention, Description, Frame, Parts
from leanvlm.exporter.families.model_family import ModelFamily
from leanvlm.exporter.image_processor import ProcessorError, read_tile_processor
from leanvlm.exporter.ladder import usual_shapes
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import (
    DecoderRanges,
    Heads,
    Inner,
    Layers,
    Width,
    check_activation,
    check_axial_heads,
    check_ranges,
)
from leanvlm.exporter.towers.qwen_vit import CELL, MergedTokens, QwenVit, packed_patches, packed_places
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.errors import CheckpointError, UnsupportedModelError
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import Between, Count, shorten

# Frames of a video that the patch convolution takes at once; of a picture both are the same.
FRAMES = 2


@dataclass(frozen=True)
class QwenTowerRanges:
    """A vision tower."""

    hidden_size: Width
    intermediate_size: Inner
    depth: Layers
    num_heads: Heads
    in_channels: Literal[3]
    patch_size: Annotated[int, Between(1, 512)]
    spatial_merge_size: Literal[2]
    temporal_patch_size: Literal[2]
    hidden_act: str

    def __post_init__(self) -> None:
        check_activation("hidden_act", self.hidden_act)
        check_axial_heads(self.hidden_size, self.num_heads)


@dataclass(frozen=True)
class QwenRanges:
    """What is outside the parts of a Qwen-VL."""

    image_token_id: Count


class Qwen25VlFamily(ModelFamily):
    """Qwen2.5-VL checkpoints, in the key layouts of all transformers versions."""

    model_type = "qwen2_5_vl"
    model: ClassVar[Callable[[Any], nn.Module]] = Qwen2_5_VLForConditionalGeneration
    # Older files name the model there.
    towers: ClassVar[tuple[str, ...]] = ("qwen2_5_vl_vision", "qwen2_5_vl")
    texts: ClassVar[tuple[str, ...]] = ("qwen2_5_vl_text",)
    processor = "Qwen2VLImageProcessor"

    def describe(self, config: Any) -> Description:
        """Read a configuration.

        Raises:
            UnsupportedModelError: A tower or decoder that this family does not handle.
            CheckpointError: A number that is not possible.
        """
        self.check_config(config)
        vision = config.vision_config
        check_ranges(QwenTowerRanges, vision, "vision_config in config.json")
        check_ranges(DecoderRanges, config.text_config, "text_config in config.json")
        check_ranges(QwenRanges, config, "config.json")
        if vision.out_hidden_size != config.text_config.hidden_size:
            raise CheckpointError(
                f"out_hidden_size {shorten(vision.out_hidden_size)} of vision_config is not the decoder's "
                f"{config.text_config.hidden_size}"
            )
        side = CELL * vision.patch_size
        return Description(
            # Of the least image; what an export takes is in its frame.
            grid=(1, 1),
            image_size=(side, side),
            image_token_id=config.image_token_id,
            layers=(vision.depth,),
            blocks=vision.depth,
            saliency="received",
            scored=self.whole(vision)[-1],
            # A tiny one was off by 1e-2; why was not found out.
            rounds=False,
        )

    def whole(self, vision: Any) -> list[int]:
        """Return the blocks that see the whole image.

        Raises:
            UnsupportedModelError: None does, or windows are no whole number of tokens.
        """
        listed, side = vision.fullatt_block_indexes, CELL * vision.patch_size
        known = isinstance(listed, (list, tuple)) and all(type(at) is int and 0 <= at < vision.depth for at in listed)
        if not known or not listed:
            raise UnsupportedModelError(
                f"fullatt_block_indexes {shorten(listed)} is not supported: it must list some of the {vision.depth} blocks"
            )
        if type(vision.window_size) is not int or vision.window_size < side:
            raise UnsupportedModelError(
                f"window_size {shorten(vision.window_size)} is not supported: a token has {side} pixels"
            )
        return sorted(listed)

    def window(self, vision: Any) -> int | None:
        """Return the tokens on each side of a window."""
        return int(vision.window_size) // CELL // int(vision.patch_size)

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the image processor does."""
        vision, factor = config.vision_config, self.describe(config).image_size[0]
        fields = {"patch_size": vision.patch_size, "merge_size": CELL, "temporal_patch_size": FRAMES}
        for name, wanted in fields.items():
            if processor.get(name) != wanted:
                given = shorten(processor.get(name))
                raise ProcessorError(f"the image processor's {name} = {given} is not the tower's {wanted}")
        pixels = _pixels(processor.get("size"), factor)
        shapes = usual_shapes(factor, pixels)
        spec = read_tile_processor(processor, [self.processor], [], shapes[0].pixels)
        return Frame(spec, CropRule("nearest", shapes, pixels=pixels), axes=3)

    def canonical_key(self, key: str) -> str:
        """Map `model.layers.x`, `model.language_model.layers.x`, `model.visual.x`, `visual.x` to one spelling."""
        return key.removeprefix("model.").removeprefix("language_model.")

    def finish(self, model: nn.Module) -> None:
        """Recompute what tower and decoder compute from their configurations."""
        core: Any = model
        visual = core.model.visual
        visual.rotary_pos_emb = type(visual.rotary_pos_emb)(visual.config)
        decoders.finish(core.model.language_model)

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        visual = core.model.visual
        window, whole = self.window(visual.config), self.whole(visual.config)

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> QwenVit:
            return QwenVit(visual, shape, whole[-1], image, window=window, whole=whole)

        def attention(block: int) -> Attention:
            module = visual.blocks[block].attn
            return Attention(module, module.config, module.num_heads, given=visual.merger)

        def inputs(pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
            patches, grid = packed_patches(pixels, visual.config.patch_size)
            return {"pixel_values": patches, "image_grid_thw": grid}

        return Parts(
            vision=visual,
            tower=tower,
            project=MergedTokens(visual.merger),
            attention=attention,
            skipped=0,
            decoder=decoders.causal_model(core.model.language_model, core.lm_head),
            inputs=inputs,
            cell=CELL,
            order=lambda shape: packed_places(shape.grid, window),
        )


def _pixels(size: Any, factor: int) -> tuple[int, int]:
    """Return the least and the most pixels that an image processor makes of an image; raises ProcessorError."""
    given = size if isinstance(size, Mapping) else {}
    least, most = given.get("shortest_edge"), given.get("longest_edge")
    if type(least) is not int or type(most) is not int or not 1 <= least <= most or most < factor * factor:
        raise ProcessorError(
            f"the image processor's size {shorten(size)} is not supported: shortest_edge and longest_edge are the least and "
            f"the most pixels of an image, which is whole tokens of {factor} x {factor}"
        )
    return least, most
