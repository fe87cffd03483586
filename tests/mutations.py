"""Damage for files from elsewhere: what a mistake, a broken copy or an attacker makes of JSON and of bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 2.5, -0.0, 1e308, 10**12, 2**31, 2**63, -(2**63), 10**40, "", "0", "64", "text",
    "os.system",
    "__class__", "../../etc/passwd", "/dev/zero", "\0", "\ud800", "é" * 300, "x" * 100_000, [], {}, [[]], [{}], [None], [0, 0],
    [1, 2, 3], [0.5, 0.5], ["a"], {"a": {}}, {"": None}, list(range(1000)),
]  # fmt: skip
TEXTS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 20_000, "{", "\x00", "﻿", "//"]
"""What stands in JSON's text in the place of a value, and is none or not a finite one."""


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in nested JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def replaced(data: Any, path: tuple[Any, ...], value: object) -> Any:
    """Return a copy of nested JSON with another value at one path."""
    data = copy.deepcopy(data)
    parent = at(data, path[:-1])
    parent[path[-1]] = value
    return data


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at one path of nested JSON."""
    for key in path:
        data = data[key]
    return data


@st.composite
def damaged_json(draw: st.DrawFn, data: Any) -> str:
    """Text of JSON with one to three values replaced, removed, renamed, doubled or exchanged, or put in as no JSON."""
    mark = None
    for _ in range(draw(st.integers(1, 3))):
        # All paths are as likely, and sampled_from shrinks to the first.
        path = draw(st.sampled_from(list(paths(data)) or [()]))
        if not path:
            break
        how = draw(st.sampled_from(["value", "value", "number", "remove", "rename", "exchange", "double", "text"]))
        if how == "value":
            data = replaced(data, path, draw(st.sampled_from(VALUES)))
        elif how == "number":
            data = replaced(data, path, draw(st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
        elif how == "exchange":
            data = replaced(data, path, copy.deepcopy(at(data, draw(st.sampled_from(list(paths(data)))))))
        elif how == "text":
            mark = "\x01mark"
            data = replaced(data, path, mark)
        else:
            data = copy.deepcopy(data)
            parent = at(data, path[:-1])
            value = parent.pop(path[-1])
            if how == "rename" and isinstance(parent, dict):
                parent[f"{path[-1]}_"] = value
            elif how == "double":
                parent.update({path[-1]: [value, value]}) if isinstance(parent, dict) else parent.extend([value, value])
    text = json.dumps(data)
    return text if mark is None else text.replace(json.dumps(mark), draw(st.sampled_from(TEXTS)))


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were cut, or of which some were overwritten, removed or doubled."""
    start = draw(st.integers(0, max(len(content) - 1, 0)))
    count = draw(st.sampled_from([1, 2, 8, 64, 4096]))
    how = draw(st.sampled_from(["cut", "overwrite", "remove", "double"]))
    if how == "cut":
        return content[:start]
    if how == "overwrite":
        return content[:start] + draw(st.sampled_from([b"\0", b"\xff", b"{", b'"', b"\x80"])) * count + content[start + count :]
    if how == "remove":
        return content[:start] + content[start + count :]
    return content[: start + count] + content[start:]
