"""The TensorRT targets' graphs: the dialect they keep to, and their arithmetic against transformers, run by ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from PIL import Image
from prompts import text_prompt
from transformers import AutoModelForCausalLM, LlamaConfig

from leanvlm.exporter import ExportConfig, dialect, tolerances
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.decoders.portable import trace_decoder
from leanvlm.exporter.dialect import check_dialect, foreign_nodes, target_opset
from leanvlm.exporter.passes.levels_shape import shape_behind_cast
from leanvlm.exporter.passes.stage_names import name_by_layer
from leanvlm.exporter.passes.topk_count import fix_topk_counts
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.exporter.verify import probe_images
from leanvlm.runtime import load
from leanvlm.runtime.backends.portable import PortableCache
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.engines.profiles import Limits, usual_limits
from leanvlm.runtime.errors import UnsupportedModelError
from leanvlm.runtime.preprocess import preprocess

Array = npt.NDArray[Any]
HEADS, KV_HEADS, HEAD, WIDTH, LAYERS, VOCABULARY = 6, 3, 16, 96, 3, 80
CAPACITY, STEPS = 160, 32


@pytest.fixture(scope="module")
def llama() -> Any:
    """A random Llama with grouped queries and a head size that is not width over heads times one."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, intermediate_size=144, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.2 * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def half(llama: Any) -> Any:
    """The same in half precision."""
    return copy.deepcopy(llama).half()


Traced = Callable[[int, str], ir.Model]


@pytest.fixture(scope="module")
def traced(llama: Any, half: Any) -> Traced:
    """Traces the decoder in an opset and a dtype, each once."""
    models = {"float32": llama, "float16": half}
    return cache(lambda opset, dtype: trace_decoder(models[dtype], opset=opset, dtype=getattr(torch, dtype)))


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])


class Cached:
    """Runs a decoder graph as a runtime does, with caches of one size whose first rows are filled."""

    def __init__(self, session: onnxruntime.InferenceSession, capacity: int = CAPACITY) -> None:
        self.session, self.length = session, 0
        self.names = [i.name for i in session.get_inputs() if i.name.startswith("past_key")]
        # What was never written must not matter, large as it may be.
        self.caches = {name: np.full((1, KV_HEADS, capacity, HEAD), 1e3, np.float32) for name in self.names}

    def read(self, embeddings: Array, *, past: int, last: int | None = None) -> dict[str, Array]:
        """Read (S, D) at the next positions, giving the graph `past` rows of each cache."""
        count = len(embeddings)
        feeds = {
            "inputs_embeds": embeddings[None],
            "position_ids": np.arange(self.length, self.length + count)[None],
            "past_length": np.array([self.length]),
            "last_position": np.array([count - 1 if last is None else last]),
            **{name: cache[:, :, :past] for name, cache in self.caches.items()},
        }
        outputs = [value.name for value in self.session.get_outputs()]
        found = dict(zip(outputs, self.session.run(None, feeds), strict=True))
        for name, rows in self.caches.items():
            rows[:, :, self.length : self.length + count] = found[name.replace("past", "new", 1)]
        self.length += count if last is None else last + 1
        return found


@torch.no_grad()
def expected(llama: Any, embeddings: Array) -> Array:
    """The model's own logits (S, V)."""
    logits: Array = llama(inputs_embeds=torch.from_numpy(embeddings)[None]).logits[0].numpy()
    return logits


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("prompt", [1, 2, 90], ids=lambda count: f"prompt of {count}")
def test_prompt_and_steps_equal_the_model(llama: Any, traced: Traced, opset: int, prompt: int) -> None:
    """A prompt with an empty cache, then 32 single tokens over a cache that stays the same size."""
    cached = Cached(session_of(traced(opset, "float32")))
    embeddings = np.random.default_rng(prompt).normal(size=(prompt + STEPS, WIDTH)).astype(np.float32)
    wanted = expected(llama, embeddings)
    found = cached.read(embeddings[:prompt], past=0)
    for step in range(STEPS + 1):
        at = prompt - 1 + step
        np.testing.assert_allclose(found["logits"][0, 0], wanted[at], atol=tolerances.TINY_LOGITS)
        assert found["next_token"].item() == wanted[at].argmax()
        assert found["top_logit"].item() == found["logits"].max()
        if step < STEPS:
            found = cached.read(embeddings[at + 1 : at + 2], past=CAPACITY)


@pytest.mark.parametrize("opset", [20, 23])
def test_top_logit_shows_a_single_logit_that_is_nan(llama: Any, opset: int) -> None:
    damaged = copy.deepcopy(llama)
    with torch.no_grad():
        damaged.lm_head.weight[7, 3] = torch.nan
    embeddings = np.random.default_rng(7).normal(size=(3, WIDTH)).astype(np.float32)
    found = Cached(session_of(trace_decoder(damaged, opset=opset, dtype=torch.float32))).read(embeddings, past=0)
    assert np.isnan(found["logits"]).sum() == 1
    assert not np.isfinite(found["top_logit"]).any()


@pytest.mark.parametrize("past", [1, 64, CAPACITY], ids=lambda count: f"cache of {count}")
def test_sizes_of_the_cache_change_nothing(llama: Any, traced: Traced, past: int) -> None:
    cached = Cached(session_of(traced(20, "float32")))
    embeddings = np.random.default_rng(9).normal(size=(9, WIDTH)).astype(np.float32)
    wanted = expected(llama, embeddings)
    cached.read(embeddings[:1], past=0)
    one = cached.read(embeddings[1:2], past=past)
    np.testing.assert_allclose(one["logits"][0, 0], wanted[1], atol=tolerances.TINY_LOGITS)
    # Several at once behind others: a prompt in two parts.
    if past > 2:
        rest = cached.read(embeddings[2:], past=past)
        np.testing.assert_allclose(rest["logits"][0, 0], wanted[8], atol=tolerances.TINY_LOGITS)


def test_padding_behind_the_prompt_changes_nothing(llama: Any, traced: Traced) -> None:
    cached = Cached(session_of(traced(23, "float32")))
    embeddings = np.random.default_rng(4).normal(size=(12, WIDTH)).astype(np.float32)
    wanted = expected(llama, embeddings)
    padded = np.concatenate([embeddings[:10], np.full((6, WIDTH), 50, np.float32)])
    found = cached.read(padded, past=0, last=9)
    np.testing.assert_allclose(found["logits"][0, 0], wanted[9], atol=tolerances.TINY_LOGITS)
    found = cached.read(embeddings[10:11], past=CAPACITY)
    np.testing.assert_allclose(found["logits"][0, 0], wanted[10], atol=tolerances.TINY_LOGITS)


def test_half_precision_stays_a_number_where_everything_is_hidden(llama: Any, traced: Traced) -> None:
    session = session_of(traced(20, "float16"))
    feeds = {
        "inputs_embeds": np.random.default_rng(0).normal(size=(1, 5, WIDTH)).astype(np.float16),
        "position_ids": np.arange(5)[None],
        "past_length": np.array([0]),
        "last_position": np.array([4]),
        **{i.name: np.full((1, KV_HEADS, 40, HEAD), 100, np.float16) for i in session.get_inputs() if "past_k" in i.name},
    }
    (logits,) = session.run(["logits"], feeds)
    wanted = expected(llama, feeds["inputs_embeds"][0].astype(np.float32))[4]
    assert np.abs(logits[0, 0] - wanted).max() <= tolerances.LOGITS["fp16"] * np.abs(wanted).max()


def test_attention_is_one_operator_where_the_parser_knows_it(traced: Traced) -> None:
    def kinds(opset: int, dtype: str) -> set[str]:
        return {node.op_type for node in traced(opset, dtype).graph}

    assert "Attention" in kinds(23, "float16")
    # No kernel of TensorRT's does it in fp32.
    assert "Attention" not in kinds(23, "float32") | kinds(20, "float16")


# --- The dialect --------------------------------------------------------------------------------------------------------


def test_a_bundle_for_tensorrt_keeps_to_the_oldest_parsers_table(tensorrt_bundle: Path) -> None:
    manifest = read_manifest(tensorrt_bundle)
    graphs = [*manifest.vision, manifest.decoder.graph]
    assert len(graphs) == 3
    for graph in graphs:
        model = ir.load(tensorrt_bundle / graph.file)
        assert model.opset_imports == {"": 20}
        assert not model.functions
        nodes = list(model.graph.all_nodes())
        assert not [node.name for node in nodes if node.domain or node.op_type not in dialect.TENSORRT_10_3]
        assert list(foreign_nodes(model)) == []
        assert {node.name.split("/")[1] for node in nodes} <= {"vision", "project", "prune", "decoder"}
    assert manifest.decoder.cache == "appended"
    assert manifest.image.layout == "uint8"


def test_the_bundle_answers_on_the_processor_and_says_that_it_is_slow(tensorrt_bundle: Path, sample_image: Path) -> None:
    with pytest.warns(UserWarning, match="a bundle for tensorrt runs on cpu"):
        session = load(tensorrt_bundle, device="cpu")
    with session:
        answer = session.generate("What is below the green ring?", [sample_image])
        assert answer.text == "a yellow hexagon"
        again = session.generate("What is below the green ring?", [sample_image], max_new_tokens=90, ignore_end=True)
        assert again.token_ids[: len(answer.token_ids)] == answer.token_ids


def graph_of(build: Callable[[ir.Value], list[ir.Node]], dtype: ir.DataType = ir.DataType.FLOAT, opset: int = 20) -> ir.Model:
    value = ir.Value(name="x", shape=ir.Shape((2, 6)), type=ir.TensorType(dtype))
    nodes = build(value)
    for number, node in enumerate(nodes):
        node.name = f"n{number}"
    graph = ir.Graph([value], list(nodes[-1].outputs), nodes=nodes, opset_imports={"": opset}, name="g")
    return ir.Model(graph, ir_version=10)


def constant(array: Array) -> ir.Value:
    return ir.Value(name="c", const_value=ir.tensor(array), shape=ir.Shape(array.shape))


@pytest.mark.parametrize(
    ("build", "dtype", "message"),
    [
        (lambda x: [ir.node("FusedMatMul", [x, x], domain="com.microsoft")], "FLOAT", "operator com.microsoft.FusedMatMul"),
        (lambda x: [ir.node("NonZero", [x])], "FLOAT", "operator NonZero"),
        (lambda x: [ir.node("Attention", [x, x, x])], "FLOAT", "operator Attention"),
        (lambda x: [ir.node("Clip", [x])], "INT64", "Clip of INT64"),
        (lambda x: [ir.node("Shape", [x])], "UINT8", "Shape of UINT8"),
        (lambda x: [ir.node("ReduceSum", [x, x])], "INT64", "the axes of ReduceSum must be a constant"),
        (lambda x: [ir.node("TopK", [x, x])], "INT64", "TopK must sort, with a constant number"),
        (lambda x: [ir.node("TopK", [x, constant(np.array([4000]))])], "FLOAT", "under 3840"),
        (lambda x: [ir.node("TopK", [x, constant(np.array([2]))], {"sorted": 0})], "FLOAT", "TopK must sort"),
    ],
)
def test_what_the_parser_refuses_is_named(build: Any, dtype: str, message: str) -> None:
    model = graph_of(build, ir.DataType[dtype])
    with pytest.raises(UnsupportedModelError, match=f"g.onnx cannot be written for TensorRT: n0: .*{message}"):
        check_dialect(model, "g.onnx")


def test_newer_parsers_take_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graph_of(lambda x: [ir.node("Attention", [x, x, x])], opset=23)
    check_dialect(model, "g.onnx")
    for found, opset in ((None, 20), ((10, 3), 20), ((10, 13), 20), ((10, 14), 23), ((11, 0), 23)):
        monkeypatch.setattr(dialect, "installed_tensorrt", lambda found=found: found)
        assert target_opset("tensorrt") == opset
        assert target_opset("tensorrt-rtx") == 23


def test_shapes_are_asked_of_the_cast_pixels() -> None:
    def build(x: ir.Value) -> list[ir.Node]:
        shape, cast = ir.node("Shape", [x]), ir.node("Cast", [x], {"to": 1})
        cast.outputs[0].dtype = ir.DataType.FLOAT
        return [shape, cast, ir.node("Reshape", [cast.outputs[0], shape.outputs[0]])]

    model = graph_of(build, ir.DataType.UINT8)
    assert shape_behind_cast(model) == 1
    assert [node.op_type for node in model.graph] == ["Cast", "Shape", "Reshape"]
    assert list(foreign_nodes(model)) == []
    assert shape_behind_cast(graph_of(build, ir.DataType.FLOAT)) == 0


def test_a_computed_number_of_topk_becomes_a_constant() -> None:
    def build(x: ir.Value) -> list[ir.Node]:
        shape = ir.node("Shape", [x])
        count = ir.node("Gather", [shape.outputs[0], constant(np.array([1]))])
        top = ir.node("TopK", [x, count.outputs[0]], {"axis": 1}, num_outputs=2)
        top.outputs[0].shape = ir.Shape((2, 6))
        return [shape, count, top]

    model = graph_of(build)
    assert fix_topk_counts(model) == 1
    assert [node.op_type for node in model.graph] == ["TopK"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [6]  # type: ignore[union-attr]
    assert fix_topk_counts(model) == 0


def test_a_decoders_nodes_are_named_by_their_layers(traced: Traced) -> None:
    model = traced(20, "float32").clone()
    count = name_by_layer(model)
    names = [str(node.name) for node in model.graph]
    assert count == len(names) == len(set(names))
    assert any(name.startswith("/decoder/layers:1/self_attn/q_proj/MatMul") for name in names)


@pytest.fixture(scope="module")
def built_in() -> Any:
    """The built-in checkpoint in fp32, as transformers runs it."""
    checkpoint = open_checkpoint(ExportConfig("demo"))
    return Reference(checkpoint, load_model(checkpoint).float())


def content(built_in: Any, picture: Path, length: int) -> np.ndarray:
    """What the decoder reads in use, (length, D): text, a picture's tokens, text, and so on.

    Long rows of random text, which it never met, make its logits so unstable that torch in half precision is 9 % off as well.
    """
    pixels = preprocess([Image.open(picture).convert("RGB")], built_in.checkpoint.image_spec)
    (image,) = built_in.vision(pixels).features.numpy()
    text = built_in.rows(np.random.default_rng(0).integers(4, 600, 24))
    rows = np.concatenate([text[:4], image, text[4:]])
    return np.tile(rows, (-(-length // len(rows)), 1))[:length]


@pytest.mark.parametrize(("prompt", "capacity"), [(1, 2048), (104, 137), (1024, 2048)])
def test_the_files_at_the_profiles_ends(
    tensorrt_bundle: Path, built_in: Any, sample_image: Path, prompt: int, capacity: int
) -> None:
    """Prompts of the least, a usual and the largest length, then 32 steps over caches up to the largest."""
    manifest = read_manifest(tensorrt_bundle)
    assert usual_limits(manifest, Limits()).prompt == 1024
    session = onnxruntime.InferenceSession(tensorrt_bundle / "decoder.onnx", providers=["CPUExecutionProvider"])
    cache = PortableCache(session, manifest.decoder, capacity)
    embeddings = content(built_in, sample_image, prompt + STEPS)
    wanted = built_in.logits(embeddings, np.arange(len(embeddings))[None], STEPS + 1)
    limit = tolerances.LOGITS["fp16"] * np.abs(wanted).max()
    cache.load(text_prompt(embeddings[:prompt]))
    scores = cache.prefill()
    for step in range(STEPS + 1):
        assert np.abs(scores.logits() - wanted[step]).max() <= limit
        if step < STEPS:
            scores = cache.step(embeddings[prompt + step], prompt + step)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_vision_file_at_its_profiles_ends(tensorrt_bundle: Path, built_in: Any, batch: int) -> None:
    manifest = read_manifest(tensorrt_bundle)
    images = [image.rotate(90 * turn) for turn in (0, 1) for image in probe_images()][:batch]
    with pytest.warns(UserWarning, match="runs on cpu"):
        session = load(tensorrt_bundle, device="cpu")
    with session:
        outputs = session.vision(64).run({"pixel_values": preprocess(images, manifest.image)})
    normal = preprocess(images, replace(manifest.image, layout="float32"))
    features = built_in.vision(normal).features.numpy()
    kept = np.take_along_axis(features, outputs["keep_indices"][:, :, None], axis=1)
    assert outputs["image_features"].shape == (batch, 64, manifest.decoder.hidden_size)
    found = outputs["image_features"].astype(np.float32)
    assert relative_difference(found, kept) <= tolerances.FEATURES["fp16"]
