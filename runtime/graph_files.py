"""Which files an ONNX file reads besides itself: only those that the bundle's manifest lists, whatever opens it.

A graph names the files of its weights. ONNX Runtime 1.23 follows such a name anywhere; later releases, OpenVINO and TensorRT
each have rules of their own for what leads out of the folder. So the names are read here first, out of protobuf's wire format
(https://protobuf.dev/programming-guides/encoding); the messages and their fields are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from leanvlm.runtime.errors import GraphError
from leanvlm.runtime.records import shorten

Bytes = bytes | mmap.mmap

# Of each message the fields that can hold a tensor, at some depth, and what they are.
FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {1: "Key", 2: "Value"},
}
LOCATION = b"location"
MAX_BYTES = 1 << 31
"""Of a message of protobuf; weights stand in files of their own."""
MAX_DEPTH = 100
"""Of messages in each other, as parsers of protobuf have it."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def graph_path(folder: Path, file: str, files: Collection[str]) -> Path:
    """Return the path of a graph in a bundle, once every file that it reads is one of the bundle's.

    Args:
        folder: The bundle.
        file: The graph's file.
        files: Files that the manifest lists; they were checked when it was read.

    Raises:
        GraphError: It cannot be read, is no ONNX file, or reads another file.
    """
    path = folder / file
    # By other names, such as .ort and .xml, files of other formats are read, which name others in their own way.
    if path.suffix != ".onnx":
        raise GraphError(f"{shorten(file)} is no graph: its name must end with .onnx")
    try:
        if path.stat().st_size >= MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MB")
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            names = set(locations(data))
    except (OSError, ValueError) as error:
        raise GraphError(
            f"{shorten(file)} cannot be read as ONNX: {shorten(error)}; copy or export the bundle again"
        ) from error
    for name in sorted(names):
        if (PurePosixPath(file).parent / name).as_posix() not in files:
            raise GraphError(f"{shorten(file)} reads {shorten(name)!r}, which is no file of the bundle; remove the bundle")
    return path


def locations(data: Bytes) -> Iterator[str]:
    """Yield the files that an ONNX model names.

    Raises:
        ValueError: It is no protobuf message.
    """
    yield from _walk(data, 0, len(data), "Model", 0)


def _walk(data: Bytes, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise ValueError(f"messages in each other deeper than {MAX_DEPTH}")
    inner = FIELDS[kind]
    key = value = b""
    for number, first, last in _fields(data, start, end):
        part = inner.get(number)
        if part == "Key":
            key = data[first:last]
        elif part == "Value":
            value = data[first:last]
        elif part is not None and data.find(LOCATION, first, last) >= 0:  # Others name no file.
            yield from _walk(data, first, last, part, depth + 1)
    if kind == "Entry" and key == LOCATION:
        yield value.decode()


def _fields(data: Bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, begin and end of each field of a message that is bytes, a string or a message."""
    while at < end:
        tag, at = _varint(data, at, end)
        form = tag & 7
        if form == BYTES:
            size, at = _varint(data, at, end)
            if size > end - at:
                raise ValueError("a field is longer than its message")
            yield tag >> 3, at, at + size
            at += size
        elif form == VARINT:
            _, at = _varint(data, at, end)
        elif form in (FIXED32, FIXED64):
            at += 4 if form == FIXED32 else 8
        else:
            raise ValueError("a field of a kind that ONNX does not use")
    if at != end:
        raise ValueError("a field is longer than its message")


def _varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("a number without end")
