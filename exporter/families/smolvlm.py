"""SmolVLM, SmolVLM2 and Idefics3 (`model_type: smolvlm`, `idefics3`): tiles with marks for row and column, and the whole image.

Every image is enlarged until its longer side is the processor's, then stretched to whole tiles; a thumbnail of that comes last.
9 or 16 patches become one token by a pixel shuffle. The tower has no class token: a token's score is the attention that its
patches receive from all patches, in the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from leanvlm.exporter import decoders
from leanvlm.exporter.families.base import Attention, Description, Frame, Parts
from leanvlm.exporter.families.model_family import ModelFamily, cells_of
from leanvlm.exporter.image_processor import read_tile_processor
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import DecoderRanges, TowerRanges, check_ranges
from leanvlm.exporter.tokenizer import named_token
from leanvlm.exporter.towers.siglip_squares import SiglipSquares
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import Count, Size, shorten

FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
TILE = "<row_{row}_col_{column}>"
STEPS = ("do_image_splitting", "do_pad")


@dataclass(frozen=True)
class SmolVlmRanges:
    """What is outside the parts of a SmolVLM."""

    image_token_id: Count
    scale_factor: Size


class SmolVlmFamily(ModelFamily):
    """SmolVLM and SmolVLM2 checkpoints; names of weights are kept as they are."""

    model_type = "smolvlm"
    model: ClassVar[Callable[[Any], nn.Module]] = SmolVLMForConditionalGeneration
    # The files of some name the model here, not its tower.
    towers: ClassVar[tuple[str, ...]] = ("smolvlm_vision", "idefics3", "smolvlm")
    processors = ("SmolVLMImageProcessor", "Idefics3ImageProcessor")
    # Whether the tokenizer's configuration may name other marks.
    named = True

    def describe(self, config: Any) -> Description:
        """Read a `SmolVLMConfig`.

        Raises:
            UnsupportedModelError: A tower or decoder that this family does not handle.
            CheckpointError: A number that is not possible.
        """
        self.check_config(config)
        vision = config.vision_config
        check_ranges(TowerRanges, vision, "vision_config in config.json")
        check_ranges(DecoderRanges, config.text_config, "text_config in config.json")
        check_ranges(SmolVlmRanges, config, "config.json")
        return Description(
            grid=cells_of(vision.image_size // vision.patch_size, config.scale_factor, "scale_factor"),
            image_size=(vision.image_size, vision.image_size),
            image_token_id=config.image_token_id,
            layers=(vision.num_hidden_layers,),
            blocks=vision.num_hidden_layers,
            saliency="received",
        )

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the processors do."""
        shape = self.describe(config).shape
        spec = read_tile_processor(processor, self.processors, STEPS, shape.pixels)
        edge, tile = (_longest_edge(name, processor.get(name)) for name in ("size", "max_image_size"))
        if (tile, tile) != shape.pixels:
            raise UnsupportedModelError(
                f"max_image_size {shorten(tile)} of the image processor is not the tower's {shape.pixels[0]}"
            )
        given = tokenizer if self.named else {}
        fake, whole = named_token(given, "fake_image_token", FAKE), named_token(given, "global_image_token", GLOBAL)
        layout = Layout(
            before_tile=fake + TILE,
            after_row="\n",
            before_thumbnail="\n" + fake + whole,
            before_whole=fake + whole,
            after=fake,
        )
        if processor.get("do_image_splitting", True):
            return Frame(spec, CropRule("tiles", (shape,), choose="longest_edge", thumbnail="last", longest_edge=edge), layout)
        return Frame(spec, CropRule("whole", (shape,), longest_edge=edge), layout)

    def canonical_key(self, key: str) -> str:
        """Return a weight's name as it is: it has one spelling."""
        return key

    def finish(self, model: nn.Module) -> None:
        """Recompute what the decoder computes from its configuration."""
        core: Any = model
        decoders.finish(core.model.text_model)

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        vision, description, cell = core.model.vision_model, self.describe(core.config), core.config.scale_factor

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> SiglipSquares:
            return SiglipSquares(vision, description.scored_block(scored), image, cell)

        def attention(block: int) -> Attention:
            module = vision.encoder.layers[block].self_attn
            return Attention(module, module.config, module.num_heads, module.q_proj, module.k_proj)

        def inputs(pixels: torch.Tensor, size: tuple[int, int]) -> dict[str, Any]:
            return {"pixel_values": pixels[None]}

        return Parts(
            vision=vision,
            tower=tower,
            project=core.model.connector.modality_projection,
            attention=attention,
            skipped=0,
            decoder=decoders.causal_model(core.model.text_model, core.lm_head),
            inputs=inputs,
            cell=cell,
        )


class Idefics3Family(SmolVlmFamily):
    """Idefics3 checkpoints, and SmolVLM ones that name themselves so; the marks are not the tokenizer's to choose."""

    model_type = "idefics3"
    model: ClassVar[Callable[[Any], nn.Module]] = Idefics3ForConditionalGeneration
    towers: ClassVar[tuple[str, ...]] = ("idefics3_vision", "idefics3")
    named = False


def _longest_edge(name: str, size: Any) -> int:
    """Return a size of the image processor, {"longest_edge": …}; raises UnsupportedModelError."""
    edge = size["longest_edge"] if isinstance(size, Mapping) and set(size) == {"longest_edge"} else None
    if not isinstance(edge, int):
        raise UnsupportedModelError(
            f"the image processor's {name} = {shorten(size)} is not supported; it must be a longest_edge"
        )
    return edge
