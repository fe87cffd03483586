"""A random checkpoint of LLaVA-1.5-7B's shapes in the real Hugging Face format, made on a GPU in seconds.

Times and memory do not depend on the weights' values, and the export's comparison with transformers asks for no meaning. The
tokenizer, the chat template and the image processor are the built-in model's, whose processor is CLIP-L/336's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanvlm.demo import MODEL_DIR
from leanvlm.runtime.errors import InputError

SEED = 0
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class Sizes:
    """Of the random model; the defaults are LLaVA-1.5-7B's."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocab: int = 32064
    vision_layers: int = 24
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_heads: int = 16


SMALL = Sizes(2, 256, 512, 4, 640, 3, 192, 768, 6)


def make_checkpoint(folder: Path, sizes: Sizes) -> Path:
    """Write the checkpoint in fp16 and return its folder.

    Raises:
        InputError: The folder exists.
    """
    if folder.exists():
        raise InputError(f"{folder} exists; choose another --output")
    torch.manual_seed(SEED)
    model = _model(sizes)
    model.save_pretrained(folder, max_shard_size="4GB")
    for name in COPIED:
        shutil.copyfile(MODEL_DIR / name, folder / name)
    return folder


def _model(sizes: Sizes) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=sizes.vision_hidden, num_hidden_layers=sizes.vision_layers, image_size=336, patch_size=14,
            num_attention_heads=sizes.vision_heads, intermediate_size=sizes.vision_intermediate,
        ),
        text_config=LlamaConfig(
            hidden_size=sizes.hidden, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads, intermediate_size=sizes.intermediate, vocab_size=sizes.vocab,
            max_position_embeddings=4096, **special,
        ),
        image_token_index=3, image_seq_length=576, dtype=torch.float16, **special,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
