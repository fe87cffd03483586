"""The strict reader: what fits is read back equal, and whatever does not is one line that names its path."""

from __future__ import annotations

import contextlib
import json
import resource
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json

from leanvlm.runtime import load
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.commands.inspection import describe
from leanvlm.runtime.errors import BundleError, InputError, LeanVLMError, LeanVLMWarning, ManifestError
from leanvlm.runtime.manifest import MANIFEST
from leanvlm.runtime.records import Between, load_json, plain, read, shorten

EXAMPLES = 200
MANY = 2000
IMAGE = np.zeros((20, 30, 3), np.uint8)


@dataclass(frozen=True)
class Inner:
    """A record in a record, with a check of its own."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise InputError(f"low {self.low} is over high {self.high}")


@dataclass(frozen=True)
class Outer:
    """A record of every kind of field."""

    word: Literal["a", "b"]
    size: Annotated[int, Between(1, 8)]
    ratio: float
    name: str
    yes: bool
    pair: tuple[int, int]
    row: tuple[int | str, ...]
    table: Mapping[int, Inner]
    edge: int | tuple[int, int] | None = None
    free: Mapping[str, Any] = field(default_factory=dict)


GOOD: dict[str, Any] = {
    "word": "a", "size": 3, "ratio": 2, "name": "n", "yes": True, "pair": [1, 2], "row": [1, "B"],
    "table": {"4": {"low": 1, "high": 2}},
}  # fmt: skip


def test_what_fits_is_read_back_equal() -> None:
    record = read(Outer, GOOD, "file", InputError)
    assert record == Outer("a", 3, 2.0, "n", True, (1, 2), (1, "B"), {4: Inner(1, 2)})
    assert type(record.ratio) is float
    assert read(Outer, json.loads(json.dumps(plain(record))), "file", InputError) == record
    for edge in (5, [5, 6], None):
        assert plain(read(Outer, GOOD | {"edge": edge}, "file", InputError).edge) == edge


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"word": "c"}, """word is "c"; it must be one of ['a', 'b']"""),
        ({"word": ["a"]}, "word is a list of 1; it must be one of ['a', 'b']"),
        ({"size": 9}, "size is 9; it must be from 1 to 8"),
        ({"size": 3.0}, "size is 3.0; it must be a whole number"),
        ({"size": True}, "size is true; it must be a whole number"),
        ({"size": None}, "size is null; it must be a whole number"),
        ({"ratio": "1"}, 'ratio is "1"; it must be a number'),
        ({"ratio": float("inf")}, "ratio is Infinity; it must be a finite number"),
        ({"ratio": 10**400}, "ratio is a number of 1329 bits; it must be a finite number"),
        ({"yes": 1}, "yes is 1; it must be true or false"),
        ({"pair": [1]}, "pair is a list of 1; it must be a list of 2"),
        ({"pair": [1, "2"]}, 'pair[1] is "2"; it must be a whole number'),
        ({"row": {"a": 1}}, "row is an object of 1; it must be a list"),
        ({"row": [1.5]}, "row[0] is 1.5; it must be a whole number or a string"),
        ({"table": {"04": {}}}, 'table has the key "04"; its keys must be whole numbers'),
        ({"table": {"4": {"low": 1}}}, 'table."4" has no high'),
        ({"table": {"4": {"low": 3, "high": 2}}}, 'table."4": low 3 is over high 2'),
        ({"colour": 1}, 'it has the key "colour", which this version of leanvlm does not know'),
        ({"edge": "wide"}, 'edge is "wide"; it must be a whole number or a list or null'),
        ({"edge": [1, 2.5]}, "edge[1] is 2.5; it must be a whole number"),
        ({"name": 5}, "name is 5; it must be a string"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read(Outer, GOOD | change, "file", ManifestError)
    assert str(caught.value) == f"file: {message}"


def test_a_key_that_is_missing_is_named() -> None:
    for key in GOOD:
        with pytest.raises(InputError, match=f"^file: it has no {key}$"):
            read(Outer, {name: value for name, value in GOOD.items() if name != key}, "file", InputError)


def test_a_message_is_short_and_one_line() -> None:
    with pytest.raises(InputError) as caught:
        read(Outer, GOOD | {"word": "line\n" * 1000}, "file", InputError)
    assert len(str(caught.value)) < 150
    assert "\n" not in str(caught.value)
    assert len(shorten("word " * 1000)) < 300


def test_a_message_can_be_printed() -> None:
    """JSON spells halves of characters too."""
    with pytest.raises(InputError) as caught:
        read(Outer, GOOD | {"word": "\ud800"}, "file", InputError)
    assert str(caught.value).encode()
    assert shorten("é\ud800") == "é\\ud800"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "cannot be read as JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"9" * 5000, "cannot be read as JSON"),
        (b"[1,2,3,4]", "has 9 bytes; a file of its kind has at most 8"),
    ],
)
def test_a_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=words) as caught:
        load_json(path, BundleError, limit=8 if b"4" in content else 1 << 20)
    assert len(str(caught.value)) < 500
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        load_json(tmp_path / "none.json", BundleError)


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_manifest_is_refused_or_answers(tiny_bundle: Path, tmp_path: Path, data: st.DataObject) -> None:
    refuses_or_answers(tiny_bundle, tmp_path, data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=MANY, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_damaged_manifests(tiny_bundle: Path, tmp_path: Path, data: st.DataObject) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses_or_answers(tiny_bundle, tmp_path, data)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2 << 20  # kB


def refuses_or_answers(bundle: Path, folder: Path, data: st.DataObject) -> None:
    """Read a damaged manifest beside links to the bundle's files, and ask what was accepted."""
    for path in bundle.iterdir():
        if path.name != MANIFEST and not (folder / path.name).exists():
            (folder / path.name).hardlink_to(path)
    content = (bundle / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(data.draw(damaged_json(json.loads(content)).map(str.encode) | damaged_bytes(content)))
    with contextlib.suppress(LeanVLMError), warnings.catch_warnings():
        warnings.simplefilter("ignore", LeanVLMWarning)
        assert describe(folder, read_manifest(folder))
        with load(folder) as session:
            session.generate("What?", [IMAGE], max_new_tokens=2)
