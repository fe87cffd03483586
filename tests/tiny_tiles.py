"""Tiny random checkpoints of the families that cut an image into tiles, from real transformers configurations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from tiny_parts import byte_tokenizer, save
from transformers import (
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

# Tiles of 5 x 5 patches.
TILE, PATCH = 70, 14
NEXT_SIZES = [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]]
ONEVISION_SIZES = [[TILE * rows, TILE * columns] for rows in range(1, 5) for columns in range(1, 5)]
INTERN_TOKENS = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>", "video_token": "<v>",
}  # fmt: skip


def next_checkpoint(folder: Path, text: Callable[..., PreTrainedConfig] = LlamaConfig, seed: int = 4, **options: Any) -> Path:
    """Save a random LLaVA-NeXT."""
    tokenizer = byte_tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower(5), image_size=TILE, patch_size=PATCH),
        text_config=text(**decoder(len(tokenizer))), image_token_index=3, image_grid_pinpoints=NEXT_SIZES, **options,
    )  # fmt: skip
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=NEXT_SIZES
    )
    return save(folder, LlavaNextForConditionalGeneration, config, tokenizer, images, seed)


def onevision_checkpoint(folder: Path, limit: int = 9, seed: int = 3) -> Path:
    """Save a random LLaVA-OneVision; a picture of more tokens than `limit` tiles' is interpolated."""
    tokenizer = byte_tokenizer(["<video>"])
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(4), image_size=TILE, patch_size=PATCH),
        text_config=Qwen2Config(**decoder(len(tokenizer))), image_token_index=3, video_token_index=4,
        image_grid_pinpoints=ONEVISION_SIZES, vision_aspect_ratio=f"anyres_max_{limit}",
    )  # fmt: skip
    images = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=ONEVISION_SIZES)
    return save(folder, LlavaOnevisionForConditionalGeneration, config, tokenizer, images, seed)


def internvl_checkpoint(
    folder: Path,
    text: Callable[..., PreTrainedConfig] = Qwen2Config,
    tower: dict[str, Any] | None = None,
    seed: int = 3,
    **options: Any,
) -> Path:
    """Save a random InternVL: tiles of 6 x 6 patches, four of which are a token."""
    from transformers import InternVLVisionConfig

    tokenizer = byte_tokenizer(["<img>", "</img>", "<v>"], named=INTERN_TOKENS)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**_tower(4), image_size=[84, 84], patch_size=[14, 14], **(tower or {})),
        text_config=text(**decoder(len(tokenizer))), image_token_id=3, image_seq_length=9, **options,
    )  # fmt: skip
    images = GotOcr2ImageProcessorPil(size={"height": 84, "width": 84}, max_patches=6)
    return save(folder, InternVLForConditionalGeneration, config, tokenizer, images, seed)


def smolvlm_checkpoint(
    folder: Path, kind: str = "SmolVLM", scale: int = 2, split: bool = True, seed: int = 6, tied: bool = False
) -> Path:
    """Save a random SmolVLM or Idefics3: tiles of 6 x 6 patches, and marks; two line breaks are one token."""
    marks = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = byte_tokenizer(marks, merged=["ĊĊ"])
    prefix = {"SmolVLM": "smolvlm", "Idefics3": "idefics3"}[kind]
    parts: Any = importlib.import_module(f"transformers.models.{prefix}.configuration_{prefix}")
    config = getattr(parts, f"{kind}Config")(
        vision_config=getattr(parts, f"{kind}VisionConfig")(**_tower(4), image_size=84, patch_size=14),
        text_config=LlamaConfig(**decoder(len(tokenizer)) | {"tie_word_embeddings": tied}),
        image_token_id=3, scale_factor=scale, tie_word_embeddings=tied,
    )  # fmt: skip
    images = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 252}, max_image_size={"longest_edge": 84}, do_image_splitting=split
    )
    return save(folder, getattr(transformers, f"{kind}ForConditionalGeneration"), config, tokenizer, images, seed)


def _tower(blocks: int) -> dict[str, Any]:
    return {"hidden_size": 96, "num_hidden_layers": blocks, "num_attention_heads": 6, "intermediate_size": 160}


def decoder(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 192, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip


TINY: dict[str, Callable[[Path], Path]] = {
    "llava_next": next_checkpoint,
    "llava_next/mistral": partial(next_checkpoint, seed=5, text=MistralConfig, vision_feature_layer=[-2, 1]),
    "llava_onevision": onevision_checkpoint,
    "llava_onevision/shrunk": partial(onevision_checkpoint, limit=2),
    "internvl": internvl_checkpoint,
    "internvl/qwen3": partial(
        internvl_checkpoint, seed=4, text=Qwen3Config, vision_feature_layer=-2,
        tower={"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": True, "use_mean_pooling": False},
    ),
    "smolvlm": smolvlm_checkpoint,
    "smolvlm/whole": partial(smolvlm_checkpoint, scale=3, split=False, tied=True),
    "idefics3": partial(smolvlm_checkpoint, kind="Idefics3", scale=3),
}  # fmt: skip
