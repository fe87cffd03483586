"""Random checkpoints of published models' shapes, one of each family, in the real Hugging Face format.

Times and memory do not depend on the weights' values. Queries and keys of the tower are drawn wide enough that attention is not
the same everywhere, or rounding alone would decide which tokens are kept. Where one matrix makes them and the values, it is
drawn narrower: with 2.0 as for the others, 32 blocks take features in half precision 0.16 of their range away from fp32, in
transformers itself; with 1.4 it is 0.003. The numbers are those of the models' config.json.
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
        small: What `--small` makes of the tower, where its fields are others.
        factor: Pixels on each side of a token, where images have a size.
    """

    family: str
    budget: int
    vision: tuple[str, dict[str, Any]]
    text: tuple[str, dict[str, Any]]
    options: dict[str, Any]
    processor: dict[str, Any]
    small: dict[str, Any] | None = None
    factor: int = 0


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


def _qwen_tower(patch: int, depth: int, hidden: int, inner: int, out: int, **more: Any) -> dict[str, Any]:
    return {
        "depth": depth, "hidden_size": hidden, "intermediate_size": inner, "num_heads": 16, "out_hidden_size": out,
        "patch_size": patch, **more,
    }  # fmt: skip


def _qwen_images(patch: int, least: int, most: int, **options: Any) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor", "size": {"shortest_edge": least, "longest_edge": most},
        "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "resample": 3, **options,
    }  # fmt: skip


def _rope(theta: float, sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}}


QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
# Models whose images have a size.
SIZED: dict[str, Shape] = {
    "qwen2.5-vl-3b": Shape(
        "Qwen2_5_VL", 0,
        (
            "Qwen2_5_VLVisionConfig",
            _qwen_tower(14, 32, 1280, 3420, 2048, window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
        ),
        ("Qwen2_5_VLTextConfig", _text(36, 2048, 11008, 16, 2, 151936, 128000) | _rope(1e6, [16, 24, 24])),
        QWEN_TOKENS, _qwen_images(14, 3136, 12_845_056),
        small={"depth": 2, "hidden_size": 192, "intermediate_size": 256, "num_heads": 6, "fullatt_block_indexes": [1]},
        factor=28,
    ),
    "qwen3.5-0.8b": Shape(
        "Qwen3_5", 0,
        (
            "Qwen3_5VisionConfig",
            _qwen_tower(16, 12, 768, 3072, 1024, num_position_embeddings=2304, hidden_act="gelu_pytorch_tanh")
            | {"num_heads": 12},
        ),
        (
            "Qwen3_5TextConfig",
            _text(24, 1024, 3584, 8, 2, 248320, 262144)
            | {"head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16}
            | _rope(1e7, [11, 11, 10], mrope_interleaved=True, partial_rotary_factor=0.25),
        ),
        QWEN_TOKENS, _qwen_images(16, 65_536, 16_777_216, **HALF),
        small={"depth": 2, "hidden_size": 192, "intermediate_size": 256, "num_heads": 6}, factor=32,
    ),
    "qwen3-vl-4b": Shape(
        "Qwen3VL", 0,
        (
            "Qwen3VLVisionConfig",
            _qwen_tower(
                16, 24, 1024, 4096, 2560, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17],
                hidden_act="gelu_pytorch_tanh",
            ),
        ),
        (
            "Qwen3VLTextConfig",
            _text(36, 2560, 9728, 32, 8, 151936, 262144) | {"head_dim": 128}
            | _rope(5e6, [24, 20, 20], mrope_interleaved=True),
        ),
        QWEN_TOKENS, _qwen_images(16, 65_536, 16_777_216, **HALF),
        small={"depth": 2, "hidden_size": 192, "intermediate_size": 256, "num_heads": 6, "deepstack_visual_indexes": [0]},
        factor=32,
    ),
}  # fmt: skip


def make_shape(name: str, folder: Path, small: bool = False) -> Path:
    """Write a random checkpoint in fp16 and return its folder."""
    shape = (SHAPES | SIZED)[name]
    classes: dict[str, Callable[..., Any]] = {kind: _class(shape, kind) for kind, _ in (shape.vision, shape.text)}
    vision, text = ({**numbers} for _, numbers in (shape.vision, shape.text))
    if small:
        vision, text = {**vision, **(shape.small or SMALL)}, {**text, **SMALL_TEXT}
        text["num_key_value_heads"] = 4
        if shape.factor:
            vision["out_hidden_size"], text["head_dim"] = text["hidden_size"], 32
            text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": [4, 6, 6]}
        if "linear_num_key_heads" in text:
            # Of two layers the second is no recurrent one; a quarter of its heads is turned.
            text |= {"full_attention_interval": 2, "head_dim": 64}
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
        if ("vision" in name or "visual" in name) and name.endswith(("q_proj.weight", "k_proj.weight", "qkv.weight")):
            parameter.normal_(0, (1.4 if name.endswith("qkv.weight") else 2.0) * parameter.shape[1] ** -0.5)
        elif "position_embedding" in name or "pos_embed" in name or "cls_token" in name:
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
