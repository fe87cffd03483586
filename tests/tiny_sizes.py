"""Tiny random checkpoints of the families whose images have a size and a place, from real transformers configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tiny_parts import byte_tokenizer, save
from tiny_tiles import decoder
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessorPil,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

# Rows and columns of tokens, with and without whole windows.
GRIDS = ((4, 4), (3, 5), (5, 3))
# Turned by other angles than those of their positions, and queries are scaled from position 16 on.
YARN = {
    "rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.8, "llama_4_scaling_beta": 0.4,
}  # fmt: skip
MARKS = {"image_token": "<image>", "video_token": "<video>"}


def qwen2_5_vl_checkpoint(folder: Path, seed: int = 3, tied: bool = False, **tower: Any) -> Path:
    """Save a random Qwen2.5-VL: windows of 2 x 2 tokens, two blocks of four without."""
    tokenizer = byte_tokenizer(["<video>", "<|vision_start|>", "<|vision_end|>"], named=MARKS)
    text = decoder(len(tokenizer)) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": tied,
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "depth": 4, "num_heads": 6, "intermediate_size": 160, "out_hidden_size": 128, "window_size": 56,
        "fullatt_block_indexes": [1, 3], "patch_size": 14,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        vision_config=vision | tower, text_config=text, image_token_id=3, video_token_id=4, vision_start_token_id=5,
        vision_end_token_id=6, tie_word_embeddings=tied,
    )  # fmt: skip
    return save(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer, _images(), seed)


def qwen3_vl_checkpoint(folder: Path, seed: int = 3, tied: bool = False, **tower: Any) -> Path:
    """Save a random Qwen3-VL: a table of 6 x 6 positions, two planes."""
    tokenizer = byte_tokenizer(["<video>", "<|vision_start|>", "<|vision_end|>"], named=MARKS)
    text = decoder(len(tokenizer)) | {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
        },
        "tie_word_embeddings": tied, "num_hidden_layers": 3,
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "depth": 4, "num_heads": 6, "intermediate_size": 160, "out_hidden_size": 128, "patch_size": 16,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2],
    }  # fmt: skip
    config = Qwen3VLConfig(
        vision_config=vision | tower, text_config=text, image_token_id=3, video_token_id=4, vision_start_token_id=5,
        vision_end_token_id=6, tie_word_embeddings=tied,
    )  # fmt: skip
    return save(folder, Qwen3VLForConditionalGeneration, config, tokenizer, _images(16), seed)


def qwen3_5_checkpoint(folder: Path, seed: int = 4, tied: bool = False, **text: Any) -> Path:
    """Save a random Qwen3.5: of each two layers one is recurrent, with two value heads to a key head."""
    # transformers gives this family's tokenizers the last of them, whatever their files say.
    tokenizer = byte_tokenizer(["<video>", "<|vision_start|>", "<|vision_end|>", "<|endoftext|>"], named=MARKS)
    numbers = decoder(len(tokenizer)) | {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        },
        "tie_word_embeddings": tied, "num_hidden_layers": 4, "head_dim": 64, "full_attention_interval": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
    }  # fmt: skip
    vision = {
        "hidden_size": 96, "depth": 4, "num_heads": 6, "intermediate_size": 160, "out_hidden_size": 128, "patch_size": 16,
        "num_position_embeddings": 36,
    }  # fmt: skip
    config = Qwen3_5Config(
        vision_config=vision, text_config=numbers | text, image_token_id=3, video_token_id=4, vision_start_token_id=5,
        vision_end_token_id=6, tie_word_embeddings=tied,
    )  # fmt: skip
    return save(folder, Qwen3_5ForConditionalGeneration, config, tokenizer, _images(16), seed)


def mistral3_checkpoint(
    folder: Path, seed: int = 3, tied: bool = False, patch: int = 14, text: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Save a random Mistral 3: a decoder whose heads together are wider than it."""
    tokenizer = byte_tokenizer(["[IMG_BREAK]", "[IMG_END]"])
    changes = {"model_type": "ministral3", "hidden_size": 96, "rope_parameters": YARN} if text is None else text
    vision = {
        "model_type": "pixtral", "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 160,
        "patch_size": patch, "image_size": 8 * patch, "hidden_act": "silu",
    }  # fmt: skip
    config = Mistral3Config(
        vision_config=vision, text_config=decoder(len(tokenizer)) | {"tie_word_embeddings": tied} | changes,
        image_token_index=3, tie_word_embeddings=tied, **options,
    )  # fmt: skip
    images = PixtralImageProcessorPil(size={"longest_edge": 16 * patch}, patch_size={"height": patch, "width": patch})
    return save(folder, Mistral3ForConditionalGeneration, config, tokenizer, images, seed)


def _images(patch: int = 14) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    token = (2 * patch) ** 2
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 4 * token, "longest_edge": 64 * token}, patch_size=patch)


TINY: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": qwen2_5_vl_checkpoint,
    "qwen2_5_vl/tied": partial(qwen2_5_vl_checkpoint, seed=4, tied=True, fullatt_block_indexes=[0, 2], window_size=84),
    "qwen3_vl": qwen3_vl_checkpoint,
    "qwen3_5": qwen3_5_checkpoint,
    "qwen3_5/tied": partial(qwen3_5_checkpoint, seed=5, tied=True, full_attention_interval=3, linear_conv_kernel_dim=3),
    "mistral3": mistral3_checkpoint,
    "mistral3/mistral": partial(
        mistral3_checkpoint,
        seed=7,
        tied=True,
        patch=16,
        text={"model_type": "mistral", "sliding_window": None},
        vision_feature_layer=-2,
        multimodal_projector_bias=True,
    ),
}


def sizes(folder: Path) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) of the shapes that a checkpoint's tests export."""
    token = 2 * int(json.loads((folder / "config.json").read_text())["vision_config"]["patch_size"])
    return tuple((token * rows, token * columns) for rows, columns in GRIDS)
