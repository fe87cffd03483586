"""Mistral 3 and Ministral 3 (`model_type: mistral3`): a Pixtral tower, 2 x 2 patches to a token, tokens between the lines.

An image becomes one crop of the nearest shape of a ladder, where transformers would take whatever size its rule gives: its
longer side is limited, and both are rounded up to whole tokens. In the prompt `[IMG_BREAK]` stands between the lines of its
tokens and `[IMG_END]` behind the last: tokens of the vocabulary like any other. Of a pruned image only the lines of which
something is kept are there: breaks stand between these, and `[IMG_END]` behind the last of them.

The tower has no class token: a token's score is the attention that its patches receive from all patches in the block below the
features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn
from transformers import Mistral3ForConditionalGeneration

from leanvlm.exporter import decoders
from leanvlm.exporter.families.base import Attention, Description, Frame, Parts
from leanvlm.exporter.families.model_family import ModelFamily, feature_layers, language_model_key
from leanvlm.exporter.image_processor import ProcessorError, read_tile_processor
from leanvlm.exporter.ladder import usual_shapes
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import (
    DecoderRanges,
    Heads,
    Inner,
    Layers,
    LlavaRanges,
    Width,
    check_activation,
    check_axial_heads,
    check_ranges,
)
from leanvlm.exporter.tokenizer import named_token
from leanvlm.exporter.towers.pixtral import MergedPatches, PixtralTower
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import Between, shorten


@dataclass(frozen=True)
class PixtralRanges:
    """A vision tower."""

    hidden_size: Width
    intermediate_size: Inner
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_channels: Literal[3]
    patch_size: Annotated[int, Between(1, 512)]
    hidden_act: str

    def __post_init__(self) -> None:
        check_activation("hidden_act", self.hidden_act)
        check_axial_heads(self.hidden_size, self.num_attention_heads)


@dataclass(frozen=True)
class Mistral3Ranges(LlavaRanges):
    """What is outside the parts of a Mistral 3."""

    spatial_merge_size: Annotated[int, Between(1, 16)]


class Mistral3Family(ModelFamily):
    """Mistral 3 and Ministral 3 checkpoints, in the key layouts of all transformers versions."""

    model_type = "mistral3"
    model: ClassVar[Callable[[Any], nn.Module]] = Mistral3ForConditionalGeneration
    towers: ClassVar[tuple[str, ...]] = ("pixtral",)

    def describe(self, config: Any) -> Description:
        """Read a `Mistral3Config`.

        Raises:
            UnsupportedModelError: A tower, decoder or feature selection that this family does not handle.
            CheckpointError: A number that is not possible.
        """
        self.check_config(config)
        vision = config.vision_config
        check_ranges(PixtralRanges, vision, "vision_config in config.json")
        check_ranges(DecoderRanges, config.text_config, "text_config in config.json")
        check_ranges(Mistral3Ranges, config, "config.json")
        layers = feature_layers(config.vision_feature_layer, vision.num_hidden_layers)
        if len(layers) > 1:
            named = shorten(config.vision_feature_layer)
            raise UnsupportedModelError(
                f"vision_feature_layer {named} is not supported: the projector's norm is as wide as one hidden state"
            )
        side = config.spatial_merge_size * vision.patch_size
        return Description(
            # Of the least image; what an export takes is in its frame.
            grid=(1, 1),
            image_size=(side, side),
            image_token_id=config.image_token_id,
            layers=layers,
            blocks=vision.num_hidden_layers,
            saliency="received",
            # Not tried.
            rounds=False,
        )

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the processors do.

        Raises:
            UnsupportedModelError: A step that is not handled, or a size that is none.
        """
        factor, longest = self.describe(config).image_size[0], _longest(processor.get("size"))
        # The image processor's own patch_size is not read: transformers hands it that of the tower's tokens.
        shapes = usual_shapes(factor, longest)
        spec = read_tile_processor(processor, ["PixtralImageProcessor"], ["do_pad"], shapes[0].pixels)
        if processor.get("do_center_crop"):
            raise ProcessorError("the image processor's do_center_crop is not supported: an image is shown whole")
        marks = (("image_break_token", "[IMG_BREAK]"), ("image_end_token", "[IMG_END]"))
        line_break, end = (named_token(tokenizer, name, usual) for name, usual in marks)
        return Frame(spec, CropRule("nearest", shapes, longest_edge=longest), Layout(after=end, line_break=line_break))

    def canonical_key(self, key: str) -> str:
        """Map a weight's name, such as `language_model.model.x` and `model.language_model.x`, to one spelling."""
        return language_model_key(key)

    def finish(self, model: nn.Module) -> None:
        """Recompute what tower and decoder compute from their configurations."""
        core: Any = model
        tower = core.model.vision_tower
        tower.patch_positional_embedding = type(tower.patch_positional_embedding)(tower.config)
        decoders.finish(core.model.language_model)

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        vision, projector, description = core.model.vision_tower, core.model.multi_modal_projector, self.describe(core.config)
        (layer,), cell = description.layers, core.config.spatial_merge_size

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> PixtralTower:
            return PixtralTower(vision, layer, description.scored_block(scored), image, shape, cell)

        def attention(block: int) -> Attention:
            module = vision.transformer.layers[block].attention
            return Attention(module, module.config, module.num_heads, given=projector)

        def inputs(pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
            return {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[2:]] * len(pixels))}

        return Parts(
            vision=vision,
            tower=tower,
            project=MergedPatches(projector, cell),
            attention=attention,
            skipped=0,
            decoder=decoders.causal_model(core.model.language_model, core.lm_head),
            inputs=inputs,
            cell=cell,
            order=lambda shape: torch.arange(cell * cell * shape.tokens),
        )


def _longest(size: Any) -> int:
    """Return the most that an image processor leaves of an image's longer side; raises ProcessorError."""
    longest = size.get("longest_edge") if isinstance(size, Mapping) else None
    if type(longest) is not int or longest < 1:
        raise ProcessorError(
            f"the image processor's size {shorten(size)} is not supported: longest_edge is the most pixels of the longer side"
        )
    return longest
