"""A tiny checkpoint of any family as transformers runs it, in fp32: what a bundle's answers are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import reference
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.smolvlm import processing_smolvlm

from leanvlm.exporter import tolerances
from leanvlm.exporter.pruners.gates import exact_effective_rank

NEW_TOKENS = 24
# Its images' processor is one thing, what puts placeholders into the text another.
PROCESSORS = {
    "gemma3": "Gemma3Processor",
    "internvl": "InternVLProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "idefics3": "Idefics3Processor",
    "paligemma": "PaliGemmaProcessor",
    "smolvlm": "SmolVLMProcessor",
}


@dataclass(frozen=True)
class Original:
    """A tiny checkpoint as transformers runs it, in fp32.

    Attributes:
        shape: Its name in `TINY`.
        folder: Its files.
    """

    shape: str
    folder: Path
    model: Any
    processor: Any

    @classmethod
    def open(cls, shape: str, folder: Path) -> Original:
        """Load one from its files."""
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(shape, folder, model, open_processor(folder, model.config))

    @property
    def vision(self) -> Any:
        """The tower."""
        core = self.model.model
        return core.vision_tower if hasattr(core, "vision_tower") else core.vision_model

    @property
    def projector(self) -> Any:
        """What makes features of a crop's tokens, one by one."""
        core = self.model.model
        return core.multi_modal_projector if hasattr(core, "multi_modal_projector") else core.connector.modality_projection

    def inputs(self, prompt: str, *images: Image.Image) -> Any:
        """Return what the processor makes of a question about images, all of one prompt."""
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]
        if self.processor.chat_template is None:
            # What such a processor takes is images and a question; the labels are for training.
            found = self.processor(text=["<image>" * len(images) + prompt], images=[list(images)])
            return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items() if name != "labels"}
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return self.processor(text=[text], images=[list(images)], return_tensors="pt")

    def greedy(self, **inputs: Any) -> list[int]:
        """Return the answer of `generate`, of which no token may be a matter of rounding."""
        settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
        logits = torch.stack(out.scores)[:, 0]
        best = logits.topk(2, dim=1).values
        assert ((best[:, 0] - best[:, 1]) > tolerances.TOKEN_MARGIN["fp32"] * logits.abs().amax(dim=1)).all()
        return [int(token) for token in out.sequences[0, -NEW_TOKENS:]]

    @torch.no_grad()
    def choices(self, inputs: Any, keep: int) -> list[list[int]]:
        """Return which tokens of each crop the slow AgilePruner keeps, of those that are not padding; a class token always."""
        return [
            self._choice(crop[None], keep, shown) for crop, shown in zip(self.crops(inputs), self.shown(inputs), strict=True)
        ]

    def shown(self, inputs: Any) -> list[list[int]]:
        """Return which tokens of each crop show its image: those that transformers puts into the prompt."""
        count, found = self._count(), self._numbers(inputs)
        crops: list[list[int]] = [[] for _ in self.crops(inputs)]
        for number in sorted(set(found) - {-1}):
            crops[number // count].append(number % count)
        return crops

    def crops(self, inputs: Any) -> torch.Tensor:
        """Return the crops (C, 3, H, W) of all images, without those that only fill a batch."""
        pixels = inputs["pixel_values"]
        if pixels.dim() == 4:
            return pixels
        if "image_sizes" not in inputs:
            return pixels.flatten(0, 1)
        counts = self._tiles(inputs)
        return torch.cat([crops[:count] for crops, count in zip(pixels, counts, strict=True)])

    def _tiles(self, inputs: Any) -> list[int]:
        """Return how many crops each image of a LLaVA-NeXT's prompt has."""
        config, sizes = self.model.config, inputs["image_sizes"]
        if len(sizes) > 1 and "batch_num_images" in inputs:
            return [1] * len(sizes)
        return [image_size_to_num_patches(s, config.image_grid_pinpoints, config.vision_config.image_size) for s in sizes]

    def _choice(self, pixels: torch.Tensor, keep: int, shown: list[int]) -> list[int]:
        config = self.model.config
        vision, depth = config.vision_config, config.vision_config.num_hidden_layers
        named = getattr(config, "vision_feature_layer", -1)
        deepest = max(layer % (depth + 1) for layer in ([named] if isinstance(named, int) else named))
        self.vision.set_attn_implementation("eager")
        attention = self.vision(pixels, output_attentions=True).attentions[deepest - 1][0].mean(dim=0).double()
        self.vision.set_attn_implementation("sdpa")
        tokens = self.features(pixels)
        has_class = vision.model_type in ("clip_vision_model", "internvl_vision")
        scores = (attention[0, 1:] if has_class else attention.mean(dim=0)).numpy()
        scores = _of_cells(scores, self._cell())
        first = len(tokens) - len(scores)
        others = [token for token in shown if token >= first]
        if len(others) <= keep - first:
            return [*range(first), *others]
        # The pruner sees what is not padding, and nothing else.
        tokens, scores = tokens[others], scores[[token - first for token in others]]
        points = tokens.double().numpy()
        ratio = float(exact_effective_rank(tokens[None])) / 90.0
        kept, _ = reference.agile(reference.Crop(points, points, points[:, None], scores, scores), keep - first, ratio)
        return [*range(first), *(others[index] for index in kept)]

    @torch.no_grad()
    def projected(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Return the features (C, N, D) of the crops (C, 3, H, W) of an image of a size, before anything is laid out."""
        flat = self.model.config.model_type in ("llava", "internvl", "gemma3", "paligemma")
        sizes = [torch.tensor([size])] if hasattr(self.model.config, "image_grid_pinpoints") else []
        seen: list[torch.Tensor] = []
        handle = self.projector.register_forward_hook(lambda module, given, output: seen.append(output))
        try:
            self.model.get_image_features(pixels if flat else pixels[None], *sizes)
        finally:
            handle.remove()
        return seen[0]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features (N, D) of one crop (1, 3, H, W), before anything is laid out."""
        config, size, count = self.model.config, (1, 1), 1
        if hasattr(config, "image_grid_pinpoints"):
            # Tiles and the whole of a smallest image, which here show the same.
            size = min(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
            count = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        return self.projected(pixels.expand(count, -1, -1, -1), size)[0]

    def _cell(self) -> int:
        config = self.model.config
        if hasattr(config, "mm_tokens_per_image"):
            return int(config.vision_config.image_size // config.vision_config.patch_size / config.mm_tokens_per_image**0.5)
        return int(getattr(config, "scale_factor", round(1 / getattr(config, "downsample_ratio", 1.0))))

    @torch.no_grad()
    def pruned(self, keep: int, prompt: str, *images: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a prompt's embeddings (1, S, D) with the kept image features at the images' positions, and these (S,)."""
        with self._uninterpolated():
            inputs = self.inputs(prompt, *images)
            ids = inputs["input_ids"][0]
            names = ("pixel_values", "image_sizes", "batch_num_images", "pixel_attention_mask")
            given = {name: inputs[name] for name in names if name in inputs}
            features = self.model.get_image_features(**given, return_dict=True).pooler_output
            stays = self._kept(inputs, self.choices(inputs, keep))
        embeddings = self.model.get_input_embeddings()(ids)
        positions = (ids == self.model.config.image_token_id).nonzero()[:, 0]
        embeddings[positions] = torch.cat([one.reshape(-1, one.shape[-1]) for one in features])
        kept = torch.ones(len(ids), dtype=torch.bool)
        kept[positions] = torch.from_numpy(stays)
        return embeddings[kept][None], kept.nonzero()[:, 0]

    @contextmanager
    def _uninterpolated(self) -> Iterator[None]:
        """Let a LLaVA-OneVision lay out all tokens of a picture, however many."""
        holders = (self.model.config, self.processor) if hasattr(self.model.config, "vision_aspect_ratio") else ()
        before = [holder.vision_aspect_ratio for holder in holders]
        for holder in holders:
            holder.vision_aspect_ratio = "anyres_max_99"
        try:
            yield
        finally:
            for holder, value in zip(holders, before, strict=True):
                holder.vision_aspect_ratio = value

    def _kept(self, inputs: Any, choices: Sequence[Sequence[int]]) -> Any:
        """Return for each of the images' rows whether it stays; a line's end stays with what is kept of the line."""
        numbers = self._numbers(inputs)
        count = self._count()
        chosen = {crop * count + token for crop, kept in enumerate(choices) for token in kept}
        # Before the first line of tiles stands the whole image, which is none.
        counts = self._tiles(inputs) if "image_sizes" in inputs else []
        wholes = {sum(counts[:image]) for image, crops in enumerate(counts) if crops > 1}
        stays = np.zeros(len(numbers), bool)
        begin = 0
        for at, number in enumerate(numbers):
            stays[at] = number in chosen
            if number < 0:
                line = [other for other in numbers[begin:at] if other // count not in wholes]
                stays[at] = any(other in chosen for other in line)
                begin = at + 1
        return stays

    def _count(self) -> int:
        """Return the tokens of a crop."""
        vision = self.model.config.vision_config
        side = (vision.image_size[0] // vision.patch_size[0]) if isinstance(vision.image_size, (list, tuple)) else (
            vision.image_size // vision.patch_size
        )  # fmt: skip
        full = getattr(self.model.config, "vision_feature_select_strategy", "") == "full"
        return (side // self._cell()) ** 2 + int(full and vision.model_type == "clip_vision_model")

    def _numbers(self, inputs: Any) -> list[int]:
        """Return which token of which crop each row of the images is, crop * N + token, or -1 for a line's end."""
        count, crops = self._count(), len(self.crops(inputs))
        numbers = torch.arange(crops * count, dtype=torch.float64).view(crops, count, 1)
        if "image_sizes" not in inputs:
            return [int(number) for number in numbers.flatten()]
        parts, sizes = numbers.split(self._tiles(inputs)), inputs["image_sizes"]
        options: dict[str, Any] = {"image_newline": torch.tensor([-1.0], dtype=torch.float64)}
        if self.model.config.model_type == "llava_onevision":
            options["vision_aspect_ratio"] = "anyres_max_99"
        else:
            options["vision_feature_select_strategy"] = "default"
        packed, _ = self.model.model.pack_image_features(parts, sizes, **options)
        return [int(number) for number in torch.cat(packed).flatten()]


def open_processor(folder: Path, config: Any) -> Any:
    """Open a checkpoint's own processor; of those that also take videos, which need torchvision, without that part."""
    name = PROCESSORS.get(config.model_type)
    if name is None:
        return AutoProcessor.from_pretrained(folder)
    kind: Any = getattr(transformers, name)
    if config.model_type == "smolvlm":
        # For the words of a video's prompt, from a package that is not needed here.
        processing_smolvlm.num2words = str

    class WithoutVideos(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name != "video_processor":
                return super().check_argument_for_proper_class(argument_name, argument)
            return None

    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = {"image_processor": AutoImageProcessor.from_pretrained(folder), "tokenizer": tokenizer}
    if config.model_type not in ("llava_next", "idefics3", "gemma3", "paligemma"):
        parts["video_processor"] = SimpleNamespace(model_input_names=[], num_frames=1, fps=1)
    vision = config.vision_config
    sequence = (vision.image_size // vision.patch_size // config.scale_factor) ** 2 if hasattr(config, "scale_factor") else 0
    options: dict[str, Any] = {
        "gemma3": lambda: {"image_seq_length": config.mm_tokens_per_image},
        "idefics3": lambda: {"image_seq_len": sequence},
        "smolvlm": lambda: {"image_seq_len": sequence},
        "paligemma": dict,
        "internvl": lambda: {"image_seq_length": config.image_seq_length},
        "llava_next": lambda: {
            "patch_size": vision.patch_size, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
        },
        "llava_onevision": lambda: {
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2, "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": config.vision_aspect_ratio,
        },
    }[config.model_type]()  # fmt: skip
    return WithoutVideos(**parts, chat_template=tokenizer.chat_template, **options)


def _of_cells(scores: Any, cell: int) -> Any:
    """Sum the scores (N,) of patches on a square over cells of several."""
    side = round(len(scores) ** 0.5)
    if cell == 1:
        return scores
    return scores.reshape(side // cell, cell, side // cell, cell).sum(axis=(1, 3)).flatten()
