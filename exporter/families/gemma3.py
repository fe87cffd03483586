"""Gemma 3 (`model_type: gemma3`): SigLIP, the means of its patches, and a decoder in which an image's tokens see each other.

An image is stretched to the tower's size; 16 patches become one token. What stands around the tokens is written into the prompt
in place of the token that begins an image. The tower has no class token: a token's score is the attention that its patches
receive from all patches, in the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration

from leanvlm.exporter.families.base import Description, Frame, Parts
from leanvlm.exporter.families.llava import LlavaFamily
from leanvlm.exporter.families.model_family import cells_of
from leanvlm.exporter.image_processor import check_tile, read_tile_processor
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import DecoderRanges, TowerRanges, check_ranges
from leanvlm.exporter.tokenizer import named_token
from leanvlm.exporter.towers.siglip import PooledSiglip
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.layout import Layout
from leanvlm.runtime.preprocess import ImageSpec
from leanvlm.runtime.records import Count, Size, shorten

START, END = "<start_of_image>", "<end_of_image>"


@dataclass(frozen=True)
class Gemma3Ranges:
    """What is outside the parts of a Gemma 3."""

    image_token_id: Count
    mm_tokens_per_image: Size


class Gemma3Family(LlavaFamily):
    """Gemma 3 checkpoints that take images; names of weights are as LLaVA's."""

    model_type = "gemma3"
    model: ClassVar[Callable[[Any], nn.Module]] = Gemma3ForConditionalGeneration
    towers: ClassVar[tuple[str, ...]] = ("siglip_vision_model",)
    texts: ClassVar[tuple[str, ...]] = ("gemma3_text",)

    def describe(self, config: Any) -> Description:
        """Read a `Gemma3Config`.

        Raises:
            UnsupportedModelError: A tower or decoder that this family does not handle, or patches that make no whole tokens.
            CheckpointError: A number that is not possible.
        """
        self.check_config(config)
        vision = config.vision_config
        check_ranges(TowerRanges, vision, "vision_config in config.json")
        check_ranges(DecoderRanges, config.text_config, "text_config in config.json")
        check_ranges(Gemma3Ranges, config, "config.json")
        return Description(
            grid=cells_of(vision.image_size // vision.patch_size, self.cell(config), "mm_tokens_per_image"),
            image_size=(vision.image_size, vision.image_size),
            image_token_id=config.image_token_id,
            layers=(vision.num_hidden_layers,),
            blocks=vision.num_hidden_layers,
            saliency="received",
            # The projector multiplies by a bare matrix.
            rounds=False,
        )

    @staticmethod
    def cell(config: Any) -> int:
        """Return the patches on each side of what becomes one token.

        Raises:
            UnsupportedModelError: Tokens that are no square, or a side of them that is none of the patches' parts.
        """
        patches, count = config.vision_config.image_size // config.vision_config.patch_size, config.mm_tokens_per_image
        side = isqrt(count)
        if side**2 != count or patches % side:
            raise UnsupportedModelError(
                f"mm_tokens_per_image {shorten(count)} is not supported: it must be a square whose side divides the {patches} "
                "patches of a row"
            )
        return int(patches // side)

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the processors do: an image is one crop. What they cut out of long ones (pan and scan) is refused."""
        shape = self.describe(config).shape
        spec = read_tile_processor(processor, ("Gemma3ImageProcessor",), (), shape.pixels)
        check_tile("size", processor.get("size"), shape)
        start, end = named_token(tokenizer, "boi_token", START), named_token(tokenizer, "eoi_token", END)
        layout = Layout(written=start, before=f"\n\n{start}", after=f"{end}\n\n")
        return Frame(spec, CropRule("whole", (shape,)), layout, visibility="blocks")

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        vision, cell = self._transformer(model), self.cell(core.config)
        projector, block = core.model.multi_modal_projector, self.describe(core.config).blocks - 1

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> PooledSiglip:
            return PooledSiglip(vision, block, image, projector.avg_pool, cell)

        project = Projector(projector)
        return replace(super().parts(model), tower=tower, project=project, entry=projector.mm_soft_emb_norm, cell=cell)


class Projector(nn.Module):
    """The part of a Gemma 3's projector behind its pooling: hidden states (B, N, Dv) -> features (B, N, D)."""

    def __init__(self, projector: Any) -> None:
        super().__init__()
        self.norm = projector.mm_soft_emb_norm
        self.weight = projector.mm_input_projection_weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm and project."""
        return torch.matmul(self.norm(hidden), self.weight).type_as(hidden)
