"""Tiny random checkpoints of the families whose image tokens see each other, from real transformers configurations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_parts import TEMPLATE, byte_tokenizer, save
from tiny_tiles import decoder
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipImageProcessorPil,
)

NAMED = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
# A line break stands in front of the two that come with an image.
GEMMA_TEMPLATE = TEMPLATE.replace("USER: ", "user\n").replace("<image>\n", "<start_of_image>")
# Kinds of layers turn by other angles.
ANGLES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6,
    "intermediate_size": 160, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
GEMMA3_TEXT: dict[str, Any] = {
    "num_hidden_layers": len(KINDS), "layer_types": KINDS, "rope_parameters": ANGLES, "sliding_window": 400,
    "query_pre_attn_scalar": 24,
}  # fmt: skip


def gemma3_checkpoint(folder: Path, seed: int = 3) -> Path:
    """Save a random Gemma 3: 12 x 12 patches, four of which are a token; two line breaks are one token."""
    tokenizer = byte_tokenizer(list(NAMED.values())[1:], merged=["ĊĊ"], named=NAMED)
    config = Gemma3Config(
        vision_config=SIGLIP | {"image_size": 168},
        text_config=Gemma3TextConfig(**decoder(len(tokenizer)) | GEMMA3_TEXT | {"tie_word_embeddings": True}),
        mm_tokens_per_image=36, image_token_index=3, boi_token_index=4, eoi_token_index=5,
    )  # fmt: skip
    images = Gemma3ImageProcessorPil(size={"height": 168, "width": 168})
    return save(folder, Gemma3ForConditionalGeneration, config, tokenizer, images, seed, GEMMA_TEMPLATE)


def paligemma_checkpoint(folder: Path, seed: int = 3) -> Path:
    """Save a random PaliGemma: 6 x 6 patches, which are tokens."""
    tokenizer = byte_tokenizer(named={"image_token": "<image>"})
    config = PaliGemmaConfig(
        vision_config=SIGLIP | {"image_size": 84},
        text_config=GemmaConfig(**decoder(len(tokenizer)) | {"tie_word_embeddings": True}),
        image_token_index=3, projection_dim=128, hidden_size=128,
    )  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": 84, "width": 84}, image_seq_length=36)
    folder = save(folder, PaliGemmaForConditionalGeneration, config, tokenizer, images, seed)
    (folder / "chat_template.jinja").unlink()
    return folder


TINY: dict[str, Callable[[Path], Path]] = {"gemma3": gemma3_checkpoint, "paligemma": paligemma_checkpoint}
