"""Tiny random checkpoints, made from real transformers configurations: one per family.

The sizes are odd on purpose (five blocks, an odd grid, grouped KV heads, a rope theta of its own), and the weights are
drawn wide enough that greedy tokens vary: a model that repeats one token proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_SIZE, PATCH = 154, 14
TOKENS = (IMAGE_SIZE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def llava(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Save a random LLaVA with tokenizer and processor, and return its folder."""
    tokenizer = byte_tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=96, num_hidden_layers=5, num_attention_heads=6, intermediate_size=160,
            image_size=IMAGE_SIZE, patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=3, num_attention_heads=8,
            num_key_value_heads=4, head_dim=16, intermediate_size=192, max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}, bos_token_id=1, eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=3, image_seq_length=TOKENS,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    _spread(model)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.to(dtype).save_pretrained(folder)
    processor(tokenizer).save_pretrained(folder)
    image_processor().save_pretrained(folder)  # preprocessor_config.json, as older checkpoints have it
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes: any text goes through it."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate([*special, *symbols])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def image_processor() -> CLIPImageProcessor:
    """Return CLIP's image processor at the tiny tower's size."""
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor that puts image placeholders into the prompt."""
    return LlavaProcessor(
        image_processor=image_processor(), tokenizer=tokenizer, patch_size=PATCH, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


@torch.no_grad()
def _spread(model: Any) -> None:
    """Widen the initial weights: with transformers' own, a random decoder repeats one token whatever the image."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            fan = parameter[0].numel()
            scale = 2.5 if "q_proj" in name or "k_proj" in name else 1.2
            parameter.normal_(0, 1.0 if "embed" in name else scale * fan**-0.5)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)


TINY: dict[str, Callable[[Path], Path]] = {"llava": llava}
