"""Image preprocessing against the Hugging Face processor, on scikit-image's photographs."""

import io
import json
import struct
import tempfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from transformers import CLIPImageProcessorPil
from transformers.image_utils import load_image as transformers_load_image

from leanvlm.demo import MODEL_DIR
from leanvlm.exporter.image_processor import read_image_processor
from leanvlm.runtime.cuts import resize
from leanvlm.runtime.errors import InputError, ManifestError, UnsupportedModelError
from leanvlm.runtime.preprocess import MAX_PIXELS, ImageSpec, load_image, preprocess
from leanvlm.runtime.records import plain, read

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
CONFIG: dict[str, Any] = json.loads((MODEL_DIR / "preprocessor_config.json").read_text())
SPEC = read_image_processor(CONFIG)
CLOSED = io.BytesIO()
CLOSED.close()
LEVELS = replace(SPEC, layout="uint8")
TOLERANCE = 1e-5  # Of a normalised value, so 1/1500 of a level: the arithmetic is the same up to its order.


def reference(image: Image.Image, config: dict[str, Any] = CONFIG) -> np.ndarray:
    return CLIPImageProcessorPil(**config)(images=image, return_tensors="np")["pixel_values"]


def slow_reference(images: list[Image.Image], spec: ImageSpec) -> np.ndarray:
    """The levels (B, 3, H, W) uint8 without any shortcut: resize the whole image, crop, copy."""
    rows = []
    for image in images:
        if isinstance(spec.resize, int):
            longer = int(spec.resize * max(image.size) / min(image.size))
            width, height = (spec.resize, longer) if image.width < image.height else (longer, spec.resize)
            image = image.resize((width, height), Image.Resampling(spec.resample))
        elif spec.resize is not None:
            image = image.resize(spec.resize[::-1], Image.Resampling(spec.resample))
        left, top = (image.width - spec.size[1]) // 2, (image.height - spec.size[0]) // 2
        rows.append(np.asarray(image.crop((left, top, left + spec.size[1], top + spec.size[0]))))
    return np.ascontiguousarray(np.stack(rows).transpose(0, 3, 1, 2))


def noise(width: int, height: int) -> Image.Image:
    """An image without two equal neighbours, so that a change of one weight or of the rounding shows somewhere."""
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8))


def assert_bit_identical(images: list[Image.Image], spec: ImageSpec) -> None:
    expected = slow_reference(images, spec)
    levels = preprocess(images, replace(spec, layout="uint8"))
    assert levels.dtype == np.uint8
    assert levels.flags.c_contiguous
    np.testing.assert_array_equal(levels, expected)
    mean, std = (np.reshape(values, (3, 1, 1)).astype(np.float32) for values in (spec.image_mean, spec.image_std))
    values = preprocess(images, replace(spec, layout="float32"))
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_array_equal(values, (expected.astype(np.float32) * np.float32(spec.rescale_factor) - mean) / std)


def photograph(name: str = "chelsea.png") -> Image.Image:
    with Image.open(PHOTOGRAPHS / name) as image:
        image.load()
        return image


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "name",
    ["camera.png", "chelsea.png", "coffee.png", "horse.png", "hubble_deep_field.jpg", "logo.png", "rocket.jpg"],
)
def test_photographs_equal_the_processor(name: str) -> None:
    values = preprocess([PHOTOGRAPHS / name], SPEC)
    assert values.shape == (1, 3, *SPEC.size)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_allclose(values, reference(photograph(name)), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("size", [(336, 336), (337, 336), (301, 217), (451, 3), (2, 300), (1, 1), (335, 449)])
def test_odd_shapes_equal_the_processor(size: tuple[int, int]) -> None:
    image = photograph().resize(size)
    np.testing.assert_allclose(preprocess([image], SPEC), reference(image), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "PA", "P", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_modes_equal_the_processor(mode: str) -> None:
    source = photograph("horse.png")
    image = source.convert("L").convert(mode) if mode == "I;16" else source.convert(mode)
    np.testing.assert_allclose(preprocess([image], SPEC), reference(image), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("transparency", [3, b"\x00\x80\xff" * 50, (255, 255, 255)])
def test_transparent_colours_equal_the_processor(transparency: int | bytes | tuple[int, ...]) -> None:
    mode = "RGB" if isinstance(transparency, tuple) else "P"
    data = encoded(photograph("logo.png").convert(mode), "PNG", transparency=transparency)
    with Image.open(io.BytesIO(data)) as image:
        assert "transparency" in image.info
        np.testing.assert_allclose(preprocess([data], SPEC), reference(image), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 224, "crop_size": 224},
        {"size": {"height": 200, "width": 350}, "do_center_crop": False},
        {"size": [200, 350], "do_center_crop": False, "resample": 0},
        {"size": 224, "default_to_square": True, "do_center_crop": False, "resample": 2},
        {"do_resize": False},
        {"do_resize": False, "crop_size": {"height": 401, "width": 100}},
        {"do_resize": False, "crop_size": {"height": 302, "width": 600}},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": 120.0, "image_std": [60.0, 61.0, 62.0]},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": None, "resample": 1, "do_pad": False, "rescale_factor": 1 / 127.5},
    ],
)
def test_configurations_equal_the_processor(changes: dict[str, Any]) -> None:
    config, image = CONFIG | changes, photograph()  # 451 x 300
    values = preprocess([image], read_image_processor(config))
    expected = reference(image, config)
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=TOLERANCE)


# Sizes where a part may be left out, where none may (no whole pixel to end on; the other axis would be resized first), where
# the size stays, and where the image grows, from a single row or column too.
@pytest.mark.parametrize(
    "size",
    [
        *[(1280, 960), (960, 1280), (600, 400), (400, 600), (1920, 1080), (1080, 1920), (640, 427), (427, 640)],
        *[(1344, 600), (253, 715), (715, 253), (336, 900), (900, 336), (336, 336), (337, 335), (600, 20), (20, 400)],
        *[(64, 48), (48, 64), (33, 7), (7, 33), (3, 2), (1, 2), (2, 1), (1, 1)],
    ],
)
def test_the_whole_image_resized_gives_the_same_bits(size: tuple[int, int]) -> None:
    image = noise(*size)
    for resample in Image.Resampling:
        assert_bit_identical([image], replace(SPEC, resample=int(resample)))
        assert_bit_identical([image], replace(SPEC, resize=120, crop=(31, 50), resample=int(resample)))


@pytest.mark.parametrize("size", [(96, 60), (72, 80)])  # One axis keeps its length, and the other does not.
def test_an_axis_that_keeps_its_length_gives_the_same_bits(size: tuple[int, int]) -> None:
    for resample in Image.Resampling:
        assert_bit_identical([noise(*size)], replace(SPEC, resize=(60, 72), crop=(20, 30), resample=int(resample)))


@settings(deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16)).map(lambda n: (n[0] * n[2], n[1] * n[2])),
    resize=st.integers(1, 150) | st.tuples(st.integers(1, 300), st.integers(1, 300)),
    crop=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    resample=st.sampled_from(list(Image.Resampling)),
)
def test_any_size_gives_the_same_bits(size: tuple[int, int], resize: Any, crop: tuple[int, int], resample: int) -> None:
    assert_bit_identical([noise(*size)], replace(SPEC, resize=resize, crop=crop, resample=int(resample)))


@pytest.mark.parametrize("name", ["chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg"])
def test_photographs_give_the_same_bits(name: str) -> None:
    image = photograph(name)
    photographs = [image, image.resize((1280, 960)), image.resize((600, 800))]
    assert_bit_identical(photographs, SPEC)
    for each in photographs:
        for form in ("JPEG", "PNG"):
            data = encoded(each, form)
            with Image.open(io.BytesIO(data)) as opened:
                np.testing.assert_array_equal(preprocess([data], LEVELS), slow_reference([opened.convert("RGB")], SPEC))


@pytest.mark.parametrize(
    ("source", "size", "needed", "expected"),
    [
        ((1280, 960), (448, 336), (392, 336), (392, 336)),  # 392 columns end at 1120 of 1280.
        ((960, 1280), (336, 448), (336, 392), (336, 392)),
        ((6000, 4000), (504, 336), (420, 336), (420, 336)),
        ((6000, 4000), (504, 336), (421, 336), (441, 336)),  # In steps of 21 columns, 250 of the source.
        ((1920, 1080), (597, 336), (466, 336), (597, 336)),  # A step is 199 columns.
        ((336, 900), (336, 900), (300, 336), (336, 900)),
        ((253, 715), (336, 949), (214, 519), (336, 949)),  # 584 rows would let Pillow 13 begin with the height.
    ],
)
def test_what_need_not_be_resized(
    source: tuple[int, int], size: tuple[int, int], needed: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert resize(Image.new("RGB", source), size, needed, Image.Resampling.BICUBIC).size == expected


def test_a_pillow_of_unknown_order_resizes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanvlm.runtime.cuts.order", lambda: None)
    image = resize(Image.new("RGB", (1280, 960)), (448, 336), (392, 336), Image.Resampling.BICUBIC)
    assert image.size == (448, 336)


def test_rows_of_a_batch_are_independent() -> None:
    images = [photograph(name) for name in ("coffee.png", "text.png", "logo.png")]
    batch = preprocess(images, SPEC)
    np.testing.assert_array_equal(batch, np.concatenate([preprocess([image], SPEC) for image in images]))


def test_levels_are_what_is_normalised() -> None:
    levels = preprocess([photograph()], replace(SPEC, layout="uint8"))
    assert levels.dtype == np.uint8
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (SPEC.image_mean, SPEC.image_std))
    normalised = (levels * SPEC.rescale_factor - mean) / std
    np.testing.assert_allclose(normalised, preprocess([photograph()], SPEC), rtol=0, atol=TOLERANCE)


def test_every_kind_of_source_is_the_same_image(tmp_path: Path) -> None:
    image = photograph()
    data = encoded(image, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    for source in (path, str(path), data, image, np.asarray(image)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))


def test_open_files_and_views_are_the_same_image(tmp_path: Path) -> None:
    """Whatever holds the bytes, also one that cannot go back to its start; a file is read from there, and stays open."""
    data = encoded(photograph(), "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    pipe = SimpleNamespace(read=lambda: data)
    with path.open("rb") as file, tempfile.NamedTemporaryFile() as temporary:
        temporary.write(data)
        file.seek(100)
        for source in (bytearray(data), memoryview(data), io.BytesIO(data), file, file, temporary, pipe):
            np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(photograph()))
        assert not file.closed


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF"])
def test_pictures_of_all_usual_formats_are_read(form: str) -> None:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    assert load_image(encoded(photograph(), form)).size == photograph().size


@pytest.mark.parametrize("form", ["EPS", "PDF", "PCX", "TGA", "ICO", "ICNS", "SGI"])
def test_files_of_other_formats_are_not_opened(form: str) -> None:
    """Least of all EPS, for which Pillow would start Ghostscript."""
    Image.init()
    data = encoded(photograph().resize((64, 64)), form)
    with pytest.raises(InputError, match="not an image in a format that Pillow reads here: JPEG, PNG, BMP"):
        load_image(data)


@pytest.mark.parametrize(("form", "mode"), [("PNG", "I;16"), ("TIFF", "I;16"), ("PPM", "I;16"), ("TIFF", "I"), ("TIFF", "F")])
def test_sixteen_bits_are_scaled_as_those_of_colour(form: str, mode: str) -> None:
    """A grey picture of 16 bits equals the green of a colour file with the same levels, which Pillow itself scales."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    found = np.asarray(load_image(encoded(Image.fromarray(levels.astype(kind)), form)))
    body = b"".join(b"\0" + np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in levels)
    with Image.open(io.BytesIO(png_of(256, 256, 16, 2, body))) as colour:
        assert colour.mode == "RGB"
        np.testing.assert_array_equal(found, np.asarray(colour))


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_wide_levels_that_fit_eight_bits_equal_the_processor(kind: Any) -> None:
    """There nothing is clipped; one level more, and what the processor makes of it is white."""
    grey = np.asarray(photograph().convert("L")).astype(kind)
    image = Image.fromarray(grey)
    np.testing.assert_allclose(preprocess([image], SPEC), reference(image), rtol=0, atol=TOLERANCE)
    bright = Image.fromarray((grey + 256).astype(kind))
    assert np.asarray(load_image(bright)).max() == 1
    assert np.asarray(bright.convert("RGB")).min() == 255


def test_wide_pictures_with_a_transparent_level_and_below_zero() -> None:
    levels = np.array([[0, 1000, 40_000]], np.uint16)
    found = np.asarray(load_image(encoded(Image.fromarray(levels), "PNG", transparency=1000)))
    assert found[0, :, 0].tolist() == [0, 255, 156]
    below = Image.fromarray(np.array([[-5, 65_535]], np.int32))
    assert np.asarray(load_image(below))[0, :, 0].tolist() == [0, 255]


def test_an_rgb_image_is_not_copied(tmp_path: Path) -> None:
    image = photograph()
    assert load_image(image) is image
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image, "PNG"))
    with Image.open(path) as opened:  # Not decoded yet.
        loaded = load_image(opened)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_and_images_are_not(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    path.write_bytes(encoded(photograph(), "JPEG", exif=exif))
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(transformers_load_image(str(path))))
    with Image.open(path) as image:
        assert load_image(image).size == photograph().size


def png_of(width: int, height: int, bits: int, colour: int, body: bytes) -> bytes:
    """A PNG of any depth and colour type; `body` is its filtered rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0"))]
    body = (struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data)) for tag, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


# The three limits met: ours, the one where Pillow warns, and the one where it raises.
@pytest.mark.parametrize("height", [MAX_PIXELS // 8000 + 1, 12_000, 60_000])
def test_huge_images_are_refused_before_they_are_decoded(height: int) -> None:
    with pytest.raises(InputError, match="megapixels"):
        load_image(png_header(8000, height))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("missing.png", "'missing.png' does not exist"),
        (".", "is not a file"),
        ("x" * 5000, "does not exist"),
        ("null\0character", "does not exist"),
        ("https://example.org/cat.png", "download it first"),
        (Path(__file__), "not an image in a format that Pillow reads"),
        (b"", "not an image"),
        (png_header(8, 8), "cannot be decoded"),
        (np.zeros((4, 4, 4), np.uint8), r"must be \(H, W, 3\) uint8"),
        (np.zeros((4, 4, 3), np.float32), r"must be \(H, W, 3\) uint8"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels: 4 x 0"),
        (Image.new("RGB", (0, 0)), "no pixels: 0 x 0"),
        (7, "not int"),
        (io.StringIO("text"), "open it with mode 'rb'"),
        (CLOSED, "closed file"),
        (Image.fromarray(np.array([[65_536]], np.int32)), "levels up to 65536; pictures of 8 and 16 bits"),
        (Image.fromarray(np.array([[0, np.nan]], np.float32)), "levels up to nan"),
        (Image.fromarray(np.array([[0, np.inf]], np.float32)), "levels up to inf"),
    ],
)
def test_what_is_no_image_is_one_clear_line(source: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_truncated_photograph_is_refused() -> None:
    with pytest.raises(InputError, match=r"cannot be decoded: .*truncated"):
        load_image((PHOTOGRAPHS / "rocket.jpg").read_bytes()[:20_000])


DAMAGED = [encoded(photograph().resize((40, 30)), form) for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged metadata
@given(
    data=st.sampled_from(DAMAGED),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    end=st.integers(0, 4000),
)
def test_damaged_files_give_an_image_or_an_input_error(data: bytes, changes: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(data)
    for position, value in changes:
        damaged[position % len(damaged)] = value
    try:
        mode = load_image(bytes(damaged[:end])).mode
    except InputError as error:
        mode = "RGB" if "\n" not in str(error) else str(error)
    assert mode == "RGB"


def test_an_image_too_narrow_to_resize_is_refused() -> None:
    with pytest.raises(InputError, match="1 x 100000 is too narrow"):
        preprocess([Image.new("RGB", (1, 100_000))], SPEC)


def test_no_image_is_an_error() -> None:
    with pytest.raises(InputError, match="at least one"):
        preprocess([], SPEC)


def test_a_spec_survives_json() -> None:
    for spec in (SPEC, ImageSpec(resize=(20, 30), crop=None, layout="uint8"), ImageSpec(resize=None, crop=(4, 5))):
        assert read(ImageSpec, json.loads(json.dumps(plain(spec))), "spec", ManifestError) == spec


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, 'has the key "colour"'),
        ({"crop": 3}, "crop is 3; it must be a list"),
        ({"crop": [3.5, 4]}, r"crop\[0\] is 3.5; it must be a whole number"),
        ({"crop": [336, 10**9]}, r"crop\[1\] is 1000000000; it must be from 1 to 4096"),
        ({"resample": 9}, "resample is 9; it must be from 0 to 5"),
        ({"layout": "float16"}, 'layout is "float16"; it must be one of'),
        ({"image_std": None}, "image_std is null; it must be a list"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is a list of 2; it must be a list of 3"),
        ({"image_std": [1, 1, 0]}, r"image_std\[2\] is 0.0; it must be from 1e-06"),
    ],
)
def test_a_damaged_record_names_what_is_wrong(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=f"^spec: .*{words}"):
        read(ImageSpec, plain(SPEC) | change, "spec", ManifestError)


@pytest.mark.parametrize("name", ["CLIPImageProcessorFast", "CLIPImageProcessorPil", "LlavaImageProcessor"])
def test_names_of_the_same_processor(name: str) -> None:
    assert read_image_processor(CONFIG | {"image_processor_type": name}) == SPEC
    assert read_image_processor({"image_processor": CONFIG, "patch_size": 14}) == SPEC


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "'Qwen2VLImageProcessor' is not supported"),
        ({"image_processor_type": None}, "None is not supported"),
        ({"do_pad": True}, "do_pad = True"),
        ({"use_square_size": True}, "use_square_size"),
        ({"size": {"shortest_edge": 336, "longest_edge": 672}}, "size = .*longest_edge"),
        ({"crop_size": {"shortest_edge": 336}}, "crop_size = "),
        ({"do_center_crop": False}, "output size varies"),
        ({"resample": "bicubic"}, 'resample is "bicubic"; it must be a whole number'),
        ({"image_mean": [0.5]}, r"image_mean = \[0.5\]"),
        ({"image_std": 0.0}, r"image_std\[0\] is 0.0; it must be from 1e-06"),
        ({"size": 0}, "resize is 0; it must be from 1"),
        ({"size": None}, "size = None"),
        ({"rescale_factor": None}, "rescale_factor is null; it must be a number"),
    ],
)
def test_processors_that_are_not_handled_are_named(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        read_image_processor(CONFIG | change)
