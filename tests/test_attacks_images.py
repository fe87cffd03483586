"""Pictures made to exhaust whoever decodes them, and data URIs that are none (SECURITY.md)."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.preprocess import MAX_PIXELS, MAX_SCANS, image_size, load_image
from leanvlm.runtime.serving.images import check_images, from_data_uri

SECONDS, MEGABYTES = 2.0, 60
"""For one picture, and beside what the interpreter and Pillow take; the worst that is decoded here has 360,000 pixels."""


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a grey PNG of these chunks."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", head), *chunks, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


@cache
def zeros(megabytes: int) -> bytes:
    """Return packed zeros, a thousandth of their size."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def webp_of(width: int, height: int) -> bytes:
    """Return a lossless WebP file whose header states a size that it has no data for."""
    data = saved(Image.new("RGB", (64, 64)), "WEBP", lossless=True)
    at = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28 | width - 1 | (height - 1) << 14
    return data[:at] + bits.to_bytes(4, "little") + data[at + 4 :]


def jpeg_of(width: int, height: int) -> bytes:
    """Return a JPEG file whose header states a size that it has no data for."""
    data = saved(Image.new("L", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def scans(size: int, count: int) -> bytes:
    """Return a progressive JPEG file with one scan again and again."""
    data = saved(Image.new("L", (size, size), 128), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def frames(count: int) -> bytes:
    one, *others = (Image.new("P", (200, 200), number % 256) for number in range(count))
    return saved(one, "GIF", save_all=True, append_images=others)


def tiff_of(width: int, height: int) -> bytes:
    """Return a TIFF file that states a size."""
    tags = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, width * height))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value & 0xFFFFFFFF) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


LINE = zlib.compress(bytes(9 * 8))
BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG, 2^31 x 2^31": lambda: png(2**31 - 1, 2**31 - 1, (b"IDAT", LINE)),
    "PNG, 8001 x 8001, packed": lambda: png(8001, 8001, (b"IDAT", zeros(62))),
    "PNG, no pixels": lambda: png(0, 8, (b"IDAT", LINE)),
    "PNG, text of 128 MB": lambda: png(8, 8, (b"zTXt", b"k\0\0" + zeros(128)), (b"IDAT", LINE)),
    "PNG, 200 texts of 1 MB": lambda: png(8, 8, *[(b"zTXt", b"k\0\0" + zeros(1))] * 200, (b"IDAT", LINE)),
    "PNG, international text": lambda: png(8, 8, (b"iTXt", b"k\0\1\0\0\0" + zeros(128)), (b"IDAT", LINE)),
    "PNG, colour profile": lambda: png(8, 8, (b"iCCP", b"k\0\0" + zeros(128)), (b"IDAT", LINE)),
    "WebP, 16383 x 16383": lambda: webp_of(16383, 16383),
    "JPEG, 65535 x 65535": lambda: jpeg_of(65535, 65535),
    "JPEG, 9000 scans": lambda: scans(2000, 9_000),
    "GIF, 65535 x 65535": lambda: b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + bytes(40),
    "TIFF, 10^6 x 10^6": lambda: tiff_of(10**6, 10**6),
}
HARMLESS: dict[str, Callable[[], bytes]] = {
    "PNG, 128 MB behind 8 x 8": lambda: png(8, 8, (b"IDAT", zeros(128))),
    "GIF, 1000 frames": lambda: frames(1000),
    "JPEG, 8 scans more": lambda: scans(600, 8),
}
DECODE = """
import json, sys, time
from pathlib import Path
from PIL import Image
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.preprocess import load_image

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

Image.init()
for file in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak.
    before, begin = memory("VmRSS"), time.perf_counter()
    try:
        found = load_image(file).size
    except InputError as error:
        found = str(error)
    print(json.dumps([found, time.perf_counter() - begin, memory("VmHWM") - before >> 10]))
"""


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, float, int]]:
    """Of each picture, decoded in a process of its own: what came out, seconds, and megabytes."""
    folder, made = tmp_path_factory.mktemp("bombs"), {**BOMBS, **HARMLESS}
    files = [folder / str(number) for number in range(len(made))]
    for file, make in zip(files, made.values(), strict=True):
        file.write_bytes(make())
    result = subprocess.run([sys.executable, "-c", DECODE, *files], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return dict(zip(made, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_at_once(name: str, decoded: dict[str, tuple[Any, float, int]]) -> None:
    found, seconds, megabytes = decoded[name]
    assert isinstance(found, str), found
    assert "\n" not in found
    assert (seconds < SECONDS, megabytes < MEGABYTES) == (True, True), (seconds, megabytes)


@pytest.mark.parametrize("name", HARMLESS)
def test_of_others_only_the_picture_is_decoded(name: str, decoded: dict[str, tuple[Any, float, int]]) -> None:
    found, seconds, megabytes = decoded[name]
    assert isinstance(found, list), found
    assert (seconds < SECONDS, megabytes < MEGABYTES) == (True, True), (seconds, megabytes)


def test_a_served_picture_is_refused_by_its_header() -> None:
    """Before it waits in the queue; the whole of a request's pictures counts."""
    for name in set(BOMBS) - {"PNG, 8001 x 8001, packed"}:
        with pytest.raises(InputError):
            check_images([BOMBS[name]()], MAX_PIXELS)
    picture = saved(Image.new("L", (100, 50)), "PNG")
    assert image_size(picture) == (50, 100)
    check_images([picture] * 3, 15_000)
    with pytest.raises(InputError, match=r"more than 0\.014999 megapixels together"):
        check_images([picture] * 3, 14_999)


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF", "JPEG2000", "EPS", "PDF", "ICO", "PCX"])
def test_a_server_takes_few_formats(kind: str) -> None:
    with pytest.raises(InputError, match="JPEG, PNG, WEBP, GIF"):
        check_images([saved(Image.new("RGB", (8, 8)), kind)], MAX_PIXELS)


@pytest.mark.parametrize(
    "text", [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe", b"", b"\x89PNG", b"GIF89a", b"RIFF0000WEBP"]
)
def test_what_is_no_picture_is_refused(text: bytes) -> None:
    with pytest.raises(InputError):
        check_images([text], MAX_PIXELS)


def test_scans_are_counted_beside_pixels() -> None:
    assert load_image(scans(64, 1000)).size == (64, 64)
    most = MAX_SCANS * MAX_PIXELS // 600**2
    with pytest.raises(InputError, match=rf"has {most + 7} scans of 600 x 600"):
        load_image(scans(600, most + 1))


def test_scans_of_a_file_are_counted_too(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(scans(2000, 1000))
    begin = time.perf_counter()
    with pytest.raises(InputError, match="scans"):
        load_image(tmp_path / "a.jpg")
    assert time.perf_counter() - begin < SECONDS


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize("size", range(1, 8))
def test_a_data_uri_is_what_it_says_up_to_the_limit(size: int) -> None:
    data = bytes(range(250, 250 + size)) if size < 6 else bytes(size)
    assert from_data_uri(uri(data), size) == data
    with pytest.raises(InputError, match=f"an image has {size} bytes; at most {size - 1} are taken"):
        from_data_uri(uri(data), size - 1)


WRONG = (
    "", "data:", "data:,", "data:image/png,AAAA", "data:;base64,AAAA", "data:text/html;base64,AAAA", "data:image/;base64,AAAA",
    "data:image/png;charset=utf-8;base64,AAAA", "data:image/png;base64 ,AAAA", " data:image/png;base64,AAAA",
    "data:image/png;base64,", "data:image/png;base64,A", "data:image/png;base64,AAA", "data:image/png;base64,AAAAA",
    "data:image/png;base64,AA=A", "data:image/png;base64,AAAA\n", "data:image/png;base64,AA AA", "data:image/png;base64,A%3D",
    "data:image/png;base64,__--", "data:image/png;base64,====", "data:image/png;base64,AAAA====",
    "data:image/png;base64,\uff21AAA",
    "data:image/png;base64,\ud800AAA", "data:image/" + "a" * 100_000 + ";base64,AAAA", "data:application/pdf;base64,AAAA",
    "data:image/png\r\nX: 1;base64,AAAA", "data:video/mp4;base64,AAAA", "file:///etc/passwd", "/etc/passwd", "iVBORw0KGgo=",
)  # fmt: skip


@pytest.mark.parametrize("url", WRONG, ids=range(len(WRONG)))
def test_other_data_uris_are_refused(url: str) -> None:
    with pytest.raises(InputError) as error:
        from_data_uri(url, 1000)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_a_large_data_uri_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base64, "b64decode", None)
    with pytest.raises(InputError, match="an image has 3000000 bytes"):
        from_data_uri("data:image/png;base64," + "A" * 4_000_000, 1 << 20)
