"""Random checkpoints of published models' shapes, one of each family, in the real Hugging Face format.

Times and memory do not depend on the weights' values. Queries and keys of the tower are drawn wide enough that attention is not
the same everywhere, or rounding alone would decide which tokens are kept. The numbers are those of the models' config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer

from leanvlm.demo import MODEL_DIR

SEED = 0
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = 3
# What `--small` leaves of a model, to try the commands.
SMALL = {"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 6}
SMALL_TEXT = {**SMALL, "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 8, "vocab_size": 704}
NEXT_SIZES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_SIZES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
MARKS = ["<fake_token_around_image>", "<global-img>", "<img>", "</img>"]
MARKS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


@dataclass(frozen=True)
class Shape:
    """One model.

    Attributes:
        family: Prefix of its classes in transformers.
        budget: Image tokens kept of a crop.
        vision: Class of the tower's configuration, and its numbers.
        text: The same of the decoder.
        options: Fields of the whole.
        processor: Content of `preprocessor_config.json`.
    """

    family: str
    budget: int
    vision: tuple[str, dict[str, Any]]
    text: tuple[str, dict[str, Any]]
    options: dict[str, Any]
    processor: dict[str, Any]


def _tower(layers: int, hidden: int, inner: int, side: Any, patch: Any = 14) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": 16,
        "image_size": side, "patch_size": patch,
    }  # fmt: skip


def _text(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, context: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context, **SPECIAL,
    }  # fmt: skip


def _images(kind: str, side: int, **options: Any) -> dict[str, Any]:
    edges = {"height": side, "width": side}
    return {"image_processor_type": kind, "size": edges, "resample": 3, **options}


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = _tower(24, 1024, 4096, 336)
SHAPES: dict[str, Shape] = {
    "llava-1.5-13b": Shape(
        "Llava", 64, ("CLIPVisionConfig", CLIP), ("LlamaConfig", _text(40, 5120, 13824, 40, 40, 32064, 4096)),
        {"image_token_index": IMAGE, "image_seq_length": 576},
        _images("CLIPImageProcessor", 336, crop_size={"height": 336, "width": 336}) | {"size": {"shortest_edge": 336}},
    ),
    "llava-v1.6-mistral-7b": Shape(
        "LlavaNext", 64, ("CLIPVisionConfig", CLIP),
        ("MistralConfig", _text(32, 4096, 14336, 32, 8, 32064, 32768) | {"sliding_window": None}),
        {"image_token_index": IMAGE, "image_grid_pinpoints": NEXT_SIZES},
        _images("LlavaNextImageProcessor", 336, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=NEXT_SIZES),
    ),
    "llava-onevision-0.5b": Shape(
        "LlavaOnevision", 96, ("SiglipVisionConfig", _tower(26, 1152, 4304, 384)),
        ("Qwen2Config", _text(24, 896, 4864, 14, 2, 152000, 32768)),
        {"image_token_index": IMAGE, "image_grid_pinpoints": ONEVISION_SIZES},
        _images("LlavaOnevisionImageProcessor", 384, image_grid_pinpoints=ONEVISION_SIZES, **HALF),
    ),
    "internvl3-2b": Shape(
        "InternVL", 64, ("InternVLVisionConfig", _tower(24, 1024, 4096, [448, 448], [14, 14]) | {"attention_bias": True}),
        ("Qwen2Config", _text(28, 1536, 8960, 12, 2, 151674, 32768)), {"image_token_id": IMAGE},
        _images("GotOcr2ImageProcessor", 448, max_patches=12),
    ),
    "smolvlm2-2.2b": Shape(
        "SmolVLM", 27, ("SmolVLMVisionConfig", _tower(27, 1152, 4304, 384)),
        ("LlamaConfig", _text(24, 2048, 8192, 32, 32, 49280, 8192)), {"image_token_id": IMAGE, "scale_factor": 3},
        {
            "image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 1536}, "resample": 1,
            "max_image_size": {"longest_edge": 384}, **HALF,
        },
    ),
}  # fmt: skip


def make_shape(name: str, folder: Path, small: bool = False) -> Path:
    """Write a random checkpoint in fp16 and return its folder."""
    shape = SHAPES[name]
    classes: dict[str, Callable[..., Any]] = {kind: _class(shape, kind) for kind, _ in (shape.vision, shape.text)}
    vision, text = ({**numbers} for _, numbers in (shape.vision, shape.text))
    if small:
        vision, text = {**vision, **SMALL}, {**text, **SMALL_TEXT}
        text["num_key_value_heads"] = 4
    config = _class(shape, f"{shape.family}Config")(
        vision_config=classes[shape.vision[0]](**vision), text_config=classes[shape.text[0]](**text),
        tie_word_embeddings=False, dtype=torch.float16, **shape.options,
    )  # fmt: skip
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = _class(shape, f"{shape.family}ForConditionalGeneration")(config).eval()
    finally:
        torch.set_default_dtype(before)
    _vary(model)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(folder / "tokenizer.json"))
    for file in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((MODEL_DIR / file).read_bytes())
    (folder / "preprocessor_config.json").write_text(json.dumps(shape.processor, indent=1), encoding="utf-8")
    return folder


@torch.no_grad()
def _vary(model: Any) -> None:
    """Let the tower's attention differ from token to token, and its scaled residuals and newline count."""
    for name, parameter in model.named_parameters():
        if "vision" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.normal_(0, 2.0 * parameter.shape[1] ** -0.5)
        elif "position_embedding" in name or "cls_token" in name:
            parameter.normal_(0, 0.5)
        elif "lambda" in name:
            parameter.fill_(0.5)


def _class(shape: Shape, name: str) -> Any:
    """Return a class of transformers; some of a family's are not at the top."""
    found = getattr(transformers, name, None)
    if found is None:
        prefix = shape.family.lower()
        found = getattr(import_module(f"transformers.models.{prefix}.configuration_{prefix}"), name)
    return found
