"""Checkpoints whose files hold what no model has: one line each, before anything of such a size is made."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import bounded, one_line
from safetensors.torch import load_file, save_file

from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import load_model
from leanvlm.exporter.gate_file import GateFile, read_gate_file
from leanvlm.exporter.plan import plan
from leanvlm.runtime.errors import InputError, LeanVLMError

Change = Callable[[Path], object]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "language_model.lm_head.weight"
BILLION = 10**12


@pytest.fixture
def folder(tiny_llava: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to change."""
    return shutil.copytree(tiny_llava, tmp_path / "checkpoint")


def refusal(folder: Path, **options: Any) -> str:
    """Return the one line in which an export's plan ends."""
    with pytest.raises(LeanVLMError) as caught, bounded():
        plan(ExportConfig(str(folder), (16,), folder.parent / "bundle", **options))
    return one_line(caught.value)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def put(name: str, key: str, value: Any) -> Change:
    """Set a value in a JSON file; dots in the key go deeper."""
    *parents, last = key.split(".")

    def change(data: dict[str, Any]) -> None:
        for parent in parents:
            data = data[parent]
        data[last] = value

    return lambda folder: edit(folder / name, change)


def content(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


TEXT, VISION = "text_config", "vision_config"
SIZES = {
    TEXT: (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "max_position_embeddings",
    ),
    VISION: (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
        "patch_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("part", "size"), [(part, size) for part, sizes in SIZES.items() for size in sizes])
def test_sizes_that_no_model_has(folder: Path, part: str, size: str) -> None:
    """Of another type too; transformers names the field, or calls it as it likes."""
    original = (folder / "config.json").read_bytes()
    for value in (BILLION, 2**70, -1, 0, 2.5, "7", True, [1]):
        put("config.json", f"{part}.{size}", value)(folder)
        assert "config.json" in refusal(folder), value
        (folder / "config.json").write_bytes(original)


@pytest.mark.parametrize("size", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_sizes_of_another_model(folder: Path, size: str) -> None:
    """In range, and yet not of these weights; their headers tell, and nothing is read or made."""
    put("config.json", f"{TEXT}.{size}", 64)(folder)
    assert "not of one save: download it again" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("vision_config.patch_size", 155, "patch_size 155 is more than image_size 154"),
        ("vision_config.image_size", 4000, "makes 81225 patches of 14, over 4096"),
        ("vision_config.num_attention_heads", 7, "is not a multiple of the number of attention heads"),
        ("text_config.num_key_value_heads", 3, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ("vision_feature_layer", 9, "vision_feature_layer 9 is outside a tower of 5 blocks"),
        ("vision_feature_layer", -BILLION, "is outside a tower of 5 blocks"),
        ("image_token_index", 260, "token 260 stands for an image, which its tokenizer does not know"),
        ("image_token_index", -1, "image_token_id is -1; it must be from 0"),
        ("text_config.rms_norm_eps", 1e30, "rms_norm_eps is 1e+30; it must be from 0 to 1"),
        ("text_config.rope_parameters.rope_theta", 0, "rope_theta is 0.0; it must be from 1e-06"),
        ("text_config.rope_parameters.rope_theta", "x", 'rope_theta is "x"; it must be a number'),
        ("text_config.rope_parameters.rope_theta", {"__float__": "NaN"}, "rope_theta is "),
        ("text_config.rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}, "factor is 0.0"),
        ("text_config.rope_parameters", {"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"}, "attention_factor is "),
        ("text_config.pad_token_id", 10**6, "transformers cannot build the model that config.json describes: Padding_idx"),
        ("text_config.sliding_window", "x", "sliding_window 'x' is not a number of tokens"),
        ("text_config.num_labels", BILLION, "num_labels is 1000000000000, over 32768"),
        ("num_labels", 10**7, "num_labels is 10000000, over 32768"),
        ("text_config.hidden_act", "os.system", "hidden_act 'os.system' is no activation function of transformers"),
        ("text_config.hidden_act", "laplace", "hidden_act 'laplace' is not supported; supported: silu"),
        ("vision_config.hidden_act", "os.system", "hidden_act 'os.system' is no activation function"),
        ("projector_hidden_act", "os.system", "projector_hidden_act 'os.system' is no activation function"),
        ("torch_dtype", "load", "config.json: dtype is 'load'; it must be float32, float16 or bfloat16"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("text_config.dtype", "float8_e4m3fn", "dtype is 'float8_e4m3fn'"),
        ("vision_config.torch_dtype", "Tensor", "dtype is 'Tensor'"),
        ("text_config.torch_dtype", 3, "dtype is 3"),
        ("text_config.model_type", "olmo2", "'olmo2' decoder is not supported"),
        ("vision_config.model_type", [1], "llava with a [1] tower is not supported"),
        ("model_type", "x" * 10**5, "model_type 'xxx"),
        ("text_config.model_type", "x" * 10**5, "llava with a 'xxx"),
        ("model_type", {"a": 1}, "is not supported; supported: gemma3, idefics3, internvl, llava"),
        ("configuration_files", ["config.4.0.0.json"], "configuration_files of other versions"),
        ("quantization_config", {"quant_method": "awq"}, "holds quantised weights"),
        ("text_config.text_config", "load", "transformers cannot build the model that config.json describes"),
        ("text_config", [], "config.json is not a valid configuration"),
        ("vision_config", "x", "config.json is not a valid configuration"),
        ("text_config", {}, "stands for an image, which its tokenizer does not know|shape"),
    ],
)  # fmt: skip
def test_configurations_of_no_model(folder: Path, key: str, value: Any, words: str) -> None:
    put("config.json", key, value)(folder)
    message = refusal(folder)
    assert any(part in message for part in words.split("|")), message


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen2", "gemma3n_text"])
def test_a_list_of_a_billion_layers_is_not_made(kind: str, folder: Path) -> None:
    """Some configurations make a list with an entry for every layer as soon as they are read, of decoders known or not."""
    put("config.json", "text_config.num_hidden_layers", BILLION)(folder)
    put("config.json", "text_config.model_type", kind)(folder)
    assert "num_hidden_layers is 1000000000" in refusal(folder)


def test_code_of_a_checkpoint_is_not_looked_for(folder: Path) -> None:
    put("config.json", "auto_map", {"AutoConfig": "evil.Config"})(folder)
    (folder / "evil.py").write_text("raise SystemExit(7)", encoding="utf-8")
    plan(ExportConfig(str(folder), (16,), folder.parent / "bundle"))


JSON_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    INDEX,
)
BOMBS = {
    "5,000 digits": '{"a": ' + "9" * 5000 + "}",
    "deep": "[" * 10**6,
    "not finite": '{"a": NaN}',
    "a list": "[1]",
    "not UTF-8": b'{"a": "\xff"}',
    "large": b" " * (20 << 20) + b"{}",
    "empty": "",
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_that_is_none(folder: Path, name: str) -> None:
    counts_before = {INDEX: SINGLE, PROCESSOR: NESTED}
    if name in counts_before:
        (folder / counts_before[name]).unlink()
    for bomb in BOMBS.values():
        content(name, bomb)(folder)
        assert name in refusal(folder)


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of the weights."""

    def apply(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8:end])
        change(parsed)
        text = json.dumps(parsed).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[end:])

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change the tensors, and write a file that is right in itself."""

    def apply(folder: Path) -> None:
        found = {key: value.clone() for key, value in load_file(folder / SINGLE).items()}
        change(found)
        save_file(found, folder / SINGLE, metadata={"format": "pt"})

    return apply


def as_dtype(dtype: torch.dtype) -> Change:
    return tensors(lambda found: found.update({HEAD: found[HEAD].to(dtype)}))


def index(text: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(text, encoding="utf-8")

    return apply


DOWNLOAD = "download it again"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (content(SINGLE, b""), DOWNLOAD),
        (content(SINGLE, b"\x08"), DOWNLOAD),
        (lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-1000]), DOWNLOAD),
        (content(SINGLE, struct.pack("<Q", 2**63) + b"{}"), "a header of 9223372036854775808 bytes, over"),
        (content(SINGLE, struct.pack("<Q", 100) + b"{}"), DOWNLOAD),
        (header(lambda data: data[HEAD].update(data_offsets=[-8, 0])), DOWNLOAD),
        (header(lambda data: data[HEAD].update(data_offsets=[0, 260 * 128 * 4 + 1])), DOWNLOAD),
        (header(lambda data: data[HEAD].update(shape=[10**6, 10**6])), DOWNLOAD),
        (header(lambda data: data[HEAD].update(shape=[2**32, 2**32])), DOWNLOAD),
        (header(lambda data: data[HEAD].update(shape=[-1, 5])), DOWNLOAD),
        (header(lambda data: data[HEAD].update(dtype="I32")), "is I32; quantised weights are not read"),
        (header(lambda data: data[HEAD].update(dtype="X1")), DOWNLOAD),
        (as_dtype(torch.int64), "is I64; quantised weights are not read"),
        (as_dtype(torch.float8_e4m3fn), "is F8_E4M3; quantised weights are not read"),
        (tensors(lambda found: found.pop(HEAD)), "misses 1 weight(s): lm_head.weight; its config.json and its weights"),
        (tensors(lambda found: found.update(a=torch.zeros(2))), "unexpected 1 weight(s): a; its config.json and its weights"),
        (tensors(lambda found: found.update({f"x.lora_A.{i}": torch.zeros(2) for i in range(9)})), "merge it first (peft"),
        (tensors(lambda found: found.update({"a\nb" * 200: torch.zeros(2)})), "unexpected 1 weight(s): a ba b"),
        (index('{"weight_map": {"a": 3}}'), "weight_map.a is 3; it must be a string"),
        (index('{"weight_map": ["a.safetensors"]}'), "weight_map is a list of 1; it must be an object"),
        (index('{"weight_map": {"a": "../a.safetensors"}}'), "supported: .safetensors files inside the folder"),
        (index('{"weight_map": {"a": "/dev/zero"}}'), "supported: .safetensors files inside the folder"),
        (index(json.dumps({"weight_map": {"a": "x" * 10**6 + ".safetensors"}})), "supported: .safetensors files inside"),
        (index('{"weight_map": {"a": "a\\u0000.safetensors"}}'), "which is missing"),
        (index('{"weight_map": {"a": "b.safetensors"}}'), "names b.safetensors, which is missing"),
    ],
)  # fmt: skip
def test_weight_files_that_are_none(folder: Path, change: Change, words: str) -> None:
    """Known with the plan, before any weight is read; where there is a way out it is said."""
    change(folder)
    assert words in refusal(folder)


def test_a_header_of_very_many_tensors(folder: Path) -> None:
    """Just under the limit: what its parsing takes stays bounded too."""
    empty = {f"{number:x}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(70_000)}
    text = json.dumps(empty, separators=(",", ":")).encode()
    assert 3 << 20 < len(text) < 4 << 20
    content(SINGLE, struct.pack("<Q", len(text)) + text)(folder)
    assert "misses" in refusal(folder)


PROCESSOR, NESTED = "preprocessor_config.json", "processor_config.json"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", {"shortest_edge": 10**9}), ("size", {"shortest_edge": -1}), ("size", {"shortest_edge": 154.5}), ("size", "x"),
        ("crop_size", {"height": 10**9, "width": 10**9}), ("crop_size", {"height": -154, "width": 154}),
        ("crop_size", {"height": 154.5, "width": 154}), ("crop_size", [154]), ("crop_size", {"height": 0, "width": 0}),
        ("image_mean", [0.5, 0.5]), ("image_mean", "x"), ("image_mean", [0.5, 0.5, {}]), ("image_std", [0, 0, 0]),
        ("image_std", [0.5, 0.5, -1]), ("image_std", 0), ("resample", 99), ("resample", -1), ("resample", [1] * 10**5),
        ("rescale_factor", "x"), ("rescale_factor", [1]), ("do_pad", True), ("image_processor_type", 3),
        ("image_processor_type", "os.system"), ("size", 10**30),
    ],
)  # fmt: skip
def test_processors_of_no_model(folder: Path, key: str, value: Any) -> None:
    """In either of the files that transformers reads them from."""
    put(PROCESSOR, key, value)(folder)
    (folder / NESTED).rename(folder / "aside")
    assert "process" in refusal(folder)
    (folder / "aside").rename(folder / NESTED)
    put(NESTED, f"image_processor.{key}", value)(folder)
    assert "process" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("eos_token_id", 2.5, "eos_token_id must be a token id or a list of them"),
        ("eos_token_id", "x" * 10**5, "eos_token_id must be"),
        ("eos_token_id", [2, "x"], "eos_token_id must be"),
        ("eos_token_id", 10**30, "is beyond its model's 260 tokens"),
        ("repetition_penalty", "x", "repetition_penalty"),
        ("top_k", -1, "top_k"),
        ("bad_words_ids", [[10**9]], "bad_words_ids names token"),
        ("sequence_bias", [[["a"], 1.0]] * 10**5, "sets sequence_bias = "),
    ],
)  # fmt: skip
def test_generation_settings_of_no_model(folder: Path, key: str, value: Any, words: str) -> None:
    put("generation_config.json", key, value)(folder)
    assert words in refusal(folder)


@pytest.mark.parametrize("value", ["x", {}, [1], None])
def test_a_tokenizer_that_transformers_cannot_call(folder: Path, value: Any) -> None:
    """A length of another type is looked at with the first text only."""
    put("tokenizer_config.json", "model_max_length", value)(folder)
    if value is None:
        plan(ExportConfig(str(folder), (16,), folder.parent / "bundle"))
    else:
        assert "transformers' tokenizer fails, see tokenizer_config.json" in refusal(folder)


def test_text_that_is_no_unicode(folder: Path) -> None:
    put("tokenizer_config.json", "note", "\ud800")(folder)
    assert "tokenizer_config.json holds text that is no Unicode" in refusal(folder)


def test_an_endless_template(folder: Path) -> None:
    assert "more than 1048576 characters" in refusal(folder, template="/dev/zero")


def test_a_model_card_without_end(folder: Path) -> None:
    """Its top is read, where the licence stands."""
    with (folder / "README.md").open("w", encoding="utf-8") as card:
        card.write("---\nlicense: mit\n---\n")
        card.truncate(2**40)
    with bounded():
        checkpoint = plan(ExportConfig(str(folder), (16,), folder.parent / "bundle")).checkpoint
        assert checkpoint.source().licence == "mit"
        load_model(checkpoint)


GATE = GateFile("tiny", "0" * 64, 8, "test", 60.0, 5.5)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("erank_ref", 0, "erank_ref is 0.0; it must be from"),
        ("erank_ref", 1e300, "erank_ref is "),
        ("erank_ref", "60", "erank_ref is \"60\"; it must be a number"),
        ("entropy_ref", None, "entropy_ref is null; it must be a number"),
        ("images", 2.5, "images is 2.5; it must be a whole number"),
        ("images", 0, "images is 0; it must be from 1"),
        ("sha256", 7, "sha256 is 7; it must be a string"),
        ("figures", [], "figures is a list of 0; it must be an object"),
        ("gates", 1, 'the key "gates", which this version of leanvlm does not know'),
        ("schema", 1, "is not a gate file of schema 2"),
    ],
)  # fmt: skip
def test_gate_files_of_no_model(folder: Path, key: str, value: Any, words: str) -> None:
    path = folder / "gate.json"
    path.write_bytes(GATE.to_bytes())
    assert read_gate_file(path) == GATE
    put("gate.json", key, value)(folder)
    assert words in refusal(folder, gate_file=path)


@pytest.mark.parametrize("bomb", BOMBS)
def test_gate_files_that_are_no_json(tmp_path: Path, bomb: str) -> None:
    content("gate.json", BOMBS[bomb])(tmp_path)
    with pytest.raises(InputError) as caught, bounded():
        read_gate_file(tmp_path / "gate.json")
    assert "gate.json" in one_line(caught.value)
