"""What reads bytes of strangers, as functions that raise only what was not declared; and libFuzzer over them.

    pip install atheris
    python -m bench.fuzz request --seconds 600

Atheris (https://github.com/google/atheris) measures which code an input reaches and keeps those that reach more. It runs
outside the continuous checks; `tests/test_fuzz_serving.py` gives the same functions inputs of hypothesis.
"""

from __future__ import annotations

import argparse
import base64
import gc
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

from PIL import Image

from leanvlm.demo import MODEL_DIR
from leanvlm.runtime.errors import BundleError, InputError, ManifestError
from leanvlm.runtime.generation import GenerationSettings
from leanvlm.runtime.graph_files import locations
from leanvlm.runtime.manifest import Manifest
from leanvlm.runtime.preprocess import load_image
from leanvlm.runtime.records import load_json
from leanvlm.runtime.sandbox import sandbox
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.details import upright_size
from leanvlm.runtime.serving.images import check_images, from_data_uri
from leanvlm.runtime.serving.protocol import read_request
from leanvlm.runtime.serving.remote import RemotePolicy, target_of
from leanvlm.runtime.text import Template, TextTokenizer

TIMES = count(10**18)
Target = Callable[[bytes], None]
MEASURED = ("leanvlm.", "PIL.", "json.")
"""Modules whose reached code is measured; all that are loaded would take a minute to prepare."""
PIXELS, BYTES = 300_000, 1 << 20
POLICY = RemotePolicy(("images.example.org", "images.example.org:8443", "10.0.0.5", "[fd00::5]:8080"))


def one_line(error: Exception) -> None:
    """See that what a stranger is told is one line, and not long."""
    text = str(error)
    assert "\n" not in text, text
    assert len(text) < 2000, len(text)


def image(data: bytes) -> None:
    """Do with a picture what a request does."""
    try:
        check_images([data], PIXELS)
        size = upright_size(data)
        found = load_image(data)
        assert (found.height, found.width) == size
    except InputError as error:
        one_line(error)


def data_uri(data: bytes) -> None:
    """Decode a data URI; what comes out is coded so again."""
    text = data.decode("latin-1")
    try:
        found = from_data_uri(text, BYTES)
    except InputError as error:
        one_line(error)
    else:
        assert 0 < len(found) <= BYTES
        assert len(base64.b64encode(found)) == len(text.partition(",")[2])


def address(data: bytes) -> None:
    """Read the address of a picture; only what is allowed comes out."""
    try:
        found = target_of(data.decode("utf-8", "surrogateescape"), POLICY)
    except InputError as error:
        one_line(error)
    else:
        assert found.authority in ("images.example.org", "images.example.org:8443", "10.0.0.5", "[fd00::5]:8080")
        assert all(33 <= ord(letter) < 127 for letter in found.path)


def allowed(data: bytes) -> None:
    """Read an entry of an allow-list."""
    try:
        RemotePolicy((data.decode("utf-8", "surrogateescape"),))
    except InputError as error:
        one_line(error)


@cache
def service() -> Any:
    """Return what a request is read for, without a model."""

    def budget(asked: int | None) -> int:
        if asked not in (None, 64, 576):
            raise InputError(f"budget {asked} is not in this bundle")
        return asked or 64

    session = SimpleNamespace(manifest=SimpleNamespace(budget=budget), settings=GenerationSettings.from_folder(MODEL_DIR))
    return SimpleNamespace(
        name="demo-64", config=ServeConfig(), session=session, prompt_limit=640, left_out=frozenset({"system"})
    )


def request(data: bytes) -> None:
    """Read a body; what is taken has messages that are texts and images, as many as it names."""
    try:
        asked = read_request(data, service())
    except InputError as error:
        one_line(error)
    else:
        parts = [part for message in asked.messages for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(asked.addresses)
        assert all(isinstance(part.get("text", ""), str) for part in parts)
        json.dumps(asked.messages)


def graph(data: bytes) -> None:
    """Read the names of files out of a graph."""
    try:
        assert all(isinstance(name, str) for name in locations(data))
    except ValueError as error:
        one_line(error)


@cache
def folder() -> Path:
    """Return a folder for files; it is left behind."""
    return Path(tempfile.mkdtemp(prefix="leanvlm-fuzz-"))


def manifest(data: bytes) -> None:
    """Read a manifest."""
    path = folder() / "leanvlm.json"
    path.write_bytes(data)
    try:
        found = Manifest.from_dict(load_json(path, ManifestError))
        assert Manifest.from_dict(found.to_dict()) == found
    except ManifestError as error:
        one_line(error)


def tokenizer(data: bytes) -> None:
    """Read a tokenizer and use it."""
    path = folder() / "tokenizer.json"
    path.write_bytes(data)
    # The sandbox knows files by the time of their change, which is one for some milliseconds.
    os.utime(path, ns=(next(TIMES),) * 2)
    try:
        found = TextTokenizer.from_folder(folder())
        ids = found.encode("USER: <image>\nWhat is 12~? ASSISTANT:")
        found.decode(ids)
    except (BundleError, InputError) as error:
        one_line(error)


def template(data: bytes) -> None:
    """Render a template."""
    try:
        found = Template(data.decode("latin-1"))
        found.render([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}])
    except (BundleError, InputError) as error:
        one_line(error)


TARGETS: dict[str, Target] = {
    "image": image,
    "data_uri": data_uri,
    "address": address,
    "allowed": allowed,
    "request": request,
    "graph": graph,
    "manifest": manifest,
    "tokenizer": tokenizer,
    "template": template,
}
# A part of JSON that libFuzzer would take long to find.
REQUEST: dict[str, Any] = {
    "model": "demo-64", "messages": [
        {"role": "system", "content": "Be short."}, {"role": "assistant", "content": None, "name": "a"},
        {"role": "user", "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"}},
        ]},
    ],
    "stream": True, "stream_options": {"include_usage": True}, "stop": ["a", "b"], "max_tokens": 9, "max_completion_tokens": 9,
    "min_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": -7,
    "logprobs": True, "top_logprobs": 3, "ignore_eos": False, "budget": 64, "details": True, "n": 1, "tools": [], "user": "me",
    "response_format": {"type": "text"},
}  # fmt: skip


TURNED = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
PICTURES: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"exif": TURNED}), ("GIF", {}), ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]  # fmt: skip


def seeds(name: str) -> Iterator[bytes]:
    """Yield inputs to begin with."""
    if name == "image":
        picture = Image.open(MODEL_DIR.parent / "samples" / "complex-9003.png").convert("RGB").resize((24, 17))
        for kind, options in PICTURES:
            buffer = io.BytesIO()
            picture.save(buffer, kind, **options)
            yield buffer.getvalue()
    if name == "data_uri":
        yield from (b"data:image/png;base64,AAAA", b"data:image/jpeg;base64,AA==", b"data:image/svg+xml;base64,AAA=")
    if name in ("address", "allowed"):
        yield from (
            b"https://images.example.org:8443/a?b=%20#c",
            b"http://10.0.0.5/",
            b"http://[fd00::5]:8080/a",
            b"10.0.0.5:80",
        )
    if name == "request":
        yield json.dumps(REQUEST).encode()
        yield from (json.dumps({"messages": REQUEST["messages"], key: value}).encode() for key, value in REQUEST.items())
    if name == "tokenizer":
        yield (MODEL_DIR / "tokenizer.json").read_bytes()
    if name == "template":
        yield (MODEL_DIR / "chat_template.jinja").read_bytes()


def fuzz(name: str, seconds: int, bundle: Path | None, corpus: Path | None) -> None:
    """Run libFuzzer over a target; it ends the process, with another status than 0 where something was found."""
    import atheris

    for found in gc.get_objects():
        if isinstance(found, FunctionType) and str(found.__module__).startswith(MEASURED):
            atheris.instrument_func(found)
    corpus = corpus or folder() / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    files = (
        sorted(bundle.glob("*.onnx" if name == "graph" else "leanvlm.json")) if bundle and name in ("graph", "manifest") else []
    )
    for number, data in enumerate([*seeds(name), *(file.read_bytes() for file in files)]):
        (corpus / str(number)).write_bytes(data)
    done, begin = 0, time.monotonic()

    def once(data: bytes) -> None:
        nonlocal done
        done += 1
        TARGETS[name](data)
        if time.monotonic() - begin > seconds:
            # libFuzzer takes an exit for a find, and has no end of its own in Python.
            print(f"{name}: {done} inputs in {seconds} s, {len(list(corpus.iterdir()))} kept", file=sys.stderr, flush=True)
            sandbox().stop()
            os._exit(0)

    atheris.Setup([sys.argv[0], str(corpus), "-max_len=65536", "-timeout=30", "-rss_limit_mb=3000", "-verbosity=0"], once)
    atheris.Fuzz()


def main() -> None:
    """Run the target that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, help="folder of inputs that is gone on from and kept")
    parser.add_argument("--bundle", type=Path, help="whose graphs and manifest to begin with")
    asked = parser.parse_args()
    fuzz(asked.target, asked.seconds, asked.bundle, asked.corpus)


if __name__ == "__main__":
    main()
