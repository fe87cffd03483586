"""A checkpoint's small files, changed at random: an export refuses them in one line, or takes them; it never falls over.

What runs is all that an export does before its long work: the plan, and the model around its mapped weights.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bounds import bounded, one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import load_model
from leanvlm.exporter.plan import plan
from leanvlm.runtime.errors import LeanVLMError

EXAMPLES, MANY = 200, 2000

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json",
    INDEX, SHARDS[0],
)  # fmt: skip

# What json.dumps does not write, put in as text.
RAW = {"<digits>": "9" * 5000, "<deep>": "[" * 100_000 + "]" * 100_000}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 1000, 4096, 2**31, 2**63, 10**12, -(10**12), 10**30, "<digits>", "<deep>",
    0.0, -0.0, 0.5, 2.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "7", "os.system", "load", "Tensor", "float16", "int8", "float8_e4m3fn", "complex64", "relu", "gelu", "linear",
    "llama", "clip_vision_model", "gemma3", "bert", "../../etc/passwd", "/dev/zero", "a\0b", "\ud800", "x" * 100_000,
    [], {}, [[]], [None], [1, 2], [0.5, 0.5, 0.5], [0, 0, 0], ["a", "b"], [1] * 10_000, {"a": 1}, {"": {}},
    {"height": 10**9, "width": 10**9}, {"shortest_edge": 10**9}, {"shortest_edge": -1}, {"longest_edge": 3},
)  # fmt: skip
NAMES = (
    "auto_map", "quantization_config", "num_labels", "id2label", "label2id", "torch_dtype", "dtype", "model_type",
    "architectures", "attn_implementation", "_attn_implementation", "layer_types", "sliding_window", "rope_scaling",
    "rope_parameters", "rope_theta", "partial_rotary_factor", "tie_word_embeddings", "transformers_weights",
    "is_encoder_decoder", "pruned_heads", "head_dim", "vision_feature_layer", "image_token_id", "image_token_index", "num_channels", "hidden_act",
    "image_processor_type", "processor_class", "tokenizer_class", "added_tokens_decoder", "extra_special_tokens",
    "chat_template", "padding_side", "model_max_length", "eos_token_id", "bad_words_ids", "size", "do_pad", "__metadata__",
    "config", "text_config", "vision_config", "image_processor", "tokenizer_file", "backend", "use_return_dict", "problem_type",
)  # fmt: skip

Tree = Any


def nodes(tree: Tree) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a tree: the list or object, and the index or key in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from nodes(value)


def changed(data: st.DataObject, tree: Tree) -> Tree:
    """Change one to three places of a tree."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(data.draw(st.integers(1, 3))):
        parent, key = data.draw(st.sampled_from(list(nodes(tree))))
        kind = data.draw(st.sampled_from(["value", "value", "number", "delete", "rename", "add", "swap"]))
        if kind == "value":
            parent[key] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
        elif kind == "number":
            parent[key] = data.draw(st.one_of(st.integers(), st.floats(), st.integers(-5, 2000)))
        elif kind == "delete" and parent is not tree:
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict) and parent is not tree:
            parent[data.draw(st.sampled_from(NAMES))] = parent.pop(key)
        elif kind == "add" and isinstance(parent[key], dict):
            parent[key][data.draw(st.sampled_from(NAMES))] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
        elif kind == "swap":
            other, place = data.draw(st.sampled_from(list(nodes(tree))))
            a, b = copy.deepcopy(parent[key]), copy.deepcopy(other[place])
            parent[key], other[place] = b, a
    return tree[""]


def written(tree: Tree) -> bytes:
    """Return a tree as JSON."""
    text = json.dumps(tree)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text.encode()


def damaged(data: st.DataObject, content: bytes, within: int) -> bytes:
    """Cut some bytes off, or change one of the first."""
    place = data.draw(st.integers(0, min(within, len(content)) - 1))
    if data.draw(st.booleans()):
        return content[:place]
    return content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]


def hostile(data: st.DataObject, name: str, content: bytes) -> bytes:
    """Return another content for one file of the checkpoint."""
    header = 0
    if name.endswith(".safetensors"):
        header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.integers(0, 9)) == 0:
        return damaged(data, content, header or len(content))
    if not header:
        return written(changed(data, json.loads(content)))
    text = written(changed(data, json.loads(content[8:header])))
    length = data.draw(st.sampled_from([len(text)] * 9 + [0, len(text) - 1, 10**8, 2**40, 2**64 - 1]))
    return struct.pack("<Q", length) + text + content[header:]


@pytest.fixture(scope="module")
def folder(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in two shards."""
    folder = shutil.copytree(tiny_llava, tmp_path_factory.mktemp("fuzz") / "checkpoint")
    return sharded(folder)


def sharded(folder: Path) -> Path:
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = sorted(tensors)
    places = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in names if places[name] == shard}, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}), encoding="utf-8")
    single.unlink()
    return folder


def begin_export(folder: Path) -> None:
    """Do what an export does before its long work; fail if it ends in anything but one line."""
    try:
        with bounded():
            load_model(plan(ExportConfig(str(folder), (16,), folder.parent / "bundle")).checkpoint)
    except LeanVLMError as error:
        one_line(error)


def try_hostile(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(hostile(data, name, before))
    try:
        begin_export(folder)
    finally:
        path.write_bytes(before)


FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


@settings(FUZZ, max_examples=EXAMPLES, derandomize=True)
@given(data=st.data())
def test_a_hostile_file_is_refused_in_one_line(folder: Path, data: st.DataObject) -> None:
    try_hostile(folder, data)


@pytest.mark.slow
@settings(FUZZ, max_examples=MANY)
@given(data=st.data())
def test_many_hostile_files(folder: Path, data: st.DataObject) -> None:
    try_hostile(folder, data)
