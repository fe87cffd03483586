"""What is particular to Mistral 3: what of a checkpoint is refused, and that each of its stages counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sizes
import torch
from original_lines import LinedOriginal
from original_sizes import pictures
from transformers.models.auto import tokenization_auto

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.decoders import QUERY_SCALE, check_decoder
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.exporter.text_files import check_text
from leanvlm.exporter.tokenizer import load_tokenizer
from leanvlm.runtime.errors import CheckpointError, LeanVLMError, UnsupportedModelError
from leanvlm.runtime.preprocess import preprocess


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; no test may change it."""
    return tiny_sizes.TINY["mistral3"](tmp_path_factory.mktemp("saved") / "checkpoint")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "config.json",
            {"vision_feature_layer": [-1, -2]},
            r"vision_feature_layer \[-1, -2\] is not supported: the projector's",
        ),
        ("config.json", {"vision_feature_layer": 9}, "vision_feature_layer 9 is outside a tower of 4 blocks"),
        ("config.json", {"spatial_merge_size": 0}, "spatial_merge_size is 0; it must be from 1 to 16"),
        ("config.json", {"vision_config": {"patch_size": 0}}, "patch_size is 0; it must be from 1 to 512"),
        ("config.json", {"vision_config": {"num_attention_heads": 16}}, "hidden_size 96 is not a multiple of 4 for each of 16"),
        ("config.json", {"vision_config": {"model_type": "clip_vision_model"}}, "with a 'clip_vision_model' tower is not"),
        ("config.json", {"text_config": {"model_type": "ministral"}}, "with a 'ministral' decoder is not supported"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop is not supported: an image is shown whole"),
        (
            "preprocessor_config.json",
            {"size": {"height": 84, "width": 84}},
            "longest_edge is the most pixels of the longer side",
        ),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is off"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "supported: PixtralImageProcessor"),
    ],
)
def test_what_is_not_handled_is_refused(saved: Path, tmp_path: Path, name: str, changes: dict[str, Any], words: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    raw = json.loads((folder / name).read_text())
    nested = {key: raw[key] | value for key, value in changes.items() if key.endswith("_config")}
    (folder / name).write_text(json.dumps(raw | changes | nested))
    with pytest.raises(LeanVLMError, match=words):
        open_checkpoint(ExportConfig(str(folder)))


@pytest.mark.parametrize("name", QUERY_SCALE)
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_query_scale_that_is_not_given_is_refused(saved: Path, name: str, target: str) -> None:
    text = open_checkpoint(ExportConfig(str(saved))).config.text_config
    check_decoder(text, target)
    text.rope_parameters = {**text.rope_parameters, name: None}
    with pytest.raises(UnsupportedModelError, match=f"a 'ministral3' decoder scales its queries by .*{name}"):
        check_decoder(text, target)


def test_a_break_that_is_no_token_is_refused(saved: Path) -> None:
    checkpoint = open_checkpoint(ExportConfig(str(saved)))
    config = ExportConfig(str(saved))
    check_text(config, checkpoint)
    layout = replace(checkpoint.frame.layout, line_break="[BREAK]")
    changed = replace(checkpoint, frame=replace(checkpoint.frame, layout=layout))
    with pytest.raises(CheckpointError, match="tokenizer does not know '\\[BREAK\\]', which ends a line of image tokens"):
        check_text(config, changed)


def test_the_tokenizer_s_own_file_is_read_whatever_is_installed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mistral-common is, transformers takes its class unless it is told not to."""
    auto = "transformers.models.auto.tokenization_auto"
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral3", "MistralCommonBackend")
    monkeypatch.setattr(f"{auto}.tokenizer_class_from_name", lambda name: {"MistralCommonBackend": str}.get(name))
    monkeypatch.setattr(
        f"{auto}._use_mistral_format", lambda *args, mistral_format=None, **options: mistral_format is not False
    )
    assert load_tokenizer(saved).backend_tokenizer.token_to_id("[IMG_BREAK]") == 4


@torch.no_grad()
def test_levels_in_place_of_pixels(saved: Path) -> None:
    """As the GPU targets take images, of a shape that is no square."""
    checkpoint = open_checkpoint(ExportConfig(str(saved), image_sizes=((84, 140),)))
    reference, shape = Reference(checkpoint, load_model(checkpoint)), checkpoint.frame.crops.shapes[0]
    picture = np.random.default_rng(2).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    levels = torch.from_numpy(preprocess([picture], replace(checkpoint.image_spec, layout="uint8")))
    pixels = preprocess([picture], checkpoint.image_spec)
    parts = reference.parts
    found = parts.project(parts.tower("feature", checkpoint.image_spec, shape)(levels).hidden).numpy()
    wanted = parts.project(parts.tower("feature", None, shape)(torch.from_numpy(pixels)).hidden).numpy()
    limit = tolerances.features_limit("fp32", reference.rounding(pixels, wanted))
    assert relative_difference(found, wanted) < limit


def _merge_patches_by_patch(model: Any) -> None:
    merging, columns = model.model.multi_modal_projector.patch_merger.merging_layer, model.config.vision_config.hidden_size
    merging.weight.data = merging.weight.data.unflatten(1, (columns, 4)).transpose(1, 2).flatten(1)


def _swap_rows_and_columns(model: Any) -> None:
    tower = model.model.vision_tower
    turn = tower.patch_positional_embedding.forward
    tower.patch_positional_embedding.forward = lambda x, position_ids: turn(x, position_ids.flip(1))


def _scale_no_queries(model: Any) -> None:
    rope = model.config.text_config.rope_parameters
    rope["llama_4_scaling_beta"] = 0.0


def _turn_by_plain_angles(model: Any) -> None:
    rotary = model.model.language_model.rotary_emb
    rotary.inv_freq = 1.0 / 50_000.0 ** (torch.arange(0, 16, 2) / 16)


def _break_lines_elsewhere(model: Any) -> None:
    table = model.get_input_embeddings().weight.data
    table[4] = table[5]


@pytest.mark.parametrize(
    "broken",
    [_merge_patches_by_patch, _swap_rows_and_columns, _scale_no_queries, _turn_by_plain_angles, _break_lines_elsewhere],
)
def test_a_broken_stage_changes_the_answer(saved: Path, broken: Callable[[Any], None]) -> None:
    """Of transformers' own model, so that equal answers prove something."""
    original = LinedOriginal.open(saved)
    inputs = original.inputs("What is on the table?", pictures()[0].resize((140, 84)))
    wanted = original.generate(inputs)
    broken(original.model)
    assert original.generate(inputs) != wanted
