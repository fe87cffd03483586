"""What strangers send, changed at random: whatever reads it takes it or raises a declared error of one line.

The readers are those of `bench.fuzz`, where libFuzzer runs over them too. Requests go through a whole server in
`test_attacks_http`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import onnx
import pytest
from external_graphs import PLACES, weight
from fuzz_targets import POLICY, REQUEST, TARGETS, seeds
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json
from onnx.external_data_helper import _get_all_tensors

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.graph_files import locations
from leanvlm.runtime.serving.remote import target_of

EXAMPLES, MANY = 60, 3000


CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def quick(examples: int) -> Any:
    return settings(max_examples=examples, deadline=5000, suppress_health_check=CHECKS)


sizes = pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(MANY, marks=pytest.mark.slow)])


@sizes
@pytest.mark.parametrize("name", ["image", "request", "data_uri"])
def test_damage_is_refused_in_one_line(name: str, examples: int) -> None:
    originals = list(seeds(name))

    @quick(examples)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        TARGETS[name](data.draw(damaged_bytes(data.draw(st.sampled_from(originals)))))

    run()


@sizes
def test_damaged_json_is_refused_in_one_line(examples: int) -> None:
    @quick(examples)
    @given(damaged_json(REQUEST))
    def run(text: str) -> None:
        TARGETS["request"](text.encode("utf-8", "surrogatepass"))

    run()


HOSTS = (
    "images.example.org", "10.0.0.5", "[fd00::5]", "evil.example", "127.0.0.1", "[::1]", "2130706433", "0x7f.1", "localhost",
)  # fmt: skip
PIECES = (
    *HOSTS, "http", "https", "file", "://", ":", "//", "/", "\\", "@", "#", "?", "%", "%2f", "%40", ":80", ":443", ":8443",
    ":8080",
    "a", ".", "..", "\t", "\n", "\r\n", " ", "\0", "\u3002", "\uff0f", "\u00ad", "[", "]", "::ffff:127.0.0.1", "user:word@",
)  # fmt: skip


@sizes
def test_no_spelling_of_an_address_leads_elsewhere(examples: int) -> None:
    """As Python's own parser reads it."""

    @quick(10 * examples)
    @given(
        st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
        | st.builds("{}://{}{}{}".format, *map(st.sampled_from, (("http", "HTTPS"), HOSTS, PIECES, PIECES)))
    )
    def run(url: str) -> None:
        TARGETS["address"](url.encode("utf-8", "surrogateescape"))
        TARGETS["allowed"](url.encode("utf-8", "surrogateescape"))
        try:
            found = target_of(url, POLICY)
        except InputError:
            return
        theirs = urlsplit(url)
        assert theirs.hostname in {"images.example.org", "10.0.0.5", "fd00::5"}
        assert theirs.hostname == found.place.host
        assert (theirs.username, theirs.password) == (None, None)
        assert (theirs.port or {"http": 80, "https": 443}[theirs.scheme]) == found.port
        assert re.fullmatch(r"[!-~]+", found.path)

    run()


@sizes
def test_names_in_a_damaged_graph_are_all_seen(examples: int) -> None:
    """By protobuf's own parser: whatever it takes, no name of a file is missed."""
    originals = [place(weight("vision.data", offset="0", length="64")).SerializeToString() for place in PLACES]

    @quick(10 * examples)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        content = data.draw(damaged_bytes(data.draw(st.sampled_from(originals))))
        TARGETS["graph"](content)
        try:
            tensors = list(_get_all_tensors(onnx.ModelProto.FromString(content)))
        except DecodeError:
            return
        named = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
        with suppress(ValueError):  # What is refused reads nothing.
            assert named <= set(locations(content))

    run()
