"""Graph passes on small graphs, drawn node by node: where each fires, and where it must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass
from onnx_models import assert_equal, run, types
from towers import ATTENTION, BATCHES, MULTI_HEAD, QUICK_GELU, SKIP_NORM, Array

from leanvlm.exporter.passes.attention import fuse_attention
from leanvlm.exporter.passes.bias_column import fold_bias_columns
from leanvlm.exporter.passes.norm_types import widen_norm_inputs
from leanvlm.exporter.passes.quick_gelu import fuse_quick_gelu
from leanvlm.exporter.passes.simplified_norm import simplify_norms
from leanvlm.exporter.passes.skip_layer_norm import fuse_skip_layer_norm
from leanvlm.exporter.targets import TARGETS

Pass = Callable[[ir.Model], int]


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
        for index, value in enumerate(outputs):
            value.name, value.type = f"out{index}", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            [*self.inputs.values()], [*outputs], nodes=self.nodes, initializers=self.constants,
            opset_imports={"": TARGETS["cuda"].opset}, name="sketch",
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
    """Return attention of 3 heads of width 8 over 5 positions, with projections of the inputs that `sources` names."""
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


def squares(summed: str) -> ir.Model:
    """Return root mean square normalisation over a sum of x and what `summed` names."""
    sketch = Sketch(x=("B", 5, 24), y=("B", 5, 24))
    one, other = sketch.inputs["x"], sketch.inputs["y"]
    total = {
        "nothing": lambda: one,
        "residual": lambda: sketch.node("Add", one, other),
        "linear": lambda: sketch.node("Add", one, sketch.linear(other, 24, 24)),
    }[summed]()
    return sketch.model(sketch.node("RMSNormalization", total, sketch.weights(24), axis=-1, epsilon=1e-3))


def windows() -> ir.Model:
    """Return attention in windows of 3 of 6 rows, whose heads (B * 2, 3, 2, 12) come from an image's (B, 6, 24)."""
    sketch = Sketch(x=("B", 6, 24))
    split = sketch.constant(np.array([-1, 3, 2, 12], np.int64))
    heads = [sketch.node("Reshape", sketch.inputs["x"], split) for _ in "qkv"]
    mixed = sketch.node("Attention", *(sketch.node("Transpose", one, perm=(0, 2, 1, 3)) for one in heads))
    turned = sketch.node("Transpose", mixed, perm=(0, 2, 1, 3))
    return sketch.model(sketch.node("Reshape", turned, sketch.constant(np.array([-1, 6, 24], np.int64))))


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
    "skip_layer_norm: a residual of one position": (fuse_skip_layer_norm, lambda: normalised("residual", y=("B", 1, 24))),
    "skip_layer_norm: a residual of one image": (fuse_skip_layer_norm, lambda: normalised("residual", x=(1, 5, 24))),
    "skip_layer_norm: a constant of one position": (fuse_skip_layer_norm, lambda: normalised("constant", constant=(1, 24))),
    "skip_layer_norm: four axes": (
        fuse_skip_layer_norm, lambda: normalised("residual", x=("B", 2, 5, 24), y=("B", 2, 5, 24)),
    ),
    "bias_column: two axes": (fold_bias_columns, lambda: with_quick_gelu(shape=("B",))),
    "norm_types: one type": (widen_norm_inputs, lambda: root_mean_square(ir.DataType.FLOAT)),
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
    "attention: of one input": (fuse_attention, self_attention, {ATTENTION: 1, MULTI_HEAD: 0, "MatMul": 0}),
    "attention: weights behind transpositions": (
        fuse_attention, lambda: self_attention(transposed=True), {ATTENTION: 1, MULTI_HEAD: 0, "Transpose": 0},
    ),
    "attention: a scale of its own": (fuse_attention, lambda: self_attention(scale=0.7), {ATTENTION: 1, MULTI_HEAD: 0}),
    "attention: keys of another input": (
        fuse_attention, lambda: self_attention("xyx"), {ATTENTION: 0, MULTI_HEAD: 1, "MatMul": 3},
    ),
    "attention: queries of another input": (
        fuse_attention, lambda: self_attention("yxx"), {ATTENTION: 0, MULTI_HEAD: 1, "MatMul": 3},
    ),
    "attention: keys are read elsewhere": (
        fuse_attention, lambda: self_attention(keys_read=True), {ATTENTION: 0, MULTI_HEAD: 1, "MatMul": 3},
    ),
    "attention: keys without a bias": (
        fuse_attention, lambda: self_attention(bias=(True, False, True)), {ATTENTION: 0, MULTI_HEAD: 1, "MatMul": 3},
    ),
    "quick_gelu: a factor of its own": (fuse_quick_gelu, lambda: gated(factor=0.9), {QUICK_GELU: 1, "Mul": 0}),
    "quick_gelu: the factor has an axis": (fuse_quick_gelu, lambda: gated(factor=[1.5]), {QUICK_GELU: 1, "Mul": 0}),
    "skip_layer_norm: two tensors": (fuse_skip_layer_norm, lambda: normalised("residual"), {SKIP_NORM: 1, "Add": 0}),
    "skip_layer_norm: position embeddings": (fuse_skip_layer_norm, lambda: normalised("constant"), {SKIP_NORM: 1, "Add": 0}),
    "skip_layer_norm: a bias before the sum": (fuse_skip_layer_norm, lambda: normalised("linear"), {SKIP_NORM: 1, "Add": 0}),
    "skip_layer_norm: the bias on the other side": (
        fuse_skip_layer_norm, lambda: normalised("linear first"), {SKIP_NORM: 1, "Add": 1},
    ),
    "skip_layer_norm: the sum is read elsewhere": (
        fuse_skip_layer_norm, lambda: normalised("linear", sum_read=True), {SKIP_NORM: 1, "Add": 0},
    ),
    "skip_layer_norm: root mean squares": (
        fuse_skip_layer_norm, lambda: squares("residual"), {"com.microsoft.SkipSimplifiedLayerNormalization": 1, "Add": 0},
    ),
    "skip_layer_norm: root mean squares behind a bias": (
        fuse_skip_layer_norm, lambda: squares("linear"), {"com.microsoft.SkipSimplifiedLayerNormalization": 1, "Add": 0},
    ),
    "simplified_norm: no sum": (
        simplify_norms, lambda: squares("nothing"), {"SimplifiedLayerNormalization": 1, "RMSNormalization": 0},
    ),
    "attention: windows of a batch": (fuse_attention, windows, {ATTENTION: 0, MULTI_HEAD: 1, "Transpose": 0}),
    "bias_column: a bias": (fold_bias_columns, with_quick_gelu, {QUICK_GELU: 1, "Pad": 1, "Add": 0}),
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


def root_mean_square(read: ir.DataType) -> ir.Model:
    """Return a norm whose scale is fp32, of an input in a type."""
    sketch = Sketch(x=("B", 5, 24))
    x = sketch.node("Cast", sketch.inputs["x"], to=read)
    return sketch.model(sketch.node("RMSNormalization", x, sketch.weights(24), epsilon=1e-6))


def test_a_norm_reads_the_type_of_its_scale() -> None:
    """ONNX Runtime does not run it as it is."""
    model = root_mean_square(ir.DataType.FLOAT16)
    assert widen_norm_inputs(model) == 1
    scale = next(iter(model.graph.initializers.values())).const_value
    assert scale is not None
    for batch in BATCHES:
        feeds = feeds_for(model, batch)
        x = feeds["x"].astype(np.float16).astype(np.float64)
        wanted = x / np.sqrt((x**2).mean(axis=2, keepdims=True) + 1e-6) * scale.numpy()
        assert_equal(run(model, feeds), {"out0": wanted.astype(np.float32)})


def test_outputs_keep_their_names() -> None:
    sketch = Sketch(x=("B", 5, 24), y=("B", 5, 24))
    total = sketch.node("Add", sketch.inputs["x"], sketch.inputs["y"])
    norm = sketch.node("LayerNormalization", total, sketch.weights(24), sketch.weights(24))
    model = sketch.model(norm, total, sketch.node("Sigmoid", total), bare=True)
    names = [value.name for value in model.graph.outputs]
    assert fuse_skip_layer_norm(model) == 1
    assert [value.name for value in model.graph.outputs] == names
