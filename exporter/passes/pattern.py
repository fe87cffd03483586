"""Small questions to a graph that the fusing passes share, and the one way in which they replace a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

Array = npt.NDArray[Any]
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Linear:
    """A value that is x W + b: the input x, W (in, out) or transposed, b (out,), and the product's node."""

    x: ir.Value
    weight: ir.Value
    transposed: bool
    bias: ir.Value
    product: ir.Node

    @property
    def dtype(self) -> ir.DataType:
        """Of weight and bias."""
        assert self.weight.const_value is not None
        return self.weight.const_value.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        assert self.weight.const_value is not None
        rows, columns = self.weight.const_value.shape.numpy()
        return (columns, rows) if self.transposed else (rows, columns)

    def read_weight(self) -> Array:
        """Return W (in, out)."""
        weight = array(self.weight)
        return weight.T if self.transposed else weight


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def is_constant(value: ir.Value | None, rank: int | None = None) -> bool:
    """Whether a value is known at export, and has `rank` axes."""
    if value is None or value.const_value is None:
        return False
    return rank is None or len(value.const_value.shape) == rank


def array(value: ir.Value) -> Array:
    """Return a constant's values."""
    assert value.const_value is not None
    return value.const_value.numpy()


def linear(value: ir.Value | None) -> Linear | None:
    """Recognise `MatMul(x, W) + b` with constant W and b; W may stand behind a transposition of its own."""
    add = producer(value, "Add")
    product = producer(add.inputs[0], "MatMul") if add is not None else None
    if add is None or product is None or not is_constant(add.inputs[1], rank=1):
        return None
    x, weight, bias = product.inputs[0], product.inputs[1], add.inputs[1]
    turned = producer(weight, "Transpose")
    source = turned.inputs[0] if turned is not None else weight
    if x is None or source is None or bias is None or not is_constant(source, rank=2):
        return None
    return Linear(x, source, turned is not None, bias, product)


def lazy_constant(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], make: Callable[[], Array]
) -> ir.Value:
    """Add a constant that is computed when it is written, so that packed weights are never all in memory.

    Args:
        graph: Gets the constant.
        name: Its name.
        dtype: Of its elements.
        shape: Of the array that `make` returns.
        make: Returns it.
    """

    def tensor() -> ir.TensorProtocol:
        made = np.ascontiguousarray(make())
        assert made.shape == shape, (name, made.shape, shape)
        return ir.Tensor(made, name=name)

    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(tensor, dtype=dtype, shape=ir.Shape(shape), name=name)
    graph.register_initializer(value)
    return value


def constant(graph: ir.Graph, name: str, values: Array) -> ir.Value:
    """Add a small constant; the same name and type give the one that is there."""
    name = f"{name}.{values.dtype.name}"
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(ir.DataType.from_numpy(values.dtype)))
    value.const_value = ir.Tensor(values, name=name)
    graph.register_initializer(value)
    return value


def contrib_node(
    op_type: str, inputs: list[ir.Value | None], attributes: dict[str, Any], name: str, outputs: int = 1
) -> ir.Node:
    """Return a node of ONNX Runtime's own operators."""
    return ir.node(op_type, inputs, attributes, domain=CONTRIB, num_outputs=outputs, name=name)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every user of `old` use `new`, which takes over its type, and its name if it is an output of the graph."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def finish(model: ir.Model, changed: int) -> int:
    """Drop what nothing uses any more and declare ONNX Runtime's operators; return `changed`."""
    if changed:
        model.graph.opset_imports[CONTRIB] = 1
        RemoveUnusedNodesPass()(model)
    return changed
