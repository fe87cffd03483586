"""JPEG files decoded for a device: the same levels as Pillow's, or Pillow has the word."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.jpeg import jpeg_levels
from leanvlm.runtime.preprocess import load_image, load_raster

ORIENTATION = 0x0112


def encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def photograph(size: tuple[int, int] = (320, 240)) -> Image.Image:
    return Image.open(SAMPLES_DIR.parent / "photographs" / "coffee.jpg").convert("RGB").resize(size)


def files() -> Iterator[tuple[str, bytes]]:
    for quality in (20, 75, 100):
        for subsampling in (0, 1, 2):
            yield f"quality {quality}, {subsampling}", encoded(photograph(), quality=quality, subsampling=subsampling)
    for size in ((1, 1), (17, 33), (33, 17), (319, 241)):
        for subsampling in (0, 1, 2):
            yield f"{size}, {subsampling}", encoded(photograph(size), subsampling=subsampling)
    yield "progressive", encoded(photograph(), progressive=True)
    yield "colours as they are", encoded(photograph(), keep_rgb=True)
    yield "restarts", encoded(photograph(), restart_marker_blocks=3)
    yield "with a comment behind its end", encoded(photograph()) + b"more"


FILES = dict(files())


@pytest.mark.parametrize("name", FILES)
def test_levels_are_pillow_s(name: str, tmp_path: Path) -> None:
    data = FILES[name]
    (tmp_path / "picture").write_bytes(data)
    for source in (data, io.BytesIO(data), tmp_path / "picture"):
        levels = load_raster(source)
        assert isinstance(levels, np.ndarray)
        np.testing.assert_array_equal(levels, np.asarray(load_image(source)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_pillow_s(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(photograph(), exif=exif)
    found = load_raster(data)
    assert isinstance(found, np.ndarray) == (orientation == 1)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(data)))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_colours_are_pillow_s(mode: str) -> None:
    data = encoded(photograph().convert(mode))
    found = load_raster(data)
    assert isinstance(found, Image.Image)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(load_image(data)))


def test_arrays_and_pillow_s_images_stay_what_they_are() -> None:
    levels = np.asarray(photograph())
    assert load_raster(levels) is levels
    image = photograph()
    assert load_raster(image) is image
    with pytest.raises(InputError, match="an image array must be"):
        load_raster(levels[:, :, 0])


def test_a_damaged_file_is_what_it_is_to_pillow() -> None:
    """Whatever byte is another: the same picture, or an error of one line."""
    data, rng, compared = encoded(photograph((64, 48))), np.random.default_rng(0), 0
    for at in rng.integers(2, len(data), 400).tolist():
        damaged = bytearray(data)
        damaged[at] = int(rng.integers(0, 256))
        damaged = damaged[: len(data) - (at % 7 == 0) * at // 2]
        try:
            wanted = np.asarray(load_image(bytes(damaged)))
        except InputError:
            with pytest.raises(InputError):
                load_raster(bytes(damaged))
            continue
        found = load_raster(bytes(damaged))
        compared += isinstance(found, np.ndarray)
        np.testing.assert_array_equal(np.asarray(found), wanted)
    assert compared > 50


def test_without_the_decoder_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    data = encoded(photograph())
    with Image.open(io.BytesIO(data)) as image:
        assert jpeg_levels(image, io.BytesIO(data)) is None
    assert isinstance(load_raster(data), Image.Image)
