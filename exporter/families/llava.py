"""LLaVA (`model_type: llava`): a CLIP or SigLIP tower, an MLP projector, any causal decoder.

The projector reads one hidden state of the tower or several side by side. With the strategy `default` the class token is left
out, with `full` it is an image token like the others, but without a position on the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from leanvlm.exporter import decoders
from leanvlm.exporter.families.base import Attention, Description, Frame, Parts, Saliency
from leanvlm.exporter.families.model_family import ModelFamily, feature_layers, language_model_key
from leanvlm.exporter.image_processor import read_image_processor
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.ranges import DecoderRanges, LlavaRanges, TowerRanges, check_ranges
from leanvlm.exporter.towers.base import BlockTower
from leanvlm.exporter.towers.clip import ClipTower
from leanvlm.exporter.towers.siglip import SiglipTower
from leanvlm.runtime.crops import CropRule, CropShape
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.preprocess import ImageSpec

# The tower's model_type to what scores its tokens.
TOWERS: dict[str, Saliency] = {"clip_vision_model": "class", "siglip_vision_model": "received"}


class LlavaFamily(ModelFamily):
    """LLaVA checkpoints of any size, in the key layouts of all transformers versions."""

    model_type = "llava"
    model: ClassVar[Callable[[Any], nn.Module]] = LlavaForConditionalGeneration
    towers: ClassVar[tuple[str, ...]] = tuple(TOWERS)

    def describe(self, config: Any) -> Description:
        """Read a `LlavaConfig`.

        Raises:
            UnsupportedModelError: A tower, decoder or feature selection that this family does not handle.
            CheckpointError: A number that is not possible.
        """
        self.check_config(config)
        check_ranges(TowerRanges, config.vision_config, "vision_config in config.json")
        check_ranges(DecoderRanges, config.text_config, "text_config in config.json")
        check_ranges(LlavaRanges, config, "config.json")
        vision, strategy = config.vision_config, config.vision_feature_select_strategy
        saliency = TOWERS[vision.model_type]
        if saliency != "class" and strategy != "full":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {strategy!r} would drop a patch: a {vision.model_type!r} tower has no class "
                "token; supported: 'full'"
            )
        side = vision.image_size // vision.patch_size
        return Description(
            grid=(side, side),
            image_size=(vision.image_size, vision.image_size),
            image_token_id=config.image_token_id,
            layers=feature_layers(config.vision_feature_layer, vision.num_hidden_layers),
            blocks=vision.num_hidden_layers,
            saliency=saliency,
            leading=int(saliency == "class" and strategy == "full"),
        )

    def frame(self, config: Any, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Frame:
        """Read what the image processor does: an image is one crop.

        Raises:
            UnsupportedModelError: A step that is not handled, or another size than the tower's.
        """
        image, shape = read_image_processor(processor), self.describe(config).shape
        if image.size != shape.pixels:
            raise UnsupportedModelError(f"the processor makes images of {image.size}, the tower takes {shape.pixels}")
        return Frame(image, CropRule("whole", (shape,)))

    def canonical_key(self, key: str) -> str:
        """Map `language_model.model.x`, `model.language_model.x`, `vision_tower.vision_model.x` … to one spelling."""
        key = language_model_key(key)
        old, new = "vision_tower.vision_model.", "vision_tower."
        return new + key[len(old) :] if key.startswith(old) else key

    def finish(self, model: nn.Module) -> None:
        """Recompute the tower's position ids, and what the decoder computes from its configuration."""
        core: Any = model
        embeddings = self._transformer(model).embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)
        decoders.finish(core.model.language_model)

    def parts(self, model: nn.Module) -> Parts:
        """Take a model apart."""
        core: Any = model
        vision = self._transformer(model)
        description = self.describe(core.config)
        skipped = int(description.saliency == "class" and not description.leading)

        def tower(scored: ScoredBlock, image: ImageSpec | None, shape: CropShape) -> BlockTower:
            block = description.scored_block(scored)
            if description.saliency == "class":
                return ClipTower(vision, description.layers, block, image, skipped=skipped)
            return SiglipTower(vision, description.layers, block, image)

        def attention(block: int) -> Attention:
            module = vision.encoder.layers[block].self_attn
            return Attention(module, module.config, module.num_heads, module.q_proj, module.k_proj)

        return Parts(
            vision=core.model.vision_tower,
            tower=tower,
            project=core.model.multi_modal_projector,
            attention=attention,
            skipped=skipped,
            decoder=decoders.causal_model(core.model.language_model, core.lm_head),
            inputs=lambda pixels, size: {"pixel_values": pixels},
        )

    @staticmethod
    def _transformer(model: nn.Module) -> Any:
        """Return the tower's transformer; some transformers versions keep it one level deeper."""
        tower: Any = model.model.vision_tower  # type: ignore[union-attr]
        return getattr(tower, "vision_model", tower)
