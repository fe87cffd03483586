"""Tiny random checkpoints, made from real transformers configurations: one per family and shape.

The sizes are odd on purpose (five blocks, an odd grid, grouped KV heads, a rope theta of its own), and the weights are
drawn wide enough that greedy tokens vary: a model that repeats one token proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny_blocks
import tiny_sizes
import tiny_tiles
import torch
from tiny_parts import TEMPLATE, byte_tokenizer, spread
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
)

IMAGE_SIZE, PATCH = 154, 14
VOCABULARY = 260
TOKENS = (IMAGE_SIZE // PATCH) ** 2
# Heads are turned in half, by other angles beyond 512 tokens.
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 512,
    "factor": 2.0, "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [1.0 + index for index in range(8)],
}  # fmt: skip


def llava(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random LLaVA of the usual shape: CLIP without its class token, one feature layer, a Llama."""
    return checkpoint(folder, seed=seed, dtype=dtype, norms=0.0)


def checkpoint(
    folder: Path,
    *,
    vision: Callable[[], PreTrainedConfig] | None = None,
    text: Callable[..., PreTrainedConfig] = LlamaConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spare: int = 0,
    norms: float = 0.2,
    text_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Save a random LLaVA with tokenizer and processor, and return its folder.

    Args:
        folder: Where.
        vision: Makes the tower's configuration, CLIP's by default.
        text: The decoder's configuration class.
        seed: Of the weights.
        dtype: Of the weights.
        norms: How far the weights of the decoder's norms are drawn from where they begin.
        spare: By how many rows the table is made larger than the tokenizer, after it has been made.
        text_options: Fields of the decoder's configuration.
        **options: Fields of `LlavaConfig`.
    """
    tokenizer = byte_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 192, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }  # fmt: skip
    tower = (vision or clip)()
    full = options.get("vision_feature_select_strategy") == "full"
    classes = int(tower.model_type == "clip_vision_model")
    count = (tower.image_size // PATCH) ** 2 + classes - int(not full)
    config = LlavaConfig(
        vision_config=tower, text_config=text(**sizes | (text_options or {})),
        image_token_index=3, image_seq_length=count, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    if spare:
        model.resize_token_embeddings(len(tokenizer) + spare)
    spread(model, norms)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.to(dtype).save_pretrained(folder)
    strategy = "full" if full else "default"
    processor(tokenizer, image_processor(tower.image_size), strategy, classes).save_pretrained(folder)
    # preprocessor_config.json, as older checkpoints have it
    image_processor(tower.image_size).save_pretrained(folder)
    return folder


def clip() -> CLIPVisionConfig:
    """Return the configuration of a tower with a class token."""
    return CLIPVisionConfig(
        hidden_size=96, num_hidden_layers=5, num_attention_heads=6, intermediate_size=160,
        image_size=IMAGE_SIZE, patch_size=PATCH,
    )  # fmt: skip


def siglip() -> SiglipVisionConfig:
    """Return the configuration of a tower without one, whose images are no whole number of patches."""
    return SiglipVisionConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=6, intermediate_size=160,
        image_size=IMAGE_SIZE + 5, patch_size=PATCH,
    )  # fmt: skip


def image_processor(size: int = IMAGE_SIZE) -> CLIPImageProcessor:
    """Return CLIP's image processor at a tiny tower's size."""
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def processor(
    tokenizer: PreTrainedTokenizerFast, images: CLIPImageProcessor, strategy: str = "default", classes: int = 1
) -> LlavaProcessor:
    """Return the processor that puts image placeholders into the prompt."""
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, image_token="<image>",
        vision_feature_select_strategy=strategy, num_additional_image_tokens=classes, chat_template=TEMPLATE,
    )  # fmt: skip


# Family, and what of its shapes, to a function that saves one. Each shape of a tower stands with another decoder.
TINY: dict[str, Callable[[Path], Path]] = {
    "llava": llava,
    "llava/siglip": partial(
        checkpoint, vision=siglip, text=Qwen2Config, vision_feature_select_strategy="full", vision_feature_layer=-1
    ),
    "llava/full": partial(
        checkpoint, text=Phi3Config, vision_feature_select_strategy="full",
        text_options={
            "rope_parameters": LONGROPE, "original_max_position_embeddings": 512, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 32,
        },
    ),
    "llava/layers": partial(checkpoint, text=GemmaConfig, vision_feature_layer=[-2, 0, 3]),
    "llava/resized": partial(checkpoint, seed=2, text=MistralConfig, spare=37, text_options={"sliding_window": 400}),
    "llava/tied": partial(checkpoint, text=Qwen3Config, text_options={"tie_word_embeddings": True}),
    "llava/gemma2": partial(checkpoint, text=Gemma2Config, text_options={"query_pre_attn_scalar": 24, "sliding_window": 340}),
    # Its gated blocks are as wide as there are tokens, as its head is.
    "llava/smollm3": partial(
        checkpoint, text=SmolLM3Config, text_options={"no_rope_layer_interval": 2, "intermediate_size": VOCABULARY}
    ),
    "llava/gemma3": partial(checkpoint, seed=1, text=Gemma3TextConfig, text_options=tiny_blocks.GEMMA3_TEXT),
    **tiny_tiles.TINY,
}  # fmt: skip
# Those too whose images have a size and a place, or see each other in the decoder, which have tests of their own.
EVERY = {**TINY, **tiny_sizes.TINY, **tiny_blocks.TINY}
