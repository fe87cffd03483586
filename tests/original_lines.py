"""A tiny checkpoint of a family whose images' lines end with tokens, as transformers runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from original_sizes import SizedOriginal
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.pixtral.modeling_pixtral import apply_rotary_pos_emb


class LinedOriginal(SizedOriginal):
    """A Mistral 3, in fp32: positions are numbers, and the ends of lines are text."""

    @staticmethod
    def open_processor(folder: Path, config: Any) -> Any:
        """Open its own processor; what that takes of the image processor for torchvision is in Pillow's too."""
        sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", image_processing_pil_pixtral)
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

        tokenizer = AutoTokenizer.from_pretrained(folder)
        return PixtralProcessor(
            image_processor=AutoImageProcessor.from_pretrained(folder), tokenizer=tokenizer, image_token="<image>",
            patch_size=config.vision_config.patch_size, spatial_merge_size=config.spatial_merge_size,
            chat_template=tokenizer.chat_template,
        )  # fmt: skip

    def positions(self, inputs: Any) -> torch.Tensor:
        """Return the positions (1, S) of a prompt."""
        return torch.arange(inputs["input_ids"].shape[1])[None]

    @torch.no_grad()
    def encoded(self, inputs: Any) -> Any:
        """Return what the model makes of the images."""
        return self.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])

    @torch.no_grad()
    def projected(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features (C, N, D) of pixel values (C, 3, H, W)."""
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
        return torch.stack(self.features({"pixel_values": pixels, "image_sizes": sizes}))

    @torch.no_grad()
    def scores(self, inputs: Any) -> list[Any]:
        """Return the attention that each token (N,) of each image receives in the block below the features."""
        config, seen = self.model.config, {}
        layers = self.model.model.vision_tower.transformer.layers
        block = layers[config.vision_feature_layer % (len(layers) + 1) - 1].attention
        handles = [
            block.register_forward_pre_hook(lambda m, a, k: seen.update(turns=k["position_embeddings"]), with_kwargs=True),
            block.q_proj.register_forward_hook(lambda m, a, out: seen.update(query=out[0])),
            block.k_proj.register_forward_hook(lambda m, a, out: seen.update(key=out[0])),
        ]
        self.features(inputs)
        for handle in handles:
            handle.remove()
        query, key = (seen[name].unflatten(1, (block.num_heads, -1)).transpose(0, 1) for name in ("query", "key"))
        query, key = apply_rotary_pos_emb(query, key, *seen["turns"], unsqueeze_dim=0)
        scores, begin, cell = [], 0, config.spatial_merge_size
        for height, width in (inputs["image_sizes"] // config.vision_config.patch_size).tolist():
            part = slice(begin, begin + height * width)
            attention = query[:, part].double() @ key[:, part].double().mT * key.shape[2] ** -0.5
            received = attention.softmax(dim=2).mean(dim=(0, 1))
            scores.append(received.view(height // cell, cell, width // cell, cell).sum(dim=(1, 3)).flatten().numpy())
            begin += height * width
        return scores

    @torch.no_grad()
    def pruned(self, inputs: Any, choices: list[list[int]]) -> tuple[list[int], torch.Tensor]:
        """Return the greedy answer to a prompt with the chosen image tokens and breaks between their lines; its positions."""
        config, table = self.model.config, self.model.get_input_embeddings().weight
        broken, ended = self.processor.image_break_token_id, self.processor.image_end_token_id
        columns = (inputs["image_sizes"][:, 1] // config.vision_config.patch_size // config.spatial_merge_size).tolist()
        images = iter(zip(self.features(inputs), choices, columns, strict=True))
        rows, inside = [], False
        for token in inputs["input_ids"][0].tolist():
            if token == config.image_token_id and not inside:
                features, kept, width = next(images)
                for before, number in zip([kept[0], *kept], kept, strict=False):
                    rows += [table[broken]] * (number // width > before // width) + [features[number]]
            inside = token == config.image_token_id or (inside and token == broken)
            rows += [] if inside else [table[token]]
        assert next(images, None) is None
        assert ended in inputs["input_ids"]
        positions = torch.arange(len(rows))[None]
        return self.greedy(torch.stack(rows), positions, len(rows)), positions
