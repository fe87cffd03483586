"""What the aliases name: configurations of the real checkpoints' sizes, planned without their weights."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.config import ALIASES
from leanvlm.exporter.decoders import context_length
from leanvlm.exporter.plan import plan
from leanvlm.runtime.errors import LeanVLMWarning

BUDGET = 32
SIDES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
CLIP = SIDES | {"model_type": "clip_vision_model", "image_size": 336, "projection_dim": 768}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
NEXT_SIZES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_SIZES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
# Family: fields of config.json, of its tower, and of preprocessor_config.json; and image tokens of a crop.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "llava": ({}, CLIP, {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}, 576),
    "llava_next": (
        {"image_grid_pinpoints": NEXT_SIZES}, CLIP,
        {
            "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "image_grid_pinpoints": NEXT_SIZES,
        },
        576,
    ),
    "llava_onevision": (
        {"image_grid_pinpoints": ONEVISION_SIZES, "vision_aspect_ratio": "anyres_max_9"},
        SIGLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 26},
        {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": ONEVISION_SIZES}, 729,
    ),
    "internvl": (
        {}, SIDES | {"model_type": "internvl_vision", "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True},
        {"size": {"height": 448, "width": 448}, "max_patches": 12}, 256,
    ),
    "smolvlm": (
        {"scale_factor": 3}, SIGLIP | {"model_type": "smolvlm_vision", "num_hidden_layers": 27},
        {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}, 81,
    ),
    "idefics3": (
        {"scale_factor": 4},
        {
            "model_type": "idefics3_vision", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": 512, "patch_size": 16,
        },
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}, 64,
    ),
    "gemma3": (
        {"mm_tokens_per_image": 256},
        SIGLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "image_size": 896, "vision_use_head": False},
        {"size": {"height": 896, "width": 896}}, 256,
    ),
    "paligemma": (
        {"projection_dim": 2048, "hidden_size": 2048},
        SIGLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "image_size": 224, "vision_use_head": False},
        {"size": {"height": 224, "width": 224}, "image_seq_length": 256}, 256,
    ),
    "mistral3": (
        {},
        {
            "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 1540, "patch_size": 14, "hidden_act": "silu",
        },
        {"size": {"longest_edge": 1540}}, 26 * 46,
    ),
    "qwen2_5_vl": (
        {},
        {
            "model_type": "qwen2_5_vl_vision", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "patch_size": 14,
        },
        {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}, 26 * 46,
    ),
    "qwen3_5": (
        {},
        {
            "model_type": "qwen3_5_vision", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "num_position_embeddings": 2304, "patch_size": 16,
        },
        {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}, 22 * 40,
    ),
    "qwen3_vl": (
        {},
        {
            "model_type": "qwen3_vl_vision", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17], "patch_size": 16,
        },
        {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}, 22 * 40,
    ),
}  # fmt: skip
# Where the window of an alias's or a family's decoders ends.
WINDOWS = {"bakllava": 4096, "gemma3": 1024}
# The smaller ones of the second SmolVLM have the tower and the tiles of the first.
SMALL_SMOLVLM = ("smolvlm2-256m", "smolvlm2-500m")


def decoder(
    kind: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    """Return a decoder's configuration."""
    return {
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": context, **more,
    }  # fmt: skip


def qwen3(layers: int, hidden: int, inner: int, heads: int) -> dict[str, Any]:
    """Return the configuration of a Qwen3 as InternVL 3.5 has it."""
    return decoder("qwen3", layers, hidden, inner, heads, 8, 151_936, 40_960, head_dim=128, rope_theta=1_000_000.0)


def ministral3(layers: int, hidden: int, inner: int) -> dict[str, Any]:
    """Return the configuration of a Ministral 3's decoder."""
    rope = {
        "rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "original_max_position_embeddings": 16_384,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    }  # fmt: skip
    return decoder("ministral3", layers, hidden, inner, 32, 8, 131_072, 262_144, head_dim=128, rope_parameters=rope)


def qwen2_5_vl(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """Return the configuration of a Qwen2.5-VL's decoder."""
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]}
    return decoder(
        "qwen2_5_vl_text", layers, hidden, inner, heads, kv_heads, vocab, 128_000, rope_parameters=rope, head_dim=None
    )


def qwen3_vl(layers: int, hidden: int, inner: int, heads: int) -> dict[str, Any]:
    """Return the configuration of a Qwen3-VL's decoder."""
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return decoder(
        "qwen3_vl_text", layers, hidden, inner, heads, 8, 151_936, 262_144, head_dim=128, rope_parameters=rope
    )  # fmt: skip


def qwen3_5(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, value_heads: int) -> dict[str, Any]:
    """Return the configuration of a Qwen3.5's decoder."""
    rope = {"rope_type": "default", "rope_theta": 10_000_000.0, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    return decoder(
        "qwen3_5_text", layers, hidden, inner, heads, kv_heads, 248_320, 262_144, head_dim=256,
        rope_parameters=rope | {"partial_rotary_factor": 0.25}, linear_num_value_heads=value_heads, layer_types=None,
        full_attention_interval=4,
    )  # fmt: skip


def gemma3(layers: int, hidden: int, inner: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Return the configuration of a Gemma 3's decoder."""
    return decoder(
        "gemma3_text", layers, hidden, inner, heads, kv_heads, 262_208, 131_072, head_dim=256, sliding_window=1024,
        layer_types=None, rope_parameters=None, rope_scaling={"factor": 8.0, "rope_type": "linear"}, query_pre_attn_scalar=256,
    )  # fmt: skip


VICUNA = decoder("llama", 32, 4096, 11008, 32, 32, 32064, 4096)
VICUNA_13B = decoder("llama", 40, 5120, 13824, 40, 40, 32064, 4096)
LLAMA3 = decoder("llama", 32, 4096, 14336, 32, 8, 128_320, 8192, rope_theta=500_000.0)
SMOL_135M = decoder("llama", 30, 576, 1536, 9, 3, 49_280, 8192, rope_theta=100_000.0, head_dim=64)
SMOL_360M = decoder("llama", 32, 960, 2560, 15, 5, 49_280, 8192, rope_theta=100_000.0, head_dim=64)
# Alias: family, decoder, and the decoder's parameters without its token table, as published.
SIZES: dict[str, tuple[str, dict[str, Any], float]] = {
    "llava": ("llava", VICUNA, 6.6e9),
    "llava-7b": ("llava", VICUNA, 6.6e9),
    "llava-13b": ("llava", VICUNA_13B, 12.9e9),
    "bakllava": ("llava", decoder("mistral", 32, 4096, 14336, 32, 8, 32064, 32768, sliding_window=4096), 7.1e9),
    "llava-llama3": ("llava", LLAMA3, 7.5e9),
    "llava-next": ("llava_next", VICUNA, 6.6e9),
    "llava-next-13b": ("llava_next", VICUNA_13B, 12.9e9),
    "llava-next-llama3": ("llava_next", LLAMA3, 7.5e9),
    "llava-next-mistral": (
        "llava_next",
        decoder("mistral", 32, 4096, 14336, 32, 8, 32064, 32768, sliding_window=None, rope_theta=1_000_000.0),
        7.1e9,
    ),
    "llava-ov-0.5b": ("llava_onevision", decoder("qwen2", 24, 896, 4864, 14, 2, 152_000, 32768), 0.494e9),
    "llava-ov-7b": ("llava_onevision", decoder("qwen2", 28, 3584, 18944, 28, 4, 152_128, 32768), 7.07e9),
    "gemma3-4b": ("gemma3", gemma3(34, 2560, 10240, 8, 4), 3.88e9),
    "gemma3-12b": ("gemma3", gemma3(48, 3840, 15360, 16, 8), 11.77e9),
    "internvl3-1b": ("internvl", decoder("qwen2", 24, 896, 4864, 14, 2, 151_674, 32768), 0.494e9),
    "internvl3-2b": ("internvl", decoder("qwen2", 28, 1536, 8960, 12, 2, 151_674, 32768), 1.54e9),
    "internvl3-8b": ("internvl", decoder("qwen2", 28, 3584, 18944, 28, 4, 151_674, 32768), 7.07e9),
    "internvl3.5-1b": ("internvl", qwen3(28, 1024, 3072, 16), 0.596e9),
    "internvl3.5-2b": ("internvl", qwen3(28, 2048, 6144, 16), 1.72e9),
    "internvl3.5-4b": ("internvl", qwen3(36, 2560, 9728, 32), 4.02e9),
    "internvl3.5-8b": ("internvl", qwen3(36, 4096, 12288, 32), 7.57e9),
    "paligemma-3b": ("paligemma", decoder("gemma", 18, 2048, 16384, 8, 1, 257_216, 8192, head_dim=256), 2.51e9),
    "ministral3-3b": ("mistral3", ministral3(26, 3072, 9216), 3.43e9),
    "ministral3-8b": ("mistral3", ministral3(34, 4096, 14336), 7.95e9),
    "qwen2.5-vl-3b": ("qwen2_5_vl", qwen2_5_vl(36, 2048, 11008, 16, 2, 151_936), 3.09e9),
    "qwen2.5-vl-7b": ("qwen2_5_vl", qwen2_5_vl(28, 3584, 18944, 28, 4, 152_064), 7.07e9),
    "qwen3.5-0.8b": ("qwen3_5", qwen3_5(24, 1024, 3584, 8, 2, 16), 0.752e9),
    "qwen3.5-2b": ("qwen3_5", qwen3_5(24, 2048, 6144, 8, 2, 16), 1.88e9),
    "qwen3.5-4b": ("qwen3_5", qwen3_5(32, 2560, 9216, 16, 4, 32), 4.205e9),
    "qwen3-vl-2b": ("qwen3_vl", qwen3_vl(28, 2048, 6144, 16), 1.72e9),
    "qwen3-vl-4b": ("qwen3_vl", qwen3_vl(36, 2560, 9728, 32), 4.02e9),
    "qwen3-vl-8b": ("qwen3_vl", qwen3_vl(36, 4096, 12288, 32), 7.57e9),
    "cosmos-reason2-2b": ("qwen3_vl", qwen3_vl(28, 2048, 6144, 16), 1.72e9),
    "cosmos-reason2-8b": ("qwen3_vl", qwen3_vl(36, 4096, 12288, 32), 7.57e9),
    "smolvlm-256m": ("idefics3", SMOL_135M, 0.1345e9),
    "smolvlm-500m": ("idefics3", SMOL_360M, 0.362e9),
    "smolvlm2-256m": ("smolvlm", SMOL_135M, 0.1345e9),
    "smolvlm2-500m": ("smolvlm", SMOL_360M, 0.362e9),
    "smolvlm2-2.2b": ("smolvlm", decoder("llama", 24, 2048, 8192, 32, 32, 49_280, 8192, rope_theta=130_000.0), 1.71e9),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint of every family."""
    folder = tmp_path_factory.mktemp("aliases")
    for family in FAMILIES:
        tiny.EVERY[family](folder / family)
    return folder


@pytest.mark.parametrize("alias", ALIASES)
def test_what_an_alias_names_is_configuration_only(
    alias: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real sizes are planned, with no code of their own and no memory: what the decoder will weigh is known."""
    family, text, parameters = SIZES[alias]
    fields, tower, images, count = FAMILIES[family]
    if alias in SMALL_SMOLVLM:
        fields, tower, images, count = FAMILIES["idefics3"]
        tower = tower | {"model_type": "smolvlm_vision"}
    folder = Path(shutil.copytree(checkpoints / family, tmp_path / "checkpoint"))
    (folder / "processor_config.json").unlink(missing_ok=True)
    if family.startswith("qwen"):
        tower = tower | {"out_hidden_size": text["hidden_size"]}
    for name, changes in {
        "config.json": fields | {"text_config": text, "vision_config": tower, "dtype": "float16"},
        "preprocessor_config.json": images,
    }.items():
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | changes))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    # As on the Hub: its headers are compared when the weights are here.
    monkeypatch.setattr("leanvlm.exporter.plan.match_weights", lambda *arguments: None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", LeanVLMWarning)
        request = plan(ExportConfig(str(folder), (BUDGET,), tmp_path / "bundle"))
    context, most = WINDOWS.get(family, WINDOWS.get(alias, 0)), text["max_position_embeddings"]
    window = f"the bundle's context is {context} tokens, the checkpoint's {most}"
    assert [str(one.message).partition(":")[0] for one in said] == [window] * bool(context)
    assert list(dict.fromkeys(graph.budget for graph in request.vision)) == [BUDGET, count]
    assert request.sizes["decoder.onnx.data"] / 4 == pytest.approx(parameters, rel=0.02)
    found = request.checkpoint.config.text_config
    assert context_length(found) == (context or most)


def test_every_alias_has_sizes() -> None:
    assert set(SIZES) == set(ALIASES)
