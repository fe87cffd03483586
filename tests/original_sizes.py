"""A tiny checkpoint of a family whose images have a size and a place, as transformers runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import reference
import torch
import transformers
from original import NEW_TOKENS
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from leanvlm.exporter import tolerances
from leanvlm.exporter.pruners.gates import exact_effective_rank

PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor", "qwen3_5": "Qwen3VLProcessor"}


@dataclass(frozen=True)
class SizedOriginal:
    """A tiny checkpoint as transformers runs it, in fp32."""

    folder: Path
    model: Any
    processor: Any

    @classmethod
    def open(cls, folder: Path) -> SizedOriginal:
        """Load one from its files, with its own processor, but for the part for videos, which needs torchvision."""
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(folder, model, cls.open_processor(folder, model.config))

    @staticmethod
    def open_processor(folder: Path, config: Any) -> Any:
        """Open a checkpoint's own processor."""
        kind: Any = getattr(transformers, PROCESSORS[config.model_type])

        class WithoutVideos(kind):  # type: ignore[misc]
            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
                if argument_name != "video_processor":
                    return super().check_argument_for_proper_class(argument_name, argument)
                return None

        tokenizer = AutoTokenizer.from_pretrained(folder)
        videos = SimpleNamespace(model_input_names=[])
        return WithoutVideos(
            image_processor=AutoImageProcessor.from_pretrained(folder), tokenizer=tokenizer, video_processor=videos,
            chat_template=tokenizer.chat_template,
        )  # fmt: skip

    def inputs(self, prompt: str, *images: Image.Image) -> Any:
        """Return what the processor makes of a question about images."""
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(text=[text], images=list(images), return_tensors="pt")

    def generate(self, inputs: Any) -> list[int]:
        """Return the answer of `generate`."""
        out = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
        return [int(token) for token in out[0, -NEW_TOKENS:]]

    @torch.no_grad()
    def positions(self, inputs: Any) -> torch.Tensor:
        """Return the positions (3, S) of a prompt."""
        found, _ = self.model.model.get_rope_index(**{k: v for k, v in inputs.items() if k not in ("pixel_values",)})
        return found[-3:, 0]

    @torch.no_grad()
    def encoded(self, inputs: Any) -> Any:
        """Return what the model makes of the images."""
        return self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])

    def features(self, inputs: Any) -> list[torch.Tensor]:
        """Return the features (N, D) of each image."""
        return list(self.encoded(inputs).pooler_output)

    @torch.no_grad()
    def projected(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features (C, N, W) of pixel values (C, 3, H, W), as the processor's own patches; planes stand behind."""
        maker: Any = AutoImageProcessor.from_pretrained(self.folder)
        size, factor = maker.patch_size, maker.merge_size
        patches = [
            torch.from_numpy(maker.patchify(one.numpy(), size, factor, maker.temporal_patch_size)[0].copy()) for one in pixels
        ]
        grid = torch.tensor([[1, pixels.shape[2] // size, pixels.shape[3] // size]] * len(pixels))
        found = self.encoded({"pixel_values": torch.cat(patches), "image_grid_thw": grid})
        planes = [torch.stack(list(plane)) for plane in found.get("deepstack_features") or ()]
        return torch.cat([torch.stack(list(found.pooler_output)), *planes], dim=2)

    @torch.no_grad()
    def choices(self, inputs: Any, keep: int) -> list[list[int]]:
        """Return which tokens of each image the slow AgilePruner keeps."""
        chosen = []
        for tokens, scores in zip(self.features(inputs), self.scores(inputs), strict=True):
            points, ratio = tokens.double().numpy(), float(exact_effective_rank(tokens[None])) / 90.0
            kept, _ = reference.agile(reference.Crop(points, points, points[:, None], scores, scores), keep, ratio)
            chosen.append(list(kept))
        return chosen

    @torch.no_grad()
    def scores(self, inputs: Any) -> list[Any]:
        """Return the attention that each token (N,) of each image receives in the last block that sees all of it."""
        visual, grid, seen = self.model.model.visual, inputs["image_grid_thw"], {}
        block = visual.blocks[getattr(visual.config, "fullatt_block_indexes", [-1])[-1]].attn
        handles = [
            block.register_forward_pre_hook(lambda m, a, k: seen.update(turns=k["position_embeddings"]), with_kwargs=True),
            block.qkv.register_forward_hook(lambda m, a, out: seen.update(qkv=out)),
        ]
        self.features(inputs)
        for handle in handles:
            handle.remove()
        query, key, _ = seen["qkv"].reshape(len(seen["qkv"]), 3, block.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *seen["turns"])
        counts, begin, scores = grid.prod(dim=1).tolist(), 0, []
        for image, count in enumerate(counts):
            part = slice(begin, begin + count)
            attention = torch.einsum("qhd,khd->hqk", query[part].double(), key[part].double()) * key.shape[2] ** -0.5
            received = attention.softmax(dim=2).mean(dim=(0, 1)).reshape(-1, 4).sum(dim=1)
            scores.append(received[self._order(grid[image : image + 1])].numpy())
            begin += count
        return scores

    def _order(self, grid: torch.Tensor) -> torch.Tensor:
        """Return where each token (N,) of an image stands in the tower's sequence."""
        config = self.model.config.vision_config
        if not hasattr(config, "window_size"):
            return torch.arange(int(grid.prod()) // 4)
        index, _ = get_vision_window_index(grid, 2, config.window_size, config.patch_size)
        return index.argsort()

    @torch.no_grad()
    def pruned(self, inputs: Any, choices: list[list[int]]) -> tuple[list[int], torch.Tensor]:
        """Return the greedy answer to a prompt of which only the chosen image tokens are there, and its positions (3, S)."""
        ids, positions, features = inputs["input_ids"][0], self.positions(inputs), self.features(inputs)
        embeddings = self.model.get_input_embeddings()(ids)
        places = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        embeddings[places] = torch.cat(features)
        stays, begin = torch.ones(len(ids), dtype=torch.bool), 0
        stays[places] = False
        for image, kept in zip(features, choices, strict=True):
            stays[places[begin : begin + len(image)][kept]] = True
            begin += len(image)
        # Text goes on where it would behind the whole image.
        planes = [torch.cat(list(plane)) for plane in self.encoded(inputs).get("deepstack_features") or ()]
        kept = stays[places]
        deep = {"visual_pos_masks": (ids == self.model.config.image_token_id)[stays][None]} if planes else {}
        deep |= {"deepstack_visual_embeds": [plane[kept] for plane in planes]} if planes else {}
        return self.greedy(embeddings[stays], positions[:, stays], int(positions.max()) + 1, **deep), positions[:, stays]

    @torch.no_grad()
    def greedy(self, embeddings: torch.Tensor, positions: torch.Tensor, following: int, **deep: Any) -> list[int]:
        """Return the answer to embeddings (S, D), read anew for each token; none may be a matter of rounding."""
        tokens: list[int] = []
        if deep:
            mask = deep.pop("visual_pos_masks")
        for step in range(NEW_TOKENS):
            if deep:
                deep["visual_pos_masks"] = torch.nn.functional.pad(mask, (0, step))
            given = positions if len(positions) == 1 else positions[:, None]
            hidden = self.model.model.language_model(
                inputs_embeds=embeddings[None], position_ids=given, use_cache=False, **deep
            ).last_hidden_state
            logits = self.model.lm_head(hidden[0, -1])
            best = logits.topk(2).values
            assert best[0] - best[1] > tolerances.TOKEN_MARGIN["fp32"] * logits.abs().max(), "a near tie"
            tokens.append(int(logits.argmax()))
            embeddings = torch.cat([embeddings, self.model.get_input_embeddings()(torch.tensor(tokens[-1:]))])
            positions = torch.cat([positions, torch.full((len(positions), 1), following + step)], dim=1)
        return tokens


def pictures() -> list[Image.Image]:
    """Return a wide and a tall picture."""
    from skimage import data

    found = zip((data.astronaut(), data.coffee()), (np.s_[100:390], np.s_[:, 200:440]), strict=True)
    return [Image.fromarray(np.ascontiguousarray(levels[cut])) for levels, cut in found]
