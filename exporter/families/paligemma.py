"""PaliGemma (`model_type: paligemma`): SigLIP, a linear projector, and a Gemma that reads all of a prompt both ways.

An image is stretched to the tower's size; every patch is a token. The tower has no class token: a patch is scored by the
attention that it receives from all patches, in the last block. Checkpoints have no chat template: images, the first token, the
question and a line break are what their processor puts together. Positions count from 1 there, which turns nothing: angles
between positions are their differences'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn
from transformers import PaliGemmaForConditionalGeneration

from leanvlm.exporter.families.base import Description, Frame, Parts
from leanvlm.exporter.families.llava import LlavaFamily
from leanvlm.exporter.image_processor import check_tile, read_tile_processor
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import DecoderRanges, ImageTokenRanges, TowerRanges, check_ranges
from leanvlm.exporter.tokenizer import named_token
from leanvlm.exporter.towers.siglip import SiglipTower
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.preprocess import ImageSpec

IMAGE = "<image>"
# Of a question about images: what these checkpoints were trained with is one turn.
TEMPLATE = """\
{%- if messages | length > 1 %}{{ raise_exception('this model answers one question, without turns before it') }}{% endif -%}
{%- for part in messages[0]['content'] if part['type'] == 'image' %}@{% endfor -%}
{{- bos_token -}}
{%- for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{{- '\\n' -}}
"""


class PaliGemmaFamily(LlavaFamily):
    """PaliGemma checkpoints; names of weights are as LLaVA's."""

    model_type = "paligemma"
    model: ClassVar[Callable[[Any], nn.Module]] = PaliGemmaForConditionalGeneration
    towers: ClassVar[tuple[str, ...]] = ("siglip_vision_model",)
    texts: ClassVar[tuple[str, ...]] = ("gemma",)

    def describe(self, config: Any) -> Description:
        """Read a `PaliGemmaConfig`.

        Raises:
            UnsupportedModelError: A tower or decoder that this family does not handle.
            CheckpointError: A number that is not possible.
        """
        self.check_config(config)
        vision = config.vision_config
        check_ranges(TowerRanges, vision, "vision_config in config.json")
        check_ranges(DecoderRanges, config.text_config, "text_config in config.json")
        check_ranges(ImageTokenRanges, config, "config.json")
        side = vision.image_size // vision.patch_size
        return Description(
            grid=(side, side),
            image_size=(vision.image_size, vision.image_size),
            image_token_id=config.image_token_id,
            layers=(vision.num_hidden_layers,),
            blocks=vision.num_hidden_layers,
            saliency="received",
        )

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the processors do: an image is one crop."""
        shape = self.describe(config).shape
        spec = read_tile_processor(processor, ("SiglipImageProcessor",), (), shape.pixels)
        check_tile("size", processor.get("size"), shape)
        template = TEMPLATE.replace("@", named_token(tokenizer, "image_token", IMAGE))
        return Frame(spec, CropRule("whole", (shape,)), visibility="prefix", template=template, begun=False)

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        vision, layers = self._transformer(model), self.describe(core.config).layers

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> SiglipTower:
            return SiglipTower(vision, layers, layers[0] - 1, image, vision.post_layernorm)

        return replace(super().parts(model), tower=tower)
