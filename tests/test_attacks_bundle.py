"""A hostile bundle reads nothing but its own files, whatever its graphs and links name (SECURITY.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from external_graphs import PLACES, an_initializer, weight
from onnx import ModelProto
from onnx.external_data_helper import _get_all_tensors
from watched import watched

from leanvlm.runtime import load
from leanvlm.runtime.bundle import file_sha256
from leanvlm.runtime.errors import BundleError, GraphError, LeanVLMError
from leanvlm.runtime.graph_files import graph_path, locations
from leanvlm.runtime.manifest import MANIFEST

SECRET = np.arange(16, dtype=np.float32) + 1000

NAMES: dict[str, Callable[[Path], str]] = {
    "above": lambda outside: f"../{outside.name}/secret",
    "above, from a folder": lambda outside: f"a/../../{outside.name}/secret",
    "absolute": lambda outside: str(outside / "secret"),
    "a link": lambda outside: "link.data",
    "a folder's link": lambda outside: "linked/secret",
    "the manifest": lambda outside: MANIFEST,
    "a file beside": lambda outside: "beside",
    "memory": lambda outside: "*/_ORT_MEM_ADDR_/*",
    "a null": lambda outside: f"vision.data\0../{outside.name}/secret",
    "nothing": lambda outside: "",
    "the folder": lambda outside: ".",
    "a device": lambda outside: "/dev/zero",
    "a process": lambda outside: "/proc/self/environ",
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the bundle's, with a file that nobody may read."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(SECRET.tobytes())
    return folder


@pytest.fixture
def folder(tmp_path: Path, outside: Path) -> Path:
    """A folder with a file of weights, and links to what is outside."""
    made = tmp_path / "bundle"
    (made / "a").mkdir(parents=True)
    for name in ("vision.data", "beside"):
        (made / name).write_bytes(SECRET.tobytes())
    (made / "link.data").symlink_to(outside / "secret")
    (made / "linked").symlink_to(outside)
    return made


FILES = {"g.onnx", "a/g.onnx", "vision.data", "a/own.data"}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_names_files_of_the_bundle_only(folder: Path, outside: Path, name: str, place: Any) -> None:
    (folder / "g.onnx").write_bytes(place(weight(NAMES[name](outside), offset="0", length="64")).SerializeToString())
    with watched(outside / "secret") as watch:
        with pytest.raises(GraphError, match=r"g\.onnx reads '.*', which is no file of the bundle") as error:
            graph_path(folder, "g.onnx", FILES)
        assert not watch.touched
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", PLACES)
def test_files_of_the_bundle_may_be_named(folder: Path, place: Any) -> None:
    (folder / "g.onnx").write_bytes(place(weight("vision.data")).SerializeToString())
    assert graph_path(folder, "g.onnx", FILES) == folder / "g.onnx"
    (folder / "a" / "g.onnx").write_bytes(place(weight("own.data")).SerializeToString())
    assert graph_path(folder, "a/g.onnx", FILES) == folder / "a" / "g.onnx"
    with pytest.raises(GraphError):
        graph_path(folder, "a/g.onnx", FILES - {"a/own.data"})


def field(number: int, content: bytes, form: int = 2, wide: int = 0) -> bytes:
    """Return a field of a protobuf message; `wide`: bytes that its length takes too many."""
    size = bytearray()
    rest = len(content)
    while rest > 127:
        size.append(rest & 127 | 128)
        rest >>= 7
    size += bytes([rest | 128] + [128] * (wide - 1) + [0]) if wide else bytes([rest])
    return bytes([number << 3 | form]) + bytes(size) + content


def disguised(entry: bytes) -> bytes:
    """Return a model with an initializer that has an entry."""
    tensor = field(8, b"w") + b"\x08\x10\x10\x01\x70\x01" + field(13, entry)
    return b"\x08\x09" + field(7, field(5, tensor)) + field(8, b"\x10\x14")


KEY, VALUE = field(1, b"location"), field(2, b"../secret")
DISGUISES = {
    "the value first": VALUE + KEY,
    "another key before": field(1, b"offset") + KEY + VALUE,
    "another value before": KEY + field(2, b"vision.data") + VALUE,
    "a long length": field(1, b"location", wide=3) + field(2, b"../secret", wide=2),
    "fields of no meaning": field(9, b"location") + b"\x18\xff\x01" + KEY + field(3, bytes(300)) + VALUE,
    "fixed numbers": b"\x1d\0\0\0\0" + KEY + b"\x21" + bytes(8) + VALUE,
    "a wide tag": b"\x8a\x00\x08location" + VALUE,
}


@pytest.mark.parametrize("name", DISGUISES)
def test_names_are_read_as_protobuf_reads_them(name: str) -> None:
    data = disguised(DISGUISES[name])
    (tensor,) = ModelProto.FromString(data).graph.initializer
    assert (tensor.external_data[0].key, tensor.external_data[0].value) == ("location", "../secret")
    assert list(locations(data)) == ["../secret"]


def test_a_graph_in_two_parts_is_one() -> None:
    """As protobuf merges them."""
    whole = an_initializer(weight("vision.data")).SerializeToString() + field(7, field(5, field(13, KEY + VALUE)))
    assert [t.external_data[0].value for t in ModelProto.FromString(whole).graph.initializer] == ["vision.data", "../secret"]
    assert list(locations(whole)) == ["vision.data", "../secret"]


def test_real_graphs_name_what_onnx_says(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        tensors = _get_all_tensors(onnx.load(path, load_external_data=False))
        wanted = [entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
        assert wanted
        assert sorted(locations(path.read_bytes())) == sorted(wanted)


NESTED = an_initializer(weight("vision.data")).graph.SerializeToString()
for _ in range(40):
    NESTED = field(1, field(5, field(6, NESTED)))


@pytest.mark.parametrize(
    "content",
    [b"", b"<?xml version='1.0'?><net/>", b"ORTM", b"\x3a\x05", b"\x0b", b"\xff" * 20, bytes(9), b"\x3a\xff\xff\xff\xff\x0f",
     field(7, NESTED), disguised(KEY + field(2, b"\xff\xfe"))],
    ids=range(10),
)  # fmt: skip
def test_what_is_no_graph_is_refused(folder: Path, content: bytes) -> None:
    (folder / "g.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=r"g\.onnx (cannot be read as ONNX|reads)") as error:
        graph_path(folder, "g.onnx", FILES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["g.ort", "g.xml", "g.onnx.txt", "g"])
def test_other_formats_are_refused_by_their_names(folder: Path, name: str) -> None:
    (folder / name).write_bytes(an_initializer(weight("vision.data")).SerializeToString())
    with pytest.raises(GraphError, match="must end with"):
        graph_path(folder, name, {name, "vision.data"})


def test_a_huge_graph_is_not_read_into_memory(folder: Path) -> None:
    with (folder / "g.onnx").open("wb") as file:
        file.truncate(1 << 31)
    before = resident()
    with pytest.raises(GraphError):
        graph_path(folder, "g.onnx", FILES)
    assert resident() - before < 64 << 10


def resident() -> int:
    """Return kB of memory that are this process's own."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# ----------------------------------------------------------------------------------------------- bundles, opened


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def relist(folder: Path, *names: str) -> None:
    """Make the manifest state files as they are."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for name in names:
        data["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def ask(folder: Path, **options: Any) -> str:
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    with load(folder, threads=1, **options) as session:
        return session.generate("What is it?", image, max_new_tokens=2, ignore_end=True).text


def repointed(path: Path, location: str) -> None:
    """Let a graph read its weights elsewhere."""
    graph = onnx.load(path, load_external_data=False)
    for tensor in _get_all_tensors(graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(graph.SerializeToString())


@pytest.mark.parametrize(
    ("provider", "graph", "kind"),
    [
        ("onnxruntime", "decoder.onnx", "above"),
        ("onnxruntime", "decoder.onnx", "a link"),
        ("onnxruntime", "vision_16.onnx", "absolute"),
        ("openvino", "decoder.onnx", "above"),
        ("openvino", "decoder.onnx", "memory"),
        ("openvino", "vision_16.onnx", "a link"),
    ],
)
def test_a_bundle_opens_nothing_outside(copy: Path, outside: Path, provider: str, graph: str, kind: str) -> None:
    """Memory: OpenVINO 2026.4 follows that name to an address in the file, and crashes."""
    data = "vision.data" if graph.startswith("vision") else "decoder.onnx.data"
    (outside / "secret").write_bytes((copy / data).read_bytes())
    (copy / "link.data").symlink_to(outside / "secret")
    repointed(copy / graph, NAMES[kind](outside))
    relist(copy, graph)
    with watched(outside / "secret") as watch:
        with pytest.raises(GraphError, match="which is no file of the bundle"):
            ask(copy, provider=provider)
        assert not watch.touched


def links(copy: Path) -> Iterator[tuple[str, bytes]]:
    yield from ((path.name, path.read_bytes()) for path in sorted(copy.iterdir()) if path.name != MANIFEST)


def test_no_file_of_a_bundle_can_be_a_link_to_another(copy: Path, outside: Path) -> None:
    """Nor one that is read by its name and not listed; of the same size, so that the size does not tell."""
    for name, content in links(copy):
        secret = outside / "secret"
        secret.write_bytes(bytes(len(content)))
        (copy / name).unlink()
        (copy / name).symlink_to(secret)
        with pytest.raises(BundleError, match=rf"{name} is a link to"):
            ask(copy)
        (copy / name).unlink()
        (copy / name).write_bytes(content)
    assert ask(copy)


@pytest.mark.parametrize(
    "name", ["added_tokens.json", "special_tokens_map.json", "chat_template.json", "generation_config.json"]
)
def test_a_link_that_is_not_listed_is_not_followed(copy: Path, outside: Path, name: str) -> None:
    data = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    data["files"].pop(name, None)
    (copy / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(outside / "secret")
    with watched(outside / "secret") as watch:
        with pytest.raises(BundleError, match="is a link out of the bundle"):
            ask(copy)
        assert not watch.touched


def change(data: dict[str, Any], path: str, new: str) -> None:
    *owners, last = path.split(".")
    for owner in owners:
        data = data[int(owner)] if isinstance(data, list) else data[owner]
    data[last] = new


@pytest.mark.parametrize("path", ["embed_tokens", "vision.0.file", "decoder.graph.file"])
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("kind", ["above", "absolute", "a folder's link"])
def test_a_manifest_names_nothing_outside(copy: Path, outside: Path, path: str, listed: bool, kind: str) -> None:
    name = NAMES[kind](outside)
    (copy / "linked").symlink_to(outside)
    data = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    change(data, path, name)
    if listed:
        data["files"][name] = {"bytes": 64, "sha256": file_sha256(outside / "secret")}
    (copy / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with watched(outside / "secret") as watch:
        with pytest.raises(LeanVLMError) as error:
            ask(copy)
        assert not watch.touched
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8 + bytes(99), (1 << 40).to_bytes(8, "little"), b"PK\3\4" + bytes(99), b"\x93NUMPY"]
)
def test_a_token_table_that_is_none_is_refused(copy: Path, content: bytes) -> None:
    """Such as a NumPy archive, or a header of a terabyte; nothing is ever unpickled."""
    name = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))["embed_tokens"]
    (copy / name).write_bytes(content)
    relist(copy, name)
    with pytest.raises(BundleError, match="cannot be read"):
        ask(copy)


def test_the_watch_sees_an_open_file(outside: Path) -> None:
    with watched(outside / "secret") as watch:
        assert not watch.touched
        os.close(os.open(outside / "secret", os.O_RDONLY))
        assert watch.touched
        assert not watch.touched
        np.memmap(outside / "secret", np.uint8, "r")
        assert watch.touched
