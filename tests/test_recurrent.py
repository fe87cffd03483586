"""Decoders with states in place of keys and values: they begin at zero, belong to one sequence, end where a prompt does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_sizes
import torch
from conftest import Command
from original import NEW_TOKENS
from original_sizes import SizedOriginal, pictures
from safetensors.torch import load_file, save_file

from leanvlm.exporter import ExportConfig, export, rounding
from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.decoders import genai
from leanvlm.runtime import load
from leanvlm.runtime.backends.ort_memory import DeviceMemory
from leanvlm.runtime.errors import (
    BackendError,
    CheckpointError,
    GraphError,
    ManifestError,
    UnsupportedModelError,
    VerificationError,
)
from leanvlm.runtime.manifest import MANIFEST, Manifest
from leanvlm.runtime.session import Session

pytestmark = pytest.mark.filterwarnings("ignore:a bundle for .* runs on cpu")
QUESTIONS = ("What is there?", "Count the cups, please.", "Why?")
STATES = ("conv", "recurrent")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sizes.TINY["qwen3_5"](tmp_path_factory.mktemp("recurrent") / "checkpoint")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("recurrent"), {}

    def exported(target: str) -> Path:
        if target not in made:
            made[target] = folder / target
            sizes = tiny_sizes.sizes(checkpoint)[:1]
            export(ExportConfig(str(checkpoint), (6,), made[target], target=target, image_sizes=sizes))
        return made[target]

    return exported


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.slow), "captured"])
def session(request: pytest.FixtureRequest, bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle on each backend; `captured` does on the processor all that capturing on a GPU would."""
    if request.param == "captured":
        monkeypatch.setattr(DeviceMemory, "captures", True)
    with load(bundle("cpu" if request.param == "cpu" else "cuda"), device="cpu", threads=1) as opened:
        yield opened


def ask(session: Session, number: int, **options: Any) -> Any:
    picture = [] if number == 2 else [pictures()[number % 2]]
    return session.stream(QUESTIONS[number], picture, max_new_tokens=NEW_TOKENS, ignore_end=True, **options)


def answer(session: Session, number: int) -> tuple[int, ...]:
    generation = ask(session, number)
    list(generation)
    return tuple(generation.answer.token_ids)


def test_answers_do_not_depend_on_those_before_and_beside_them(session: Session) -> None:
    first = [answer(session, number) for number in range(3)]
    assert len(set(first)) == 3
    assert [answer(session, number) for number in (2, 1, 0)] == first[::-1]
    streams = [ask(session, number) for number in range(3)]
    readers, end = [iter(stream) for stream in streams], object()
    while any([next(reader, end) is not end for reader in readers]):
        pass
    assert [tuple(stream.answer.token_ids) for stream in streams] == first


def test_cuda_s_graphs_answer_as_transformers(checkpoint: Path, bundle: Callable[[str], Path]) -> None:
    """Also where prompts would be padded: the tokens of `generate`, up to half precision's near ties."""
    original = SizedOriginal.open(checkpoint)
    with load(bundle("cuda"), device="cpu", threads=1) as session:
        height, width = session.manifest.crops.shapes[0].pixels
        picture = pictures()[0].resize((width, height))
        wanted = original.generate(original.inputs(QUESTIONS[0], picture))
        options = {"max_new_tokens": NEW_TOKENS, "ignore_end": True, "budget": max(session.manifest.budgets)}
        found = list(session.generate(QUESTIONS[0], [picture], **options).token_ids)
    assert found[:8] == wanted[:8]


def test_the_manifest_declares_the_states(bundle: Callable[[str], Path]) -> None:
    with load(bundle("cpu")) as session:
        decoder = session.manifest.decoder
        data = session.manifest.to_dict()
    assert decoder.layers == 2
    assert set(decoder.states.items()) == {(f"past.{at}.{kind}", f"present.{at}.{kind}") for at in (0, 2) for kind in STATES}
    assert decoder.state_shape("past.0.conv") == (1, 192, 3)
    assert decoder.state_shape("past.2.recurrent") == (1, 4, 16, 32)
    assert session.manifest.min_onnxruntime == "1.30"
    for output in data["decoder"]["graph"]["outputs"]:
        if output["name"] == "present.2.recurrent":
            output["shape"][3] = 16
    with pytest.raises(ManifestError, match=r"present\.2\.recurrent is float32"):
        Manifest.from_dict(data)
    data["decoder"]["graph"]["outputs"] = [o for o in data["decoder"]["graph"]["outputs"] if o["name"] != "present.2.recurrent"]
    with pytest.raises(ManifestError, match=r"no output present\.2\.recurrent"):
        Manifest.from_dict(data)


def test_lengths_are_summed_in_fp32(bundle: Callable[[str], Path]) -> None:
    """Half precision would be infinite from a length of 256 on; the processor computes it wider and would not show it."""
    graph = ir.load(bundle("cuda") / "decoder.onnx").graph
    kinds = {"ReduceSumSquare": 4, "Sqrt": 4}
    for kind, count in kinds.items():
        nodes = [node for node in graph if node.op_type == kind and "l2norm" in str(node.name)]
        assert [node.outputs[0].dtype for node in nodes] == [ir.DataType.FLOAT] * count


@pytest.mark.parametrize("target", [pytest.param("cpu", marks=pytest.mark.slow), "cuda"])
def test_a_decoder_without_recurrent_layers(tmp_path: Path, target: str) -> None:
    folder = tiny_sizes.qwen3_5_checkpoint(tmp_path / "checkpoint", layer_types=["full_attention"] * 2, num_hidden_layers=2)
    sizes = tiny_sizes.sizes(folder)[:1]
    made = export(ExportConfig(str(folder), (6,), tmp_path / "out", target=target, image_sizes=sizes))
    assert made.decoder.states == {}


def test_a_state_of_several_sequences_is_refused(bundle: Callable[[str], Path]) -> None:
    with load(bundle("cpu")) as session:
        data = session.manifest.to_dict()
    for tensor in (*data["decoder"]["graph"]["inputs"], *data["decoder"]["graph"]["outputs"]):
        if tensor["name"].endswith("0.conv"):
            tensor["shape"][0] = 2**24
    with pytest.raises(ManifestError, match=r"past\.0\.conv has 16777216 sequences; a state has one"):
        Manifest.from_dict(data)


def test_an_input_that_the_manifest_leaves_out_is_refused(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle("cpu"), tmp_path / "bundle"))
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    decoder, name = data["decoder"], "past.0.conv"
    decoder["graph"]["inputs"] = [tensor for tensor in decoder["graph"]["inputs"] if tensor["name"] != name]
    del decoder["roles"][name]
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with load(folder) as session, pytest.raises(GraphError, match=r"takes past\.0\.conv, which the manifest does not declare"):
        session.decoder()


def test_inspect_counts_the_states(leanvlm: Command, bundle: Callable[[str], Path]) -> None:
    result = leanvlm("inspect", bundle("cpu"))
    assert "2 layers, 4 KV heads of 64, 4 states of other layers, context" in result.stdout


def test_a_state_that_is_not_finite_is_an_error(bundle: Callable[[str], Path]) -> None:
    with load(bundle("cpu")) as session:
        (encoded,) = session.encode_images([pictures()[0]], 6)
        sequence = session.decoder().sequence(64)
        prompt = session.prompt([1, 2], [])
        sequence.load(prompt)
        sequence.prefill()
        cache: Any = sequence.cache
        state = cache._states[0][1]
        state.update_inplace(np.full(state.shape(), np.nan, np.float32))
        with pytest.raises(BackendError, match="maximum is nan"):
            sequence.step(encoded.crops[0].embeddings[0], 2).greedy()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_gates_keep_their_weights_where_others_are_quantised(
    checkpoint: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export compares with a checkpoint of which all but them are quantised."""
    sizes = tiny_sizes.sizes(checkpoint)[:1]
    export(ExportConfig(str(checkpoint), (6,), tmp_path / "out", precision=precision, image_sizes=sizes))
    monkeypatch.setattr(rounding, "DENSE", ())
    with pytest.raises(VerificationError, match="decoder at budget"):
        export(ExportConfig(str(checkpoint), (6,), tmp_path / "again", precision=precision, image_sizes=sizes))


def rewritten(
    checkpoint: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor], **more: torch.Tensor
) -> Path:
    """Copy a checkpoint with other weights."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(checkpoint / "model.safetensors")
    save_file(
        {**{name: change(name, weight).contiguous() for name, weight in weights.items()}, **more}, folder / "model.safetensors",
        metadata={"format": "pt"},
    )  # fmt: skip
    return folder


def test_weights_in_half_precision_are_widened_before_they_are_exponentiated(checkpoint: Path, tmp_path: Path) -> None:
    """As transformers does; and a convolution that its module does not call is widened for the comparison, too."""
    narrow = rewritten(checkpoint, tmp_path / "bf16", lambda name, weight: weight.to(torch.bfloat16))
    sizes = tiny_sizes.sizes(narrow)[:1]
    export(ExportConfig(str(narrow), (6,), tmp_path / "out", image_sizes=sizes))
    original = SizedOriginal.open(narrow)
    with load(tmp_path / "out") as session:
        height, width = session.manifest.crops.shapes[0].pixels
        picture = pictures()[0].resize((width, height))
        wanted = original.generate(original.inputs(QUESTIONS[0], picture))
        options = {"max_new_tokens": NEW_TOKENS, "ignore_end": True, "budget": max(session.manifest.budgets)}
        assert list(session.generate(QUESTIONS[0], [picture], **options).token_ids) == wanted


def test_layers_that_transformers_passes_over_are_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    """Those that guess several tokens at once; others are refused as ever."""
    more = {"mtp.layers.0.mlp.up_proj.weight": torch.zeros(4, 4)}
    known = rewritten(checkpoint, tmp_path / "known", lambda name, weight: weight, **more)
    export(ExportConfig(str(known), (6,), tmp_path / "out", image_sizes=tiny_sizes.sizes(known)[:1]))
    unknown = rewritten(checkpoint, tmp_path / "unknown", lambda name, weight: weight, stray=torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"unexpected 1 weight.*stray"):
        export(ExportConfig(str(unknown), (6,), tmp_path / "never"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_types", ["linear_attention"] * 4, "layer_types .* is not supported"),
        ("layer_types", ["full_attention"] * 3, "layer_types .* is not supported"),
        ("layer_types", ["linear_attention", "full_attention", "sliding_attention", "full_attention"], "layer_types"),
        ("hidden_act", "gelu", "hidden_act 'gelu' is not supported for a 'qwen3_5_text'; it must be silu"),
        ("linear_num_value_heads", 3, "linear_num_value_heads 3 is not a multiple of linear_num_key_heads 2"),
        ("linear_conv_kernel_dim", 10**9, "linear_conv_kernel_dim"),
    ],
)
def test_layers_that_are_not_written_are_refused(checkpoint: Path, field: str, value: Any, message: str) -> None:
    opened = open_checkpoint(ExportConfig(str(checkpoint)))
    object.__setattr__(opened.config.text_config, field, value)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
        opened.family.describe(opened.config)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_is_refused_before_the_work(checkpoint: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"a 'qwen3_5_text' decoder is not written for {target}; .*: cpu, cuda"):
        export(ExportConfig(str(checkpoint), (6,), tmp_path / "out", target=target))
    assert list(tmp_path.iterdir()) == []


def test_an_old_model_builder_is_named(checkpoint: Path) -> None:
    text = open_checkpoint(ExportConfig(str(checkpoint))).config.text_config
    with pytest.raises(UnsupportedModelError, match=r"writes no 'qwen3_5_text' decoder: pip install -U onnxruntime-genai"):
        genai._builder_class(SimpleNamespace(Qwen3Model=object), text)
