"""A checkpoint's small files, changed at random: an export refuses them in one line, or takes them; it never falls over.

What runs is all that an export does before its long work: the plan, and the model around its mapped weights.
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
from bounds import MEMORY, bounded, one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import VALUES, at, damaged_bytes, damaged_json, paths
from safetensors.torch import load_file, save_file

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import load_model
from leanvlm.exporter.plan import plan
from leanvlm.runtime.errors import LeanVLMError, LeanVLMWarning

EXAMPLES, MANY = 200, 2000

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json", "tokenizer_config.json",
    INDEX, SHARDS[0],
)  # fmt: skip
# Of these, one is read only where the other is not there.
HIDDEN_BY = {"preprocessor_config.json": "processor_config.json"}

# Keys that transformers knows, and what could be their values: found in a place of their own or of another.
NAMES = (
    "auto_map", "quantization_config", "num_labels", "id2label", "torch_dtype", "dtype", "model_type", "architectures",
    "attn_implementation", "layer_types", "sliding_window", "rope_scaling", "rope_parameters", "rope_theta", "head_dim",
    "partial_rotary_factor", "tie_word_embeddings", "transformers_weights", "configuration_files", "is_encoder_decoder",
    "pruned_heads", "num_channels", "hidden_act", "hidden_size", "num_hidden_layers", "image_size", "text_config",
    "image_processor_type", "processor_class", "tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "backend",
    "chat_template", "padding_side", "model_max_length", "eos_token_id", "bad_words_ids", "size", "do_pad", "__metadata__",
)  # fmt: skip
LIKELY = [
    "load", "Tensor", "float16", "int8", "float8_e4m3fn", "complex64", "relu", "linear", "gemma3_text", "bert", "yarn",
    {"height": 10**9, "width": 10**9}, {"shortest_edge": 10**9}, {"rope_type": "yarn", "factor": 0}, {"__float__": "NaN"},
    {"0": {"content": "<a>", "special": True}}, ["full_attention"] * 3, [[2]], 7, 16, 4096,
]  # fmt: skip


@st.composite
def foreign_json(draw: st.DrawFn, data: Any) -> str:
    """Text of JSON with a key that belongs elsewhere, or with a value that does."""
    data = copy.deepcopy(data)
    path = draw(st.sampled_from(list(paths(data))))
    parent, value = at(data, path[:-1]), draw(st.sampled_from(LIKELY + VALUES))
    key = draw(st.sampled_from(NAMES)) if isinstance(parent, dict) and draw(st.booleans()) else path[-1]
    parent[key] = value
    return json.dumps(data)


def hostile(content: bytes) -> st.SearchStrategy[bytes]:
    """Other contents for a JSON file."""
    data = json.loads(content)
    return st.one_of(damaged_json(data).map(str.encode), foreign_json(data).map(str.encode), damaged_bytes(content))


@st.composite
def hostile_weights(draw: st.DrawFn, content: bytes) -> bytes:
    """Other contents for a safetensors file: its header changed, or the length of the header, or the file cut."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = draw(hostile(content[8:end]))
    length = draw(st.sampled_from([len(header)] * 9 + [0, len(header) - 1, len(header) + 1, 10**8, 2**40, 2**64 - 1]))
    whole = struct.pack("<Q", length) + header + content[end:]
    return whole[: draw(st.sampled_from([len(whole)] * 4 + [len(whole) - 1, len(header), 8, 7, 0]))]


@pytest.fixture(scope="module")
def folder(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in two shards."""
    return sharded(shutil.copytree(tiny_llava, tmp_path_factory.mktemp("fuzz") / "checkpoint"))


def sharded(folder: Path) -> Path:
    """Split a checkpoint's one file of weights in two, with an index."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = {name: SHARDS[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        part = {name: tensors[name].clone() for name in names if names[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    single.unlink()
    return folder


def begin_export(folder: Path) -> None:
    """Do what an export does before its long work; fail if it ends in anything but one line."""
    try:
        with bounded(), warnings.catch_warnings():
            warnings.simplefilter("ignore", LeanVLMWarning)
            load_model(plan(ExportConfig(str(folder), (16,), folder.parent / "bundle")).checkpoint)
    except LeanVLMError as error:
        one_line(error)


def refuses_or_takes(folder: Path, data: st.DataObject) -> None:
    """Begin an export with one file changed."""
    name = data.draw(st.sampled_from(FILES))
    path, hiding = folder / name, folder / HIDDEN_BY.get(name, "none")
    before, hidden = path.read_bytes(), hiding.read_bytes() if hiding.is_file() else None
    path.write_bytes(data.draw(hostile_weights(before) if name in SHARDS else hostile(before)))
    hiding.unlink(missing_ok=True)
    try:
        begin_export(folder)
    finally:
        path.write_bytes(before)
        if hidden is not None:
            hiding.write_bytes(hidden)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_hostile_file_is_refused_in_one_line(folder: Path, data: st.DataObject) -> None:
    refuses_or_takes(folder, data)


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_hostile_files(folder: Path, data: st.DataObject) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses_or_takes(folder, data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY // 1024
