"""Graph passes on a traced tower and on small graphs: where each fires, where it must not, and equal outputs throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import ShapeInferencePass
from onnx_models import assert_equal, run, types
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from leanvlm.exporter import tolerances
from leanvlm.exporter.graphs import OUTPUTS, VisionGraph
from leanvlm.exporter.models.llava import ClipTower
from leanvlm.exporter.passes import PASSES
from leanvlm.exporter.passes.attention import fuse_attention
from leanvlm.exporter.passes.bias_column import COLUMNS, fold_bias_columns
from leanvlm.exporter.passes.cut_stage import cut_after
from leanvlm.exporter.passes.pattern import CONTRIB
from leanvlm.exporter.passes.quick_gelu import fuse_quick_gelu
from leanvlm.exporter.passes.shared_weights import ALIGNMENT, save_sharing
from leanvlm.exporter.passes.skip_layer_norm import fuse_skip_layer_norm
from leanvlm.exporter.passes.stage_names import STAGES
from leanvlm.exporter.pruners import NoPruner, Pruner, parse
from leanvlm.exporter.reference import relative_difference
from leanvlm.exporter.trace import OPSET, trace
from leanvlm.runtime.preprocess import ImageSpec

Array = npt.NDArray[Any]
Pass = Callable[[ir.Model], int]

IMAGE_SIZE, PATCH, GRID, HEADS, BLOCKS, FEATURES = 56, 14, (4, 4), 4, 3, 48
TOKENS, KEEP = GRID[0] * GRID[1], 4
TOWER_OUTPUTS = ("hidden", "keys", "attention", "unsplit")
# The exporter folds a transposed weight of at most 8192 elements whoever uses it, and a larger one if it has one user. So
# the scored block's keys are computed twice in a tower of 64, and shared, as in a real one, in a tower of 96.
FOLDED, SHARED = 64, 96
# Traced with two images.
BATCHES = (1, 3)
IMAGE = ImageSpec(
    resize=None, crop=(IMAGE_SIZE, IMAGE_SIZE), image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28), layout="uint8"
)


def clip(width: int) -> Any:
    """Return a random CLIP transformer, no bias of which is zero and no scale of a norm one."""
    config = CLIPVisionConfig(
        hidden_size=width, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, intermediate_size=width + 64,
        image_size=IMAGE_SIZE, patch_size=PATCH, hidden_act="quick_gelu",
    )  # fmt: skip
    torch.manual_seed(width)
    model: Any = CLIPVisionModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(0, 0.2).add_(float("norm" in name and name.endswith("weight")))
    return getattr(model, "vision_model", model)


class TowerAlone(nn.Module):
    """A tower as the stage `vision` and nothing behind it, so that its four results are outputs."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.vision = tower

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run the tower."""
        found: tuple[Tensor, ...] = self.vision(pixel_values)
        return found


def apply(model: ir.Model, names: Sequence[str] | None = None) -> dict[str, int]:
    """Run passes of the target cuda in the order of its list, all by default, and return what each says it changed."""
    return {name: rewrite(model) for name, rewrite in PASSES["cuda"].items() if names is None or name in names}


def levels(batch: int) -> dict[str, Array]:
    """Return random images."""
    shape = (batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {"pixel_values": np.random.default_rng(batch).integers(0, 256, shape, dtype=np.uint8)}


def pixels(batch: int) -> dict[str, Array]:
    """Return random normalised images."""
    shape = (batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return {"pixel_values": np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)}


# --- A traced tower -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[FOLDED, SHARED], ids=["keys computed twice", "keys shared"])
def tower(request: pytest.FixtureRequest) -> tuple[int, ir.Model]:
    """The width and the traced tower of three blocks, the last of them scored; no test may change it."""
    module = TowerAlone(ClipTower(clip(request.param), BLOCKS, BLOCKS - 1)).eval()
    example = {"pixel_values": torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)}
    return request.param, trace(module, example, output_names=TOWER_OUTPUTS, opset=OPSET["cuda"])


# Pass to how many places it changes and what is left: Q, A and M stand for ONNX Runtime's QuickGelu, Attention and
# MultiHeadAttention, S for its SkipLayerNormalization. The first norm, and two in each block but the first, whose first norm
# has no sum before it.
PLACES = {"quick_gelu": 3, "attention": 3, "skip_layer_norm": 6, "bias_column": 3}
Q, A, M, S = (f"{CONTRIB}.{name}" for name in ("QuickGelu", "Attention", "MultiHeadAttention", "SkipLayerNormalization"))
LEFT: dict[tuple[str, int], dict[str, int]] = {
    ("quick_gelu", FOLDED): {Q: 3, "Sigmoid": 0},
    ("quick_gelu", SHARED): {Q: 3, "Sigmoid": 0},
    ("attention", FOLDED): {A: 3, M: 0, "Attention": 0},
    ("attention", SHARED): {A: 2, M: 1, "Attention": 0},
    ("skip_layer_norm", FOLDED): {S: 6, "LayerNormalization": 1},
    ("skip_layer_norm", SHARED): {S: 6, "LayerNormalization": 1},
    ("bias_column", FOLDED): {Q: 3, "Pad": 3},
    ("bias_column", SHARED): {Q: 3, "Pad": 3},
}


def prepared(tower: ir.Model, name: str) -> tuple[ir.Model, ir.Model]:
    """Return copies of a traced tower as it is before a pass of the list, and after it."""
    names = list(PASSES["cuda"])
    before, after = tower.clone(), tower.clone()
    apply(before, names[: names.index(name)])
    apply(after, names[: names.index(name)])
    return before, after


@pytest.mark.parametrize("name", PLACES)
def test_pass_fires_on_a_traced_tower(tower: tuple[int, ir.Model], name: str) -> None:
    width, traced = tower
    before, after = prepared(traced, name)
    assert PASSES["cuda"][name](after) == PLACES[name]
    left = types(after)
    assert {key: left[key] for key in LEFT[name, width]} == LEFT[name, width]
    assert after.graph.opset_imports[CONTRIB] == 1
    names = [node.name or "" for node in after.graph]
    assert all(path.split("/")[:2] == ["", "vision"] for path in names)
    assert len(set(names)) == len(names)
    for batch in BATCHES:
        assert_equal(run(after, pixels(batch)), run(before, pixels(batch)))


@pytest.mark.parametrize("name", PLACES)
def test_pass_finds_nothing_more_the_second_time(tower: tuple[int, ir.Model], name: str) -> None:
    _, after = prepared(tower[1], name)
    PASSES["cuda"][name](after)
    written = ir.to_proto(after).SerializeToString(deterministic=True)
    assert PASSES["cuda"][name](after) == 0
    assert ir.to_proto(after).SerializeToString(deterministic=True) == written


def test_names_and_metadata(tower: tuple[int, ir.Model]) -> None:
    """The passes that every target has change no result; each node gets a name, and no note of the exporter's is left."""
    plain = tower[1].clone()
    done = apply(plain, ["stage_names", "strip_metadata"])
    assert done["stage_names"] == len(plain.graph)
    assert done["strip_metadata"] > len(plain.graph)
    assert not any(node.metadata_props or node.doc_string for node in plain.graph)
    assert_equal(run(plain, pixels(3)), run(tower[1], pixels(3)))


def test_packed_weights_hold_the_projections(tower: tuple[int, ir.Model]) -> None:
    """Query, key and value side by side, and the bias under the weights of an activation, with zeros below."""
    width, traced = tower
    after, module = traced.clone(), clip(tower[0])
    apply(after)
    weights = {name: value.const_value.numpy() for name, value in after.graph.initializers.items() if value.const_value}
    attn, mlp = module.encoder.layers[0].self_attn, module.encoder.layers[0].mlp
    parts = (attn.q_proj, attn.k_proj, attn.v_proj)
    packed = torch.cat([part.weight.T for part in parts], dim=1).numpy()
    np.testing.assert_array_equal(weights["/vision/blocks/0/self_attn/Attention/weight"], packed)
    biases = torch.cat([part.bias for part in parts]).numpy()
    np.testing.assert_array_equal(weights["/vision/blocks/0/self_attn/Attention/bias"], biases)
    widened = weights["/vision/blocks/0/mlp/fc1/MatMul/weight"]
    np.testing.assert_array_equal(widened[:width], mlp.fc1.weight.T.numpy())
    np.testing.assert_array_equal(widened[width], mlp.fc1.bias.numpy())
    assert widened.shape == (width + COLUMNS, width + 64)
    assert not widened[width + 1 :].any()


# --- Small graphs -------------------------------------------------------------------------------------------------------


class Sketch:
    """A small graph that is built node by node, with random constants."""

    def __init__(self, **inputs: tuple[int | str, ...]) -> None:
        self.inputs = {name: self._value(name, shape, ir.DataType.FLOAT) for name, shape in inputs.items()}
        self.constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self._random = np.random.default_rng(7)

    @staticmethod
    def _value(name: str, shape: tuple[int | str, ...], dtype: ir.DataType) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))

    def constant(self, values: Any) -> ir.Value:
        """Add a constant: an array, a number, a list of integers."""
        array = np.asarray(values)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        value = self._value(f"c{len(self.constants)}", array.shape, ir.DataType.from_numpy(array.dtype))
        value.const_value = ir.Tensor(array, name=value.name)
        self.constants.append(value)
        return value

    def weights(self, *shape: int) -> ir.Value:
        """Add a random constant."""
        return self.constant(self._random.normal(0, 0.5, shape))

    def node(self, op_type: str, *inputs: ir.Value, name: str = "", **attributes: Any) -> ir.Value:
        """Add a node and return its first output."""
        made = ir.node(op_type, inputs, attributes, name=name or f"/vision/{op_type}_{len(self.nodes)}")
        self.nodes.append(made)
        return made.outputs[0]

    def linear(self, x: ir.Value, rows: int, columns: int, *, bias: bool = True, transposed: bool = False) -> ir.Value:
        """Add x W, plus a bias, W behind a transposition if wanted."""
        weight = self.weights(columns, rows) if transposed else self.weights(rows, columns)
        product = self.node("MatMul", x, self.node("Transpose", weight, perm=[1, 0]) if transposed else weight)
        return self.node("Add", product, self.weights(columns)) if bias else product

    def model(self, *outputs: ir.Value, bare: bool = False) -> ir.Model:
        """Return the model, with the shapes that ONNX infers; each output stands behind a node of its own unless `bare`."""
        outputs = outputs if bare else tuple(self.node("Identity", value) for value in outputs)
        for place, value in enumerate(outputs):
            value.name, value.type = f"out{place}", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [*self.inputs.values()], [*outputs], nodes=self.nodes, initializers=self.constants,
            opset_imports={"": OPSET["cuda"]}, name="sketch",
        )  # fmt: skip
        model = ir.Model(graph, ir_version=11)
        ShapeInferencePass()(model)
        return model


def feeds_for(model: ir.Model, batch: int) -> dict[str, Array]:
    """Return random inputs, with the free axis of size `batch`."""
    random = np.random.default_rng(batch)
    shapes = {value.name or "": value.shape for value in model.graph.inputs}
    return {
        name: random.standard_normal([axis if isinstance(axis, int) else batch for axis in shape or ()]).astype(np.float32)
        for name, shape in shapes.items()
    }


TURN = (0, 2, 1, 3)


def self_attention(
    sources: str = "xxx",
    *,
    mask: bool = False,
    keys_read: bool = False,
    bias: Sequence[bool] = (True, True, True),
    heads_of: Sequence[int] = (3, 3, 3),
    transposed: bool = False,
    turn: Sequence[int] = TURN,
    turn_back: Sequence[int] = TURN,
    merged: Sequence[int] = (-1, 5, 24),
    **attributes: Any,
) -> ir.Model:
    """Return attention of 3 heads of width 8 over 5 places, with projections of the inputs that `sources` names."""
    sketch = Sketch(x=("B", 5, 24), y=("B", 5, 24), mask=(5, 5))
    heads, projected = [], []
    for source, biased, count in zip(sources, bias, heads_of, strict=True):
        projected.append(sketch.linear(sketch.inputs[source], 24, 8 * count, bias=biased, transposed=transposed))
        split = sketch.node("Reshape", projected[-1], sketch.constant([-1, 5, count, 8]))
        heads.append(sketch.node("Transpose", split, perm=list(turn)))
    if mask:
        heads.append(sketch.inputs["mask"])
    attended = sketch.node("Attention", *heads, **attributes)
    back = sketch.node("Transpose", attended, perm=list(turn_back))
    read = [sketch.node("Sigmoid", projected[1])] if keys_read else []
    return sketch.model(sketch.node("Reshape", back, sketch.constant(merged)), *read)


def gated(
    of: str = "x",
    *,
    gate: str = "Sigmoid",
    factor: Any = 1.702,
    bias: bool = True,
    linear: bool = True,
    shape: tuple[int | str, ...] = ("B", 5),
) -> ir.Model:
    """Return x times a gate of a scaled x, behind a linear map; without a factor the gate is of x itself."""
    sketch = Sketch(x=(*shape, 24), y=(*shape, 16))
    x = sketch.linear(sketch.inputs["x"], 24, 16, bias=bias) if linear else sketch.inputs["y"]
    other = x if of == "x" else sketch.inputs["y"]
    scaled = other if factor is None else sketch.node("Mul", other, sketch.constant(factor))
    return sketch.model(sketch.node("Mul", x, sketch.node(gate, scaled)))


def with_quick_gelu(**options: Any) -> ir.Model:
    """Return the same with the activation fused, as `bias_column` finds it."""
    model = gated(**options)
    assert fuse_quick_gelu(model) == 1
    return model


def before_relu() -> ir.Model:
    """Return a linear map with a bias before another activation."""
    sketch = Sketch(x=("B", 5, 24))
    return sketch.model(sketch.node("Relu", sketch.linear(sketch.inputs["x"], 24, 16)))


def normalised(
    summed: str,
    *,
    axis: int = -1,
    bias: bool = True,
    sum_read: bool = False,
    x: tuple[int | str, ...] = ("B", 5, 24),
    y: tuple[int | str, ...] = ("B", 5, 24),
    constant: tuple[int, ...] = (5, 24),
) -> ir.Model:
    """Return layer normalisation over a sum of x and what `summed` names."""
    sketch = Sketch(x=x, y=y)
    one, other = sketch.inputs["x"], sketch.inputs["y"]
    total = {
        "nothing": lambda: one,
        "constant": lambda: sketch.node("Add", one, sketch.weights(*constant)),
        "residual": lambda: sketch.node("Add", one, other),
        "linear": lambda: sketch.node("Add", one, sketch.linear(other, 24, 24)),
        "linear first": lambda: sketch.node("Add", sketch.linear(other, 24, 24), one),
    }[summed]()
    shape = (24,) if axis in (-1, 2) else (5, 24)
    inputs = [total, sketch.weights(*shape), *([sketch.weights(*shape)] if bias else [])]
    norm = sketch.node("LayerNormalization", *inputs, axis=axis, epsilon=1e-3)
    return sketch.model(norm, *([sketch.node("Sigmoid", total)] if sum_read else []))


Case = tuple[Pass, Callable[[], ir.Model]]
UNTOUCHED: dict[str, Case] = {
    "attention: a fourth input is a mask": (fuse_attention, lambda: self_attention(mask=True)),
    "attention: heads are split in another way": (
        fuse_attention,
        lambda: self_attention(turn=(0, 1, 2, 3), turn_back=(0, 1, 2, 3)),
    ),
    "quick_gelu: the gate is of another value": (fuse_quick_gelu, lambda: gated(of="y")),
    "quick_gelu: no factor, which is SiLU": (fuse_quick_gelu, lambda: gated(factor=None)),
    "quick_gelu: a factor for each channel": (fuse_quick_gelu, lambda: gated(factor=np.linspace(1, 2, 16))),
    "quick_gelu: the gate is a tanh": (fuse_quick_gelu, lambda: gated(gate="Tanh")),
    "quick_gelu: the gate is GELU's error function": (fuse_quick_gelu, lambda: gated(gate="Erf")),
    "skip_layer_norm: no sum": (fuse_skip_layer_norm, lambda: normalised("nothing")),
    "skip_layer_norm: the sum is a bias's alone": (fuse_skip_layer_norm, lambda: normalised("constant", constant=(24,))),
    "skip_layer_norm: a constant of three axes": (fuse_skip_layer_norm, lambda: normalised("constant", constant=(1, 5, 24))),
    "skip_layer_norm: a norm without a bias": (fuse_skip_layer_norm, lambda: normalised("residual", bias=False)),
    "skip_layer_norm: a norm over two axes": (fuse_skip_layer_norm, lambda: normalised("residual", axis=1)),
    "bias_column: the linear map has no bias": (fold_bias_columns, lambda: with_quick_gelu(bias=False)),
    "bias_column: no linear map": (fold_bias_columns, lambda: with_quick_gelu(linear=False)),
    "bias_column: another activation": (fold_bias_columns, before_relu),
    "attention: causal": (fuse_attention, lambda: self_attention(is_causal=1)),
    "attention: scores are capped": (fuse_attention, lambda: self_attention(softcap=2.0)),
    "attention: fewer heads of keys": (fuse_attention, lambda: self_attention(heads_of=(3, 1, 1))),
    "attention: heads are merged in another order": (fuse_attention, lambda: self_attention(turn_back=(0, 2, 3, 1))),
    "attention: heads are merged to two axes": (fuse_attention, lambda: self_attention(merged=(-1, 24))),
    "skip_layer_norm: a residual of one place": (fuse_skip_layer_norm, lambda: normalised("residual", y=("B", 1, 24))),
    "skip_layer_norm: a residual of one image": (fuse_skip_layer_norm, lambda: normalised("residual", x=(1, 5, 24))),
    "skip_layer_norm: a constant of one place": (fuse_skip_layer_norm, lambda: normalised("constant", constant=(1, 24))),
    "skip_layer_norm: four axes": (
        fuse_skip_layer_norm, lambda: normalised("residual", x=("B", 2, 5, 24), y=("B", 2, 5, 24)),
    ),
    "bias_column: two axes": (fold_bias_columns, lambda: with_quick_gelu(shape=("B",))),
}  # fmt: skip


@pytest.mark.parametrize("reason", UNTOUCHED)
def test_pass_leaves_alone(reason: str) -> None:
    rewrite, make = UNTOUCHED[reason]
    model = make()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert rewrite(model) == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    run(model, feeds_for(model, 3))  # The case is a valid graph.


# What else a pass does not take away: values with another reader stay, and are the same.
REWRITTEN: dict[str, tuple[Pass, Callable[[], ir.Model], dict[str, int]]] = {
    "attention: of one input": (fuse_attention, self_attention, {A: 1, M: 0, "MatMul": 0}),
    "attention: weights behind transpositions": (
        fuse_attention, lambda: self_attention(transposed=True), {A: 1, M: 0, "Transpose": 0},
    ),
    "attention: a scale of its own": (fuse_attention, lambda: self_attention(scale=0.7), {A: 1, M: 0}),
    "attention: keys of another input": (fuse_attention, lambda: self_attention("xyx"), {A: 0, M: 1, "MatMul": 3}),
    "attention: queries of another input": (fuse_attention, lambda: self_attention("yxx"), {A: 0, M: 1, "MatMul": 3}),
    "attention: keys are read elsewhere": (fuse_attention, lambda: self_attention(keys_read=True), {A: 0, M: 1, "MatMul": 3}),
    "attention: keys without a bias": (
        fuse_attention, lambda: self_attention(bias=(True, False, True)), {A: 0, M: 1, "MatMul": 3},
    ),
    "quick_gelu: a factor of its own": (fuse_quick_gelu, lambda: gated(factor=0.9), {Q: 1, "Mul": 0}),
    "quick_gelu: the factor has an axis": (fuse_quick_gelu, lambda: gated(factor=[1.5]), {Q: 1, "Mul": 0}),
    "skip_layer_norm: two tensors": (fuse_skip_layer_norm, lambda: normalised("residual"), {S: 1, "Add": 0}),
    "skip_layer_norm: position embeddings": (fuse_skip_layer_norm, lambda: normalised("constant"), {S: 1, "Add": 0}),
    "skip_layer_norm: a bias before the sum": (fuse_skip_layer_norm, lambda: normalised("linear"), {S: 1, "Add": 0}),
    "skip_layer_norm: the bias on the other side": (
        fuse_skip_layer_norm, lambda: normalised("linear first"), {S: 1, "Add": 1},
    ),
    "skip_layer_norm: the sum is read elsewhere": (
        fuse_skip_layer_norm, lambda: normalised("linear", sum_read=True), {S: 1, "Add": 0},
    ),
    "bias_column: a bias": (fold_bias_columns, with_quick_gelu, {Q: 1, "Pad": 1, "Add": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", REWRITTEN)
def test_pass_rewrites(case: str) -> None:
    rewrite, make, wanted = REWRITTEN[case]
    before, after = make(), make()
    assert rewrite(after) == 1
    left = types(after)
    assert {key: left[key] for key in wanted} == wanted
    for batch in BATCHES:
        assert_equal(run(after, feeds_for(after, batch)), run(before, feeds_for(before, batch)))


def test_outputs_keep_their_names() -> None:
    sketch = Sketch(x=("B", 5, 24), y=("B", 5, 24))
    total = sketch.node("Add", sketch.inputs["x"], sketch.inputs["y"])
    norm = sketch.node("LayerNormalization", total, sketch.weights(24), sketch.weights(24))
    model = sketch.model(norm, total, sketch.node("Sigmoid", total), bare=True)
    names = [value.name for value in model.graph.outputs]
    assert fuse_skip_layer_norm(model) == 1
    assert [value.name for value in model.graph.outputs] == names


# --- Whole vision graphs ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vision:
    """A vision graph as a module, as traced and as fused for a GPU."""

    module: VisionGraph
    traced: ir.Model
    fused: ir.Model
    changed: Mapping[str, int]


@pytest.fixture(scope="module")
def visions() -> dict[int, Vision]:
    """Vision graphs over levels, one that keeps 4 of 16 tokens and an unpruned one, by their budget; nothing may change them.

    Their feature layer is the last but one, as in LLaVA-1.5.
    """
    model = clip(SHARED)
    torch.manual_seed(1)
    projector = nn.Sequential(nn.Linear(SHARED, FEATURES), nn.GELU(), nn.Linear(FEATURES, FEATURES)).requires_grad_(False)
    pruners: dict[int, Pruner] = {KEEP: parse("agile", keep=KEEP), TOKENS: NoPruner(TOKENS)}
    found = {}
    for budget, pruner in pruners.items():
        module = VisionGraph(ClipTower(model, BLOCKS - 1, BLOCKS - 2, IMAGE), projector, pruner, GRID).eval()
        example = {"pixel_values": torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)}
        traced = trace(module, example, output_names=OUTPUTS, opset=OPSET["cuda"])
        apply(traced, ["stage_names", "strip_metadata"])
        fused = traced.clone()
        found[budget] = Vision(module, traced, fused, apply(fused, list(PLACES)))
    return found


@pytest.mark.parametrize("budget", [KEEP, TOKENS])
def test_fused_vision_graph_equals_the_plain_one(visions: dict[int, Vision], budget: int) -> None:
    vision = visions[budget]
    assert dict(vision.changed) == {"quick_gelu": 2, "attention": 2, "skip_layer_norm": 4, "bias_column": 2}
    assert {(node.name or "").split("/")[1] for node in vision.fused.graph} == set(STAGES)
    for batch in BATCHES:
        wanted = run(vision.traced, levels(batch))
        assert wanted["keep_indices"].shape == (batch, budget)
        assert_equal(run(vision.fused, levels(batch)), wanted)
        assert_equal(run(vision.fused, levels(batch), optimise=True), wanted)


@pytest.mark.parametrize("budget", [KEEP, TOKENS])
def test_fused_vision_graph_equals_the_module(visions: dict[int, Vision], budget: int) -> None:
    feeds = levels(3)
    with torch.no_grad():
        wanted = visions[budget].module(torch.from_numpy(feeds["pixel_values"]))
    found = run(visions[budget].fused, feeds)
    np.testing.assert_array_equal(found["keep_indices"], wanted[1].numpy())
    assert relative_difference(found["image_features"], wanted[0].numpy()) <= tolerances.FEATURES["fp32"]
    np.testing.assert_allclose(found["attention"], wanted[6].numpy(), rtol=tolerances.ATTENTION)


def test_fused_graphs_of_several_budgets_store_their_weights_once(visions: dict[int, Vision], tmp_path: Path) -> None:
    sizes = {}
    for name, budgets in {"one": (KEEP,), "two": (KEEP, TOKENS)}.items():
        folder = tmp_path / name
        folder.mkdir()
        models = {f"vision_{budget}.onnx": visions[budget].fused.clone() for budget in budgets}
        save_sharing(models, folder, "vision.data")
        sizes[name] = (folder / "vision.data").stat().st_size
        for budget in budgets:
            path = folder / f"vision_{budget}.onnx"
            onnx.checker.check_model(path, full_check=True)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            outputs = session.run(list(OUTPUTS), levels(3))
            assert_equal(dict(zip(OUTPUTS, outputs, strict=True)), run(visions[budget].fused, levels(3)))
    packed = sum(value.const_value.nbytes for name, value in visions[KEEP].fused.graph.initializers.items()
                 if value.const_value is not None and name.startswith("/vision"))  # fmt: skip
    assert packed > 8 * ALIGNMENT
    assert packed < sizes["one"] == sizes["two"]


# --- Cuts ---------------------------------------------------------------------------------------------------------------


def among(outputs: Mapping[str, Array], wanted: Array) -> bool:
    """Whether one of the outputs is `wanted`."""
    near = tolerances.FEATURES["fp32"]
    return any(value.shape == wanted.shape and relative_difference(value, wanted) <= near for value in outputs.values())


@pytest.mark.parametrize("kind", ["traced", "fused"])
@pytest.mark.parametrize("budget", [KEEP, TOKENS])
def test_cuts_end_with_what_the_module_has_there(visions: dict[int, Vision], budget: int, kind: str) -> None:
    vision, feeds = visions[budget], levels(3)
    model: ir.Model = getattr(vision, kind)
    written = ir.to_proto(model).SerializeToString(deterministic=True)
    with torch.no_grad():
        hidden, _, attention, _ = vision.module.vision(torch.from_numpy(feeds["pixel_values"]))
        features = vision.module.project(hidden)
    cuts = {stage: cut_after(model, stage) for stage in STAGES}
    assert ir.to_proto(model).SerializeToString(deterministic=True) == written
    for place, (stage, cut) in enumerate(cuts.items()):
        assert {(node.name or "").split("/")[1] for node in cut.graph} == set(STAGES[: place + 1])
        assert [value.name for value in cut.graph.inputs] == ["pixel_values"]
        assert all(value.dtype is not None for value in cut.graph.outputs), stage
    found = {stage: run(cut, feeds) for stage, cut in cuts.items()}
    assert among(found["vision"], hidden.numpy())
    assert not among(found["vision"], features.numpy())
    assert among(found["project"], features.numpy())
    for stage in ("vision", "project"):
        np.testing.assert_allclose(found[stage]["attention"], attention.numpy(), rtol=tolerances.ATTENTION)
    assert_equal({name: found["prune"][name] for name in OUTPUTS}, run(model, feeds))
