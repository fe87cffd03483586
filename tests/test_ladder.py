"""Ladders of shapes: which one an image goes to, what is refused, and what a share of each keeps."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_sizes
from conftest import Command
from hypothesis import given
from hypothesis import strategies as some
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.config import Share, parse_budgets, parse_image_sizes
from leanvlm.exporter.ladder import usual_shapes
from leanvlm.exporter.plan import plan
from leanvlm.runtime.crops import NARROWEST, PIXELS, CropRule, CropShape, arrange, crop, own_size
from leanvlm.runtime.errors import InputError, ManifestError, UnsupportedModelError
from leanvlm.runtime.positions import PositionRule
from leanvlm.runtime.preprocess import ImageSpec, load_image

pytestmark = pytest.mark.fast

LIMITS = (4 * 28 * 28, 64 * 28 * 28)
SHAPES = tuple(CropShape((28 * rows, 28 * columns), (rows, columns)) for rows, columns in tiny_sizes.GRIDS)
RULE = CropRule("nearest", SHAPES, pixels=LIMITS)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sizes.TINY[request.param](tmp_path_factory.mktemp("ladder") / "checkpoint")


@given(some.integers(1, 3000), some.integers(1, 3000), some.sampled_from([28, 32]), some.integers(1, 9), some.integers(9, 400))
def test_the_model_s_own_size_is_transformers(height: int, width: int, factor: int, least: int, most: int) -> None:
    if max(height, width) > NARROWEST * min(height, width):
        return
    pixels = (least * factor**2, most * factor**2)
    assert own_size((height, width), factor, pixels) == smart_resize(height, width, factor, *pixels)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((112, 112), 0), ((84, 140), 1), ((140, 84), 2), ((1, 1), 0), ((480, 800), 1), ((2000, 1200), 2), ((300, 290), 0),
        ((290, 512), 1), ((3, 600), 1),
    ],
)  # fmt: skip
def test_an_image_goes_to_the_nearest_shape(size: tuple[int, int], wanted: int) -> None:
    assert arrange(size, RULE).shape == wanted
    cropped = crop([np.zeros((*size, 3), np.uint8)], spec(), RULE)
    assert list(cropped.inputs) == [wanted]
    assert cropped.inputs[wanted][PIXELS].shape == (1, 3, *SHAPES[wanted].pixels)


def spec() -> ImageSpec:
    return ImageSpec(SHAPES[0].pixels, None)


def test_images_of_several_shapes_are_batches_of_their_own() -> None:
    sizes = [(84, 140), (112, 112), (84, 140), (140, 84)]
    cropped = crop([np.full((*size, 3), at, np.uint8) for at, size in enumerate(sizes)], spec(), RULE)
    assert {shape: len(inputs[PIXELS]) for shape, inputs in cropped.inputs.items()} == {1: 2, 0: 1, 2: 1}
    assert [image.crops for image in cropped.images] == [((1, 0),), ((0, 0),), ((1, 1),), ((2, 0),)]
    for at, image in enumerate(cropped.images):
        ((shape, row),) = image.crops
        np.testing.assert_allclose(cropped.inputs[shape][PIXELS][row], at / 255, rtol=1e-5)


def test_an_image_that_transformers_finds_too_narrow_is_refused() -> None:
    assert arrange((2, 400), RULE).shape == 1
    with pytest.raises(InputError, match="an image of 401 x 2 is too narrow: one side may be 200 times the other"):
        arrange((2, 401), RULE)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_levels_are_the_processor_s(folder: Path, mode: str) -> None:
    """Of a picture of one of the shapes' sizes, which the processor leaves alone; and of one brought to it."""
    checkpoint = open_checkpoint(ExportConfig(str(folder), image_sizes=tiny_sizes.sizes(folder)))
    frame, theirs = checkpoint.frame, AutoImageProcessor.from_pretrained(folder)
    levels = np.random.default_rng(4).integers(0, 256, (150, 260, 3), dtype=np.uint8)
    picture = Image.fromarray(levels).convert("L" if mode in ("I;16", "LA") else mode if mode != "P" else "RGB")
    if mode == "P":
        picture = picture.quantize(64)
    if mode == "LA":
        picture = Image.merge("LA", (picture, picture.rotate(180)))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16))
    cropped = crop([picture], frame.image, frame.crops)
    ((shape, inputs),) = cropped.inputs.items()
    height, width = frame.crops.shapes[shape].pixels
    brought = load_image(picture).resize((width, height), Image.Resampling.BICUBIC)
    found = theirs(images=[brought], return_tensors="np")
    assert found["image_grid_thw"].tolist() == [[1, height // theirs.patch_size, width // theirs.patch_size]]
    patches, *_ = theirs.patchify(inputs[PIXELS][0], theirs.patch_size, theirs.merge_size, theirs.temporal_patch_size)
    np.testing.assert_allclose(patches, found["pixel_values"], atol=1e-6)


def test_the_usual_ladder_is_cameras_in_whole_tokens() -> None:
    shapes = usual_shapes(28, (3136, 12_845_056))
    assert [shape.text for shape in shapes] == ["728x1288", "476x644", "644x476", "448x448"]
    assert [shape.text for shape in usual_shapes(32, (65_536, 16_777_216))] == ["704x1280", "480x640", "640x480", "448x448"]
    assert len(usual_shapes(28, (784, 784 * 4))) == len(set(usual_shapes(28, (784, 784 * 4)))) < 4


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("100x112", r"--image-size 100x112 is not possible: sides are multiples of \d+ for this model, such as"),
        ("0x28", "image size 0x28 is not possible; a side is 1 to 4096 pixels"),
        ("448x448,448x448", "image sizes must be 1 to 16, and none of them named twice"),
        ("448", "--image-size '448' is not a list of heights and widths, such as 448x448,448x616"),
        ("448*448", "--image-size '448[*]448' is not a list"),
        ("3584x3584", r"--image-size 3584x3584 has 12845056 pixels; the model's image processor makes images of \d+ to \d+"),
    ],
)
def test_sizes_that_are_none_are_refused_before_the_work(
    leanvlm: Command, folder: Path, tmp_path: Path, asked: str, message: str
) -> None:
    result = leanvlm("export", "--model", folder, "--image-size", asked, "-o", tmp_path / "out")
    assert result.returncode == 2
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_other_families_have_one_size(tiny_llava: Path) -> None:
    with pytest.raises(InputError, match="--image-size is for models whose images may have any size; this one takes 154 x 154"):
        open_checkpoint(ExportConfig(str(tiny_llava), image_sizes=((448, 448),)))


def test_positions_in_a_row_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--positions compact is not possible: this model's image tokens have the row"):
        plan(ExportConfig(str(folder), (6,), tmp_path / "out", positions="compact"))
    for positions in (None, "original"):
        assert plan(ExportConfig(str(folder), (6,), tmp_path / "out", positions=positions)).positions == PositionRule(  # type: ignore[arg-type]
            "original", 3, "grid"
        )


def test_a_share_is_one_of_every_shape_and_a_number_at_most_all(folder: Path, tmp_path: Path) -> None:
    config = ExportConfig(str(folder), parse_budgets("25%,15,1/2"), tmp_path / "out", image_sizes=tiny_sizes.sizes(folder))
    assert [str(budget) for budget in config.budgets] == ["25%", "15", "1/2"]
    assert config.named_output == tmp_path / "out"
    request = plan(config)
    kept = {budget: [graph.kept for graph in request.vision if graph.budget == budget] for budget in (4, 15, 8, 16)}
    assert kept == {4: [4, 4, 4], 15: [15, 15, 15], 8: [8, 8, 8], 16: [16, 15, 15]}
    # 15 of 15 is the unpruned graph, which is written once.
    assert len(request.files) == 10
    assert str(ExportConfig("x", (Share(25, 100), 64)).named_output) == "x-25pct-64"
    assert parse_image_sizes("448x448, 448X616") == ((448, 448), (448, 616))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": None}, "pixels, the least and the most of an image, go with nearest shapes"),
        ({"kind": "whole"}, "pixels, the least and the most of an image, go with nearest shapes"),
        ({"shapes": SHAPES[::-1]}, "the first of the shapes must be the largest"),
        ({"shapes": (SHAPES[0], CropShape((64, 64), (2, 2)))}, "the tokens of all nearest shapes must stand for"),
    ],
)
def test_rules_that_do_not_go_together_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        replace(RULE, **change)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 20, "width": 20}, "shortest_edge and longest_edge are the least"),
        ({"shortest_edge": 100, "longest_edge": 90}, "shortest_edge and longest_edge are the least"),
        ({"shortest_edge": 1, "longest_edge": 200}, "shortest_edge and longest_edge are the least"),
    ],
)
def test_a_processor_whose_sizes_are_none_is_refused(folder: Path, size: dict[str, int], message: str) -> None:
    checkpoint = open_checkpoint(ExportConfig(str(folder)))
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "temporal_patch_size": 2, "size": size}
    processor["patch_size"] = checkpoint.config.vision_config.patch_size
    with pytest.raises(UnsupportedModelError, match=message):
        checkpoint.family.frame(checkpoint.config, processor, {})
    with pytest.raises(UnsupportedModelError, match="merge_size = 4 is not the tower's 2"):
        checkpoint.family.frame(checkpoint.config, processor | {"merge_size": 4}, {})


def test_every_family_has_its_largest_shape_first(tmp_path: Path) -> None:
    for name in ("llava", "smolvlm", "qwen2_5_vl"):
        shapes = open_checkpoint(ExportConfig(str(tiny.EVERY[name](tmp_path / name)))).frame.crops.shapes
        assert shapes[0].tokens == max(shape.tokens for shape in shapes)
