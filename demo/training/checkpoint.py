"""The built-in model as a Hugging Face folder, with the weights' names of the public LLaVA-1.5 checkpoints.

Every transformers version reads these names. Tokenizer, chat template and image processor are the shipped model's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leanvlm.demo import MODEL_DIR
from leanvlm.demo.training.canvas import PATCH
from leanvlm.demo.training.network import DecoderBlock, Size, Twin, VisionBlock

__all__ = ["named_weights", "read_folder", "write_folder", "write_json"]

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
COPIED = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def named_weights(twin: Twin) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights as a checkpoint has them; each is a view of the twin's own memory."""
    yield from _vision_weights(twin)
    for number, layer in ((1, twin.projector1), (2, twin.projector2)):
        yield from _linear(f"multi_modal_projector.linear_{number}", layer)
    decoder = twin.decoder
    yield "language_model.lm_head.weight", decoder.head.weight.data
    yield "language_model.model.embed_tokens.weight", decoder.embed.weight.data
    yield "language_model.model.norm.weight", decoder.norm.weight.data
    for number, block in enumerate(decoder.blocks):
        assert isinstance(block, DecoderBlock)
        name = f"language_model.model.layers.{number}"
        yield f"{name}.input_layernorm.weight", block.norm1.weight.data
        yield f"{name}.post_attention_layernorm.weight", block.norm2.weight.data
        for letter, part in zip("qkv", block.qkv.weight.data.chunk(3), strict=True):
            yield f"{name}.self_attn.{letter}_proj.weight", part
        yield f"{name}.self_attn.o_proj.weight", block.out.weight.data
        for word, part in zip(("gate", "up"), block.gate_up.weight.data.chunk(2), strict=True):
            yield f"{name}.mlp.{word}_proj.weight", part
        yield f"{name}.mlp.down_proj.weight", block.down.weight.data


def _vision_weights(twin: Twin) -> Iterator[tuple[str, Tensor]]:
    tower, name = twin.vision, "vision_tower.vision_model"
    yield f"{name}.embeddings.class_embedding", tower.cls.data
    yield f"{name}.embeddings.patch_embedding.weight", tower.patch.weight.data.view(-1, 3, PATCH, PATCH)
    yield f"{name}.embeddings.position_embedding.weight", tower.positions.data
    yield from _linear(f"{name}.pre_layrnorm", tower.pre_norm)  # the name's spelling is the public one
    yield from _linear(f"{name}.post_layernorm", tower.post_norm)
    for number, block in enumerate(tower.blocks):
        assert isinstance(block, VisionBlock)
        layer = f"{name}.encoder.layers.{number}"
        yield from _linear(f"{layer}.layer_norm1", block.norm1)
        yield from _linear(f"{layer}.layer_norm2", block.norm2)
        for letter, weight, bias in zip("qkv", block.qkv.weight.data.chunk(3), block.qkv.bias.data.chunk(3), strict=True):
            yield f"{layer}.self_attn.{letter}_proj.weight", weight
            yield f"{layer}.self_attn.{letter}_proj.bias", bias
        yield from _linear(f"{layer}.self_attn.out_proj", block.out)
        yield from _linear(f"{layer}.mlp.fc1", block.fc1)
        yield from _linear(f"{layer}.mlp.fc2", block.fc2)


def _linear(name: str, layer: nn.Linear | nn.LayerNorm) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", layer.weight.data
    yield f"{name}.bias", layer.bias.data


def write_folder(twin: Twin, folder: Path) -> None:
    """Write the model in fp16 as a `LlavaForConditionalGeneration`; the weights come last, whole or not at all.

    Raises:
        ValueError: A weight is not finite in fp16.
    """
    weights = {name: weight.half().cpu().contiguous() for name, weight in named_weights(twin)}
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"weights are not finite in fp16: {', '.join(broken)}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in COPIED:
        if folder.resolve() != MODEL_DIR.resolve():
            shutil.copyfile(MODEL_DIR / file, folder / file)
    write_json(folder / CONFIG, _config(twin.size))
    partial = folder / f".{WEIGHTS}"
    save_file(weights, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = file.with_name(f".{file.name}")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _config(size: Size) -> Any:
    config = json.loads((MODEL_DIR / CONFIG).read_text(encoding="utf-8"))
    config["vision_config"] |= {
        "hidden_size": size.vision_width,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "intermediate_size": size.vision_mlp,
        "projection_dim": size.vision_width,
    }
    config["text_config"] |= {
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": size.width // size.heads,
        "intermediate_size": size.mlp,
    }
    return config


def read_folder(folder: Path) -> Twin:
    """Read a folder that `write_folder` wrote, in fp32."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    vision, text = config["vision_config"], config["text_config"]
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    twin = Twin(Size(*(part[field] for part in (vision, text) for field in fields)))
    saved = load_file(folder / WEIGHTS)
    for name, weight in named_weights(twin):
        weight.copy_(saved[name])
    return twin
