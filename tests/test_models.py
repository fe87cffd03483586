"""Families against the unmodified Hugging Face model: tower, projector, loading in every key layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.exporter.towers.siglip_squares import SiglipSquares
from leanvlm.runtime.errors import CheckpointError, UnsupportedModelError


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=generator)


def test_tower_and_projector_equal_the_model(tiny_llava: Path, pixels: torch.Tensor) -> None:
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    model = load_model(checkpoint)
    expected = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).eval()
    with torch.no_grad():
        parts = checkpoint.family.parts(model)
        features = parts.project(parts.tower("feature", None, checkpoint.spec.shape)(pixels).hidden)
        wanted = torch.stack(list(expected.model.get_image_features(pixels, return_dict=True).pooler_output))
    assert features.shape == (3, tiny.TOKENS, 128)
    assert torch.equal(features, wanted)


@pytest.mark.parametrize("scored", ["feature", "last"])
def test_scores_equal_those_of_the_model(tiny_llava: Path, pixels: torch.Tensor, scored: ScoredBlock) -> None:
    """The tower's one attention row and keys against eager attention and the outputs of the model's own projections."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    model = load_model(checkpoint)
    with torch.no_grad():
        hidden, keys, attention, unsplit, _ = checkpoint.family.parts(model).tower(scored, None, checkpoint.spec.shape)(pixels)
    wanted = Reference(checkpoint, model).vision(pixels.numpy(), scored)
    assert attention.shape == unsplit.shape == (3, tiny.TOKENS)
    assert keys.shape == (3, tiny.TOKENS, 6, 16)
    np.testing.assert_allclose(attention.numpy(), wanted.saliency.numpy(), rtol=tolerances.ATTENTION)
    np.testing.assert_allclose(unsplit.numpy(), wanted.unsplit.numpy(), rtol=tolerances.ATTENTION)
    for found, other in ((hidden, wanted.hidden), (keys, wanted.keys)):
        assert relative_difference(found.numpy(), other.numpy()) < tolerances.FEATURES["fp32"]


def test_a_scored_block_behind_the_feature_layer_changes_only_the_scores(tiny_llava: Path, pixels: torch.Tensor) -> None:
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    model = load_model(checkpoint)
    with torch.no_grad():
        feature, last = (
            checkpoint.family.parts(model).tower(scored, None, checkpoint.spec.shape)(pixels) for scored in ("feature", "last")
        )
    assert torch.equal(feature[0], last[0])
    assert not torch.allclose(feature[2], last[2])


@pytest.mark.parametrize("layout", ["nested", "flat", "legacy"])
def test_every_key_layout_loads(tiny_llava: Path, tmp_path: Path, layout: str) -> None:
    folder = _with_keys(tiny_llava, tmp_path, lambda key: _rename(key, layout))
    original = load_file(tiny_llava / "model.safetensors")
    model = load_model(open_checkpoint(ExportConfig(str(folder))))
    weights = model.state_dict()
    assert len(weights) == len(original)
    for key, value in original.items():
        name = next(k for k in weights if _flat(k) == _flat(key))
        assert torch.equal(weights[name], value)


def test_missing_weight_is_named(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _with_keys(tiny_llava, tmp_path, lambda key: None if "linear_2.bias" in key else key)
    with pytest.raises(CheckpointError, match=r"misses 1 weight.*linear_2\.bias"):
        load_model(open_checkpoint(ExportConfig(str(folder))))


def test_unexpected_weight_is_named(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _with_keys(tiny_llava, tmp_path, lambda key: key, extra={"model.stray.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"unexpected.*model\.stray\.weight"):
        load_model(open_checkpoint(ExportConfig(str(folder))))


def test_wrong_shape_is_named(tiny_llava: Path, tmp_path: Path) -> None:
    folder = _with_keys(tiny_llava, tmp_path, lambda key: None if key.endswith("lm_head.weight") else key,
                        extra={"lm_head.weight": torch.zeros(7, 128)})  # fmt: skip
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[7, 128\]"):
        load_model(open_checkpoint(ExportConfig(str(folder))))


def test_weights_are_mapped_not_copied(tiny_llava: Path) -> None:
    """Two loads of a mapped file share their pages with it; a copy would own its storage."""
    model = load_model(open_checkpoint(ExportConfig(str(tiny_llava))))
    assert all(not parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_feature_layer": -9}, "outside a tower of 5 blocks"),
        ({"vision_feature_layer": [-2, 6]}, "outside a tower of 5 blocks"),
        ({"vision_feature_layer": []}, "outside a tower of 5 blocks"),
    ],
)
def test_unsupported_configurations_say_so(tiny_llava: Path, change: dict[str, object], words: str) -> None:
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    for key, value in change.items():
        setattr(checkpoint.config, key, value)
    with pytest.raises(UnsupportedModelError, match=words.replace("(", r"\(")):
        checkpoint.family.describe(checkpoint.config)


def _flat(key: str) -> str:
    parts = key.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")
    return parts.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")


def _rename(key: str, layout: str) -> str:
    flat = _flat(key)
    if layout == "legacy":  # as the public LLaVA-1.5 checkpoints
        flat = flat.replace("vision_tower.", "vision_tower.vision_model.")
        flat = flat.replace("language_model.", "language_model.model.")
        return flat.replace("lm_head", "language_model.lm_head")
    deeper = "vision_tower.vision_model." if layout == "nested" else "vision_tower."
    return flat if flat.startswith("lm_head") else "model." + flat.replace("vision_tower.", deeper)


def _with_keys(source: Path, folder: Path, rename, extra=None) -> Path:  # type: ignore[no-untyped-def]
    """Copy a checkpoint with its weights renamed, dropped (None) or added."""
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = {new: value for key, value in load_file(source / "model.safetensors").items() if (new := rename(key))}
    save_file({**weights, **(extra or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("side", [6, 19, 25])
def test_positions_by_share_of_the_side_are_the_models(side: int) -> None:
    """At 6 patches a side each has its own row of the table; at 19 and 25 rounding gives some their neighbour's."""
    config = SmolVLMVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=2 * side, patch_size=2
    )
    torch.manual_seed(side)
    model = SmolVLMVisionTransformer(config).eval()
    torch.nn.init.normal_(model.embeddings.position_embedding.weight)
    pixels = torch.randn(2, 3, 2 * side, 2 * side)
    tower = SiglipSquares(model, 0, None, 1)
    with torch.no_grad():
        assert torch.equal(tower(pixels).hidden, model(pixels).last_hidden_state)
    in_order = torch.equal(tower.positions, model.embeddings.position_embedding.weight)
    assert in_order == (side == 6)
