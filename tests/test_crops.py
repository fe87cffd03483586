"""Crops of images against every checkpoint's own image processor, level by level, and configurations that are refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tiles
from bounds import bounded, one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import VALUES, damaged_json, paths, replaced
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image as transformers_load_image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.idefics3 import image_processing_pil_idefics3 as idefics3
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import Checkpoint, open_checkpoint
from leanvlm.runtime.crops import Cropped, CropRule, CropShape, arrange, crop
from leanvlm.runtime.errors import InputError, LeanVLMError, ManifestError, UnsupportedModelError
from leanvlm.runtime.preprocess import load_image
from leanvlm.runtime.records import plain, read

CONFIG, PROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer_config.json"
# The same arithmetic in another order of fp32.
NORMALISED = 1e-6
ODD_SIZES = [(1000, 7), (5, 900), (1, 1), (2, 3), (70, 70), (140, 210), (84, 168), (253, 252), (300, 217), (50, 40), (640, 480)]
Changes = dict[str, Any]


def pinpoints(tile: int, *grids: tuple[int, int]) -> list[list[int]]:
    return [[tile * rows, tile * columns] for rows, columns in grids]


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def next_tiles(tile: int, *grids: tuple[int, int]) -> tuple[Changes, Changes]:
    """Changes that give a LLaVA-NeXT other tiles."""
    listed = pinpoints(tile, *grids)
    sizes = {"size": {"shortest_edge": tile}, "crop_size": square(tile), "image_grid_pinpoints": listed}
    return {"vision_config": {"image_size": tile}, "image_grid_pinpoints": listed}, sizes


def onevision_tiles(tile: int, longest: int) -> tuple[Changes, Changes]:
    listed = pinpoints(tile, *((rows, columns) for rows in range(1, longest + 1) for columns in range(1, longest + 1)))
    sizes = {"size": square(tile), "image_grid_pinpoints": listed}
    return {"vision_config": {"image_size": tile}, "image_grid_pinpoints": listed}, sizes


def intern_tiles(tile: int, least: int, most: int) -> tuple[Changes, Changes]:
    return {"vision_config": {"image_size": [tile, tile]}}, {
        "size": square(tile), "min_patches": least, "max_patches": most,
    }  # fmt: skip


def edge_tiles(tile: int, longest: int, split: bool = True, patch: int = 14) -> tuple[Changes, Changes]:
    sizes = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}, "do_image_splitting": split}
    return {"vision_config": {"image_size": tile, "patch_size": patch}, "scale_factor": 1}, sizes


GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
# A tiny checkpoint, and what is changed in its configuration and in its image processor's.
CASES: dict[str, tuple[str, Changes, Changes]] = {
    "llava_next": ("llava_next", {}, {}),
    "llava_next/56": ("llava_next", *next_tiles(56, (1, 4), (1, 1), (3, 2), (4, 1), (2, 2), (4, 4))),
    "llava_onevision": ("llava_onevision", {}, {"image_mean": [0.5, 0.2, 0.9]}),
    "internvl": ("internvl", {}, {}),
    "internvl/2-5": ("internvl", *intern_tiles(56, 2, 5)),
    # Where a picture of 5 : 4 fits two in a row as well as two in a column.
    "internvl/2": ("internvl", *intern_tiles(56, 2, 2)),
    "internvl/7": ("internvl", *intern_tiles(56, 7, 7)),
    "internvl/whole": ("internvl", *intern_tiles(56, 1, 1)),
    "smolvlm": ("smolvlm", {}, {}),
    "smolvlm/whole": ("smolvlm/whole", {}, {}),
    "smolvlm/odd": ("smolvlm", *edge_tiles(35, 105, patch=7)),
    "smolvlm/200": ("smolvlm", *edge_tiles(56, 200)),
    "idefics3": ("idefics3", {}, {}),
    "idefics3/whole": ("idefics3", *edge_tiles(70, 131, split=False)),
}
FULL_SIZE: dict[str, tuple[str, Changes, Changes]] = {
    "llava_next": ("llava_next", *next_tiles(336, *GRIDS)),
    "llava_onevision": ("llava_onevision", *onevision_tiles(384, 6)),
    "internvl": ("internvl", *intern_tiles(448, 1, 12)),
    "smolvlm": ("smolvlm", *edge_tiles(512, 2048, patch=16)),
    "idefics3": ("idefics3", *edge_tiles(364, 1456)),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint as we read it, and its own image processor."""

    checkpoint: Checkpoint
    processor: Any

    @property
    def rule(self) -> CropRule:
        """What images are cut by."""
        return self.checkpoint.frame.crops

    def theirs(self, images: list[Any], **options: Any) -> np.ndarray:
        """Return the crops (C, 3, H, W) of the images of one prompt, in levels if nothing else is asked for."""
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"} | options
        if hasattr(self.processor, "crop_to_patches"):
            options["crop_to_patches"] = True
        out = self.processor([images], **options) if len(images) > 1 else self.processor(images, **options)
        pixels = out["pixel_values"]
        return np.asarray(pixels if pixels.ndim == 4 else pixels.reshape(-1, *pixels.shape[2:]))

    def ours(self, images: list[Any], among: int | None = None) -> Cropped:
        """Return the same of the runtime, in levels."""
        return crop(images, replace(self.checkpoint.image_spec, layout="uint8"), self.rule, among)

    def assert_equal(self, *images: Any) -> None:
        """Check that crops, their number and their order are the same."""
        cropped, expected = self.ours(list(images)), self.theirs([load_image(image) for image in images])
        np.testing.assert_array_equal(cropped.inputs[0]["pixel_values"], expected)
        assert [one.arrangement.crops for one in cropped.images] == [len(one.crops) for one in cropped.images]
        assert [crop for one in cropped.images for crop in one.crops] == [(0, row) for row in range(len(expected))]
        assert all(len(one.crops) <= self.rule.most for one in cropped.images)


def merged(data: Any, changes: Any) -> Any:
    """Return nested JSON with other values; objects are merged where both have one, but for sizes."""
    if not isinstance(data, dict) or not isinstance(changes, dict) or set(data) & {"height", "shortest_edge", "longest_edge"}:
        return changes
    return data | {key: merged(data.get(key), value) for key, value in changes.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the files of a tiny checkpoint, which no test may change."""
    return cache(lambda shape: tiny_tiles.TINY[shape](tmp_path_factory.mktemp("tiny") / "checkpoint"))


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function that returns a tiny checkpoint with changed files; its weights no longer fit, and are not read."""

    def changed(shape: str, *changes: Changes) -> Path:
        source, folder = folders(shape), tmp_path_factory.mktemp("changed")
        for path in source.iterdir():
            (folder / path.name).hardlink_to(path)
        for name, change in zip((CONFIG, PROCESSOR, TOKENIZER), changes, strict=False):
            data = merged(json.loads((source / name).read_text(encoding="utf-8")), change)
            (folder / name).unlink()
            (folder / name).write_text(json.dumps(data), encoding="utf-8")
        return folder

    return changed


@pytest.fixture(scope="module")
def case(make: Make) -> Callable[..., Case]:
    """A function that opens a checkpoint of `CASES` or `FULL_SIZE`."""

    @cache
    def opened(name: str, full: bool = False) -> Case:
        folder = make(*(FULL_SIZE if full else CASES)[name])
        return Case(opening(folder), AutoImageProcessor.from_pretrained(folder))

    return opened


def opening(folder: Path) -> Checkpoint:
    return open_checkpoint(ExportConfig(str(folder), (1,), folder / "bundle"))


def noise(width: int, height: int) -> Image.Image:
    """An image without equal neighbours, so that a change of one weight or of the rounding shows somewhere."""
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("name", CASES)
def test_crops_of_odd_sizes_equal_the_processors(case: Callable[..., Case], name: str) -> None:
    for size in ODD_SIZES:
        case(name).assert_equal(noise(*size))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_crops_of_full_size_equal_the_processors(case: Callable[..., Case], name: str) -> None:
    for size in ((1023, 641), (50, 800)):
        case(name, full=True).assert_equal(noise(*size))


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from([*CASES]), size=st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_crops_of_any_size_equal_the_processors(case: Callable[..., Case], name: str, size: tuple[int, int]) -> None:
    case(name).assert_equal(noise(*size))


@pytest.mark.parametrize("name", CASES)
def test_several_images_of_a_prompt_equal_the_processors(case: Callable[..., Case], name: str) -> None:
    """Those of a OneVision are padded to squares, also the one that is one already."""
    one, first = case(name), noise(200, 90)
    if "llava_next" in name or one.processor.__class__.__name__.startswith(("SmolVLM", "Idefics3")):
        for image in (first, noise(60, 61)):  # Which their processor fills up to the same number.
            one.assert_equal(image)
        cropped = one.ours([first, noise(60, 61)])
        alone = [one.ours([image]).inputs[0]["pixel_values"] for image in (first, noise(60, 61))]
        np.testing.assert_array_equal(cropped.inputs[0]["pixel_values"], np.concatenate(alone))
        return
    one.assert_equal(first, noise(30, 91), noise(50, 50))
    # Of a prompt's images, those that are not encoded yet.
    part = one.ours([first], among=3).inputs[0]["pixel_values"]
    np.testing.assert_array_equal(part, one.ours([first, first, first]).inputs[0]["pixel_values"][: len(part)])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "smolvlm", "smolvlm/whole", "idefics3"])
def test_normalised_values_equal_the_processors(case: Callable[..., Case], name: str) -> None:
    one, image = case(name), noise(150, 101)
    pixels = crop([image], one.checkpoint.image_spec, one.rule).inputs[0]["pixel_values"]
    assert pixels.dtype == np.float32
    assert pixels.flags.c_contiguous
    expected = one.theirs([image], do_rescale=True, do_normalize=True)
    np.testing.assert_allclose(pixels, expected, rtol=NORMALISED, atol=NORMALISED)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_modes_equal_the_processors(case: Callable[..., Case], mode: str) -> None:
    source = noise(97, 55)
    if mode in ("LA", "PA", "RGBA"):
        source.putalpha(noise(97, 55).convert("L"))
    for name in ("llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3"):
        one, image = case(name), source.convert(mode)
        np.testing.assert_array_equal(one.ours([image]).inputs[0]["pixel_values"], one.theirs([image]))


def files() -> dict[str, bytes]:
    """Pictures in files: turned by EXIF, moving, with a transparent colour."""
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = noise(60, 45).convert("P")
    options: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "turned": (noise(120, 50), "JPEG", {"exif": exif}),
        "animated": (palette, "GIF", {"save_all": True, "append_images": [noise(60, 45).rotate(180)]}),
        "transparent": (palette, "PNG", {"transparency": 3}),
    }
    out = {}
    for name, (image, form, more) in options.items():
        file = io.BytesIO()
        image.save(file, form, **more)
        out[name] = file.getvalue()
    return out


def test_files_equal_the_processors(case: Callable[..., Case], tmp_path: Path) -> None:
    for kind, data in files().items():
        path = tmp_path / kind
        path.write_bytes(data)
        with Image.open(path) as opened:
            # transformers' `load_image` would drop what is transparent; handed to the processor, it is blended with white.
            image = opened.copy() if kind == "transparent" else transformers_load_image(opened)
        for name in ("llava_next", "llava_onevision", "internvl", "smolvlm"):
            np.testing.assert_array_equal(
                case(name).ours([path]).inputs[0]["pixel_values"], case(name).theirs([image]), err_msg=kind
            )


def test_sixteen_bits_are_scaled_and_not_clipped(case: Callable[..., Case]) -> None:
    """Where we differ on purpose: see `load_image`."""
    levels = np.asarray(noise(97, 55).convert("L"))
    wide, narrow = Image.fromarray(levels.astype(np.uint16) * 256 + 77), Image.fromarray(levels)
    for name in ("llava_next", "internvl", "smolvlm"):
        np.testing.assert_array_equal(case(name).ours([wide]).inputs[0]["pixel_values"], case(name).theirs([narrow]))


def test_a_picture_too_narrow_for_a_square_is_refused(case: Callable[..., Case]) -> None:
    with pytest.raises(InputError, match="1 x 20000 is too narrow: padding it would make 20000 x 20000 pixels"):
        case("llava_onevision").ours([Image.new("RGB", (1, 20_000))] * 2)


SIDES = st.integers(1, 40) | st.integers(1, 3000) | st.integers(1, 60_000)


def reported(one: Case, height: int, width: int) -> tuple[tuple[int, int], int]:
    """Return rows and columns of tiles, and how many crops there are, as transformers counts them."""
    config = one.checkpoint.config
    if hasattr(config, "image_grid_pinpoints"):
        given = config.image_grid_pinpoints, config.vision_config.image_size
        return get_anyres_image_grid_shape((height, width), *given), image_size_to_num_patches((height, width), *given)
    if hasattr(one.processor, "crop_to_patches"):
        numbers = one.processor.min_patches, one.processor.max_patches
        tile = one.processor.size
        columns, rows = get_optimal_tiled_canvas((height, width), (tile["height"], tile["width"]), *numbers)
        count = one.processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
        return ((0, 0) if count == 1 else (rows, columns)), count
    return edge_rows(one.processor, height, width)


def edge_rows(processor: Any, height: int, width: int) -> tuple[tuple[int, int], int]:
    """Let an Idefics3's processor cut an image that has a size and no pixels."""

    class Sizes(type(processor)):  # type: ignore[misc]
        def resize(self, image: Any, size: Any, **options: Any) -> np.ndarray:
            longest = size["longest_edge"] if hasattr(size, "longest_edge") else None
            new = idefics3.get_resize_output_image_size(image, longest) if longest else (size["height"], size["width"])
            return empty(*new)

    def empty(height: int, width: int) -> np.ndarray:
        return np.broadcast_to(np.zeros(1, np.uint8), (3, height, width))

    options = {"do_rescale": False, "do_normalize": False, "do_pad": False, "do_convert_rgb": False}
    out = Sizes(**processor.to_dict())([empty(height, width)], **options, return_row_col_info=True)
    return (out["rows"][0][0], out["cols"][0][0]), len(out["pixel_values"][0])


@pytest.mark.parametrize("full", [False, True])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), height=SIDES, width=SIDES)
def test_an_arrangement_is_what_the_processor_reports(
    case: Callable[..., Case], full: bool, data: st.DataObject, height: int, width: int
) -> None:
    one = case(data.draw(st.sampled_from([*(FULL_SIZE if full else CASES)])), full)
    if data.draw(st.booleans()):
        width = height * data.draw(st.sampled_from([1, 2, 3, 4])) // data.draw(st.sampled_from([1, 2, 3, 4])) or 1
    arrangement = arrange((height, width), one.rule)
    assert (arrangement.tiles, arrangement.crops) == reported(one, height, width)
    assert arrangement.crops <= one.rule.most


def test_of_equal_arrangements_the_larger_needs_more_than_half_its_pixels() -> None:
    """At half of them exactly, which no square tile shows."""
    shape = CropShape((50, 100), (1, 1))
    listed = tuple((rows, columns) for columns in range(1, 5) for rows in range(1, 5) if rows * columns <= 4)
    rule = CropRule("tiles", (shape,), choose="aspect", arrangements=tuple(sorted(listed, key=lambda one: one[0] * one[1])))
    for side in (99, 100, 101):
        columns, rows = get_optimal_tiled_canvas((side, side), shape.pixels, 1, 4)
        assert arrange((side, side), rule).tiles == ((0, 0) if rows * columns == 1 else (rows, columns))
        assert rows * columns == (1 if side <= 100 else 4)


def test_the_most_crops_are_made_of_some_image(case: Callable[..., Case]) -> None:
    sizes = [(height, width) for height in (1, 50, 400, 2000) for width in (1, 50, 400, 2000)]
    for name in CASES:
        found = {arrange(size, case(name).rule).crops for size in sizes}
        assert max(found) <= case(name).rule.most
        assert max(found) == case(name).rule.most


NO_TILES = "is not the 70 x 70 that the tower takes"
REFUSED: list[tuple[str, tuple[Changes, ...], str]] = [
    ("llava_next", next_tiles(70, (1, 2))[:1], "image_grid_pinpoints are not those of config.json"),
    ("llava_next", ({"image_grid_pinpoints": [[70, 100]]}, {"image_grid_pinpoints": [[70, 100]]}), "no whole number of"),
    ("llava_next", ({"image_grid_pinpoints": [[70, 0]]}, {"image_grid_pinpoints": [[70, 0]]}), "no whole number of"),
    ("llava_next", ({"image_grid_pinpoints": [[70.0, 140]]}, {"image_grid_pinpoints": [[70.0, 140]]}), "a list of .height"),
    ("llava_next", ({"image_grid_pinpoints": []}, {"image_grid_pinpoints": []}), "image_grid_pinpoints"),
    ("llava_next", next_tiles(70, (1, 2), (16, 17)), "would become 273 crops; at most 256"),
    ("llava_next", ({}, {"image_processor_type": "CLIPImageProcessor"}), "'CLIPImageProcessor.*' is not supported"),
    ("llava_next", ({}, {"size": {"shortest_edge": 56}}), NO_TILES),
    ("llava_next", ({}, {"crop_size": square(56)}), NO_TILES),
    ("llava_next", ({}, {"size": {"longest_edge": 70}}), "size"),
    ("llava_next", ({}, {"do_resize": False}), "do_resize is off"),
    ("llava_next", ({}, {"resample": 9}), "resample is 9"),
    ("llava_next", ({"vision_feature_select_strategy": "full"},), "'full' leaves the class token"),
    ("llava_onevision", ({}, {"do_resize": False}), "do_resize is off"),
    ("llava_onevision", ({}, {"size": square(56)}), NO_TILES),
    ("llava_onevision", ({"vision_aspect_ratio": "anyres"},), "vision_aspect_ratio 'anyres' is not supported"),
    ("llava_onevision", ({"vision_aspect_ratio": "anyres_max_0"},), "vision_aspect_ratio 'anyres_max_0' is not supported"),
    ("llava_onevision", ({"vision_aspect_ratio": "square"},), "vision_aspect_ratio 'square' is not supported"),
    ("llava_onevision", ({"vision_feature_select_strategy": "default"},), "would drop a patch"),
    ("internvl", ({}, {"max_patches": 256}), "max_patches 256 are not supported"),
    ("internvl", ({}, {"max_patches": -1}), "max_patches -1 are not supported"),
    ("internvl", ({}, {"min_patches": 7}), "min_patches 7 and max_patches 6 are not supported"),
    ("internvl", ({}, {"min_patches": 1.5}), "min_patches 1.5"),
    ("internvl", ({}, {"do_resize": False}), "do_resize is off"),
    ("internvl", ({}, {"size": square(70)}), "is not the 84 x 84 that the tower takes"),
    ("internvl", ({}, {"image_processor_type": "LlavaNextImageProcessor"}), "is not supported"),
    ("internvl", ({"downsample_ratio": 0.3},), "downsample_ratio 0.3 is not supported"),
    ("internvl", ({"downsample_ratio": 0.25},), "6 patches a row are no whole number of cells of 4"),
    ("internvl", ({"downsample_ratio": 0.0},), "downsample_ratio 0.0 is not supported"),
    ("internvl", ({"vision_config": {"image_size": [84, 98]}},), r"image_size [\[\(]84, 98[\]\)] is not supported"),
    ("internvl", ({"vision_config": {"patch_size": [14, 7]}},), r"patch_size [\[\(]14, 7[\]\)] is not supported"),
    ("internvl", ({"vision_config": {"image_size": "84"}},), "image_size"),
    ("internvl", ({"vision_feature_layer": [-1, 1]},), "vision_feature_layer"),
    ("internvl", ({"vision_feature_layer": 0},), "is not read by transformers; for 4 blocks write -5"),
    ("llava_next", ({"vision_feature_layer": 0},), "is not read by transformers; for 5 blocks write -6"),
    ("llava_next", ({}, {"image_grid_pinpoints": [["70", 70]]}), "a list of .height, width."),
    ("llava_next", ({"image_grid_pinpoints": [[70, 140]]}, {"image_grid_pinpoints": [[70]]}), "a list of .height, width."),
    ("llava_next", ({"image_grid_pinpoints": [[70, 140]]}, {"image_grid_pinpoints": 5}), "a list of .height, width."),
    ("internvl", ({"vision_feature_select_strategy": "full"},), "vision_feature_select_strategy 'full' is not supported"),
    ("internvl", ({}, {}, {"start_image_token": 7}), "start_image_token"),
    ("internvl", ({}, {"size": None}), "the image processor's size = None is not supported"),
    ("internvl", ({}, {"min_patches": True}), "min_patches True"),
    ("internvl", ({}, {}, {"extra_special_tokens": {"end_image_token": ["a"]}}), "end_image_token"),
    ("smolvlm", ({}, {"do_resize": False}), "do_resize is off"),
    ("smolvlm", ({}, {"size": square(84)}), "longest_edge"),
    ("smolvlm", ({}, {"size": {"longest_edge": 0}}), "longest_edge"),
    ("smolvlm", ({}, {"size": {"longest_edge": 5000}}), "longest_edge|at most 256"),
    ("smolvlm", ({}, {"size": {"longest_edge": 84 * 17}}), "would become 290 crops; at most 256"),
    ("smolvlm", ({}, {"max_image_size": {"longest_edge": 70}}), "max_image_size"),
    ("smolvlm", ({}, {"max_image_size": 84}), "max_image_size"),
    ("smolvlm", ({"scale_factor": 4},), "6 patches a row are no whole number of cells of 4"),
    ("smolvlm", ({"scale_factor": 0},), "scale_factor is 0"),
    ("smolvlm/whole", ({}, {"size": {"longest_edge": 5000}}), "longest_edge is 5000; it must be from 1 to 4096"),
    ("smolvlm/whole", ({}, {"size": {"longest_edge": -3}}), "longest_edge is -3; it must be from 1 to 4096"),
    ("idefics3", ({}, {"image_processor_type": "GotOcr2ImageProcessor"}), "is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "changes", "words"), REFUSED, ids=[f"{row[0]}-{at}" for at, row in enumerate(REFUSED)])
def test_what_is_not_handled_is_refused_by_name(make: Make, shape: str, changes: tuple[Changes, ...], words: str) -> None:
    folder = make(shape, *changes)
    for path in folder.glob("*.safetensors"):
        path.unlink()
        path.write_bytes(b"not read")
    with pytest.raises(LeanVLMError, match=words) as caught:
        opening(folder)
    one_line(caught.value)


@pytest.mark.parametrize("switch", ["do_reduce_labels", "do_flip", "use_tiles"])
@pytest.mark.parametrize("shape", ["llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3"])
def test_switches_that_nobody_knows_are_refused(make: Make, shape: str, switch: str) -> None:
    assert opening(make(shape, {}, {switch: False}))
    kept = AutoImageProcessor.from_pretrained(make(shape, {}, {switch: True})).to_dict()
    if switch in kept:
        with pytest.raises(UnsupportedModelError, match=f"{switch} = True is not supported"):
            opening(make(shape, {}, {switch: True}))


SHAPES = ("llava_next", "llava_onevision", "internvl", "smolvlm", "smolvlm/whole", "idefics3")
HOSTILE = [
    *VALUES,
    "anyres_max_999",
    [[70, 140], [-70, 70]],
    [[10**6, 70]],
    {"longest_edge": 10**9},
    {"content": "<a>"},
    0.5,
    1e-320,
]


@st.composite
def hostile(draw: st.DrawFn, content: bytes) -> bytes:
    """Content for a JSON file in which what the family reads is another value, or anything is damaged."""
    data = json.loads(content)
    known = [path for path in paths(data) if path[0] != "text_config"]
    if draw(st.booleans()):
        return draw(damaged_json(data)).encode()
    return json.dumps(replaced(data, draw(st.sampled_from(known)), draw(st.sampled_from(HOSTILE) | st.integers()))).encode()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), shape=st.sampled_from(SHAPES), name=st.sampled_from([CONFIG, PROCESSOR, PROCESSOR, TOKENIZER]))
def test_hostile_files_are_refused_in_one_line_or_cut_images(make: Make, data: st.DataObject, shape: str, name: str) -> None:
    folder = cached_copy(make, shape)
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(hostile(before)))
    try:
        with bounded():
            frame = opening(folder).frame
            assert all(read(type(one), plain(one), "again", ManifestError) == one for one in (frame.image, frame.crops))
            cropped = crop([noise(50, 7)], replace(frame.image, layout="uint8"), frame.crops)
            assert len(cropped.inputs[0]["pixel_values"]) <= frame.crops.most
            assert cropped.inputs[0]["pixel_values"].shape[2:] == frame.crops.shapes[0].pixels
            assert frame.layout.text(cropped.images[0].arrangement, "<image>")
    except LeanVLMError as error:
        one_line(error)
    finally:
        (folder / name).write_bytes(before)


@cache
def cached_copy(make: Make, shape: str) -> Path:
    """Return a checkpoint whose files a test may change, and must restore."""
    return make(shape, {}, {}, {})
