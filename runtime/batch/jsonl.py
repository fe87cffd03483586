"""A JSONL file: an object a line, whose images are paths.

A path may lead anywhere that the user can read, since the file is the user's own; one that does not begin with / is relative to
the file. All lines are read before any work, so whatever is wrong with one is said at once, with its number.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.batch.source import Row, Schema, Table, arrow, check_columns, file_identity
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.records import LIMIT, shorten

# The kinds of values that a column may have, beside null, for each type of Arrow's; any others are kept as JSON text.
TYPES = {
    "string": {"string"},
    "bool": {"bool"},
    "int64": {"int", "long"},
    # A long one would be rounded.
    "float64": {"int", "float"},
}
EXACT = 2**53


@dataclass(frozen=True)
class Jsonl:
    """The lines of a file.

    Attributes:
        path: Of the file.
        offsets: Where in the file each row begins, in bytes.
        columns: The type of each key that occurs: one of `TYPES`, `strings` (the list `images`) or `json`.
        prompt: What rows without a prompt are asked.
    """

    path: Path
    offsets: Sequence[int]
    columns: Mapping[str, str]
    prompt: str | None

    @classmethod
    def open(cls, path: Path, prompt: str | None) -> Jsonl:
        """Read all lines once, and check them; empty ones are passed over."""
        offsets, kinds, end = array("Q"), dict[str, set[str]](), 0
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LIMIT + 1), b""), 1):
                if line.strip():
                    offsets.append(end)
                    _check(record := _parse(line, path, number), path, number, prompt)
                    for name, value in record.items():
                        kinds.setdefault(name, set()).add(_kind(value))
                end += len(line)
        if not offsets:
            raise InputError(f"{path} has no lines in it")
        # Here, a row may have one and its neighbour several images.
        names = [name for name in kinds if name != "images" or "image" not in kinds]
        check_columns(path, names, prompt)
        return cls(path, offsets, {name: _type(name, seen) for name, seen in kinds.items()}, prompt)

    @property
    def count(self) -> int:
        """How many rows there are."""
        return len(self.offsets)

    @property
    def schema(self) -> Schema:
        """The id, or the row's number where no line has one, and the other keys."""
        pa = arrow()
        types = {"strings": pa.list_(pa.string()), "json": pa.string()}
        columns = {"id": "int64", **self.columns}
        return pa.schema([(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in columns.items()])

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Yield a question for each line."""
        for record in self._records(start, stop):
            names = record.get("images")
            names = [record["image"]] if names is None else names
            yield Row(tuple(self.path.parent / name for name in names), record.get("prompt") or self.prompt or "")

    def carried(self, start: int, stop: int) -> Table:
        """Return the columns, null where a line does not have the key."""
        records = list(self._records(start, stop))
        columns = {name: [_cell(record.get(name), kind) for record in records] for name, kind in self.columns.items()}
        return arrow().table({"id": list(range(start, stop)), **columns}, schema=self.schema)

    def identity(self) -> Mapping[str, Any]:
        """Return the file's size and time of change."""
        return {"kind": "jsonl", "rows": self.count, **file_identity(self.path)}

    def _records(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as file:
            for offset in self.offsets[start:stop]:
                file.seek(offset)
                yield json.loads(file.readline(LIMIT + 1))


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """Return a line's object; raise InputError where it is none."""
    where = f"{path}, line {number}"
    if len(line) > LIMIT:
        raise InputError(f"{where} has more than {LIMIT} bytes")
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_refuse)
        # Half of a surrogate pair can be written in JSON, and is no text.
        if b"\\u" in line:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as JSON: {shorten(error)}") from error
    if not isinstance(record, dict):
        raise InputError(f'{where} is no object such as {{"image": "photo.jpg", "prompt": "What is it?"}}')
    return record


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _check(record: Mapping[str, Any], path: Path, number: int, prompt: str | None) -> None:
    """Check the keys of a line that a question is made of."""
    where = f"{path}, line {number}"
    image, images, asked = record.get("image"), record.get("images"), record.get("prompt")
    if (image is None) == (images is None):
        raise InputError(f"{where} needs image (a path) or images (a list of paths), and not both")
    if images is not None and not (isinstance(images, list) and images):
        raise InputError(f"{where}: images is no list of paths, but {shorten(images)}")
    for name in [image] if images is None else images:
        if not (isinstance(name, str) and name and "\0" not in name):
            raise InputError(f"{where}: {shorten(name)} is no path of an image")
    if asked is not None and not isinstance(asked, str):
        raise InputError(f"{where}: prompt is no text, but {shorten(asked)}")
    if not (asked or prompt or "").strip():
        raise InputError(f"{where} has no prompt; give it one, or give --prompt")


def _kind(value: Any) -> str:
    """Return the kind of a JSON value, as `TYPES` names them."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= EXACT else "long" if -(2**63) <= value < 2**63 else "json"
    return {str: "string", float: "float", type(None): "null"}.get(type(value), "json")


def _type(name: str, kinds: set[str]) -> str:
    if name == "images":
        return "strings"
    return next((kind for kind, fitting in TYPES.items() if kinds <= {*fitting, "null"}), "json")


def _cell(value: Any, kind: str) -> Any:
    return json.dumps(value, ensure_ascii=False) if kind == "json" and value is not None else value
