"""What the tiny checkpoints of all families share: a tokenizer, a chat template, and weights that make tokens vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def byte_tokenizer(
    more: Sequence[str] = (), merged: Sequence[str] = (), named: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes: any text goes through it.

    Args:
        more: Special tokens, beside `SPECIAL`.
        merged: Pairs of bytes that are one token.
        named: Attributes of the tokenizer to special tokens.
    """
    special = [*SPECIAL, *more]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {s: i for i, s in enumerate([*special, *symbols, *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in merged]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    extra: dict[str, Any] = {"extra_special_tokens": dict(named)} if named else {"additional_special_tokens": ["<image>"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False,
        **extra,
    )  # fmt: skip


@torch.no_grad()
def spread(model: Any, norms: float) -> None:
    """Widen the initial weights: with transformers' own, a random decoder repeats one token whatever the image."""
    table = model.get_input_embeddings()
    # A tied head finds the last token's own row again, if much of it is left behind the blocks.
    rows = 0.03 / getattr(table, "scalar_embed_scale", 1.0) if model.config.tie_word_embeddings else 1.0
    for name, parameter in model.named_parameters():
        if parameter is table.weight:
            parameter.normal_(0, rows)
        elif parameter.dim() >= 2:
            fan = parameter[0].numel()
            scale = 2.5 if "q_proj" in name or "k_proj" in name or "qkv_proj" in name else 1.2
            parameter.normal_(0, 1.0 if "embed" in name else scale * fan**-0.5)
        elif "newline" in name:
            parameter.normal_(0, rows)
        elif "lambda" in name:
            parameter.fill_(0.7)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif norms and ("language_model" in name or "text_model" in name) and "norm" in name:
            # Heads of unit length attend to everything alike.
            wider = 1.5 if "q_norm" in name or "k_norm" in name else 0.0
            # Of a norm of 1 + w, w begins at 0.
            parameter.add_(norms * torch.randn_like(parameter)).add_(wider * (1.0 if parameter.mean() < 0.5 else parameter))


def save(folder: Path, kind: Any, config: Any, tokenizer: Any, images: Any, seed: int, template: str = TEMPLATE) -> Path:
    """Save a random model with its tokenizer and image processor."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    spread(model, 0.2)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    return folder
