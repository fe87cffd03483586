"""The graphs that resize a picture where the vision graph runs, equal to Pillow to the level: one for each order of the axes.

| direction | name | dtype | shape | meaning |
|---|---|---|---|---|
| in | `levels` | uint8 | (G, P, C) | (1, H W, 3) as a picture is decoded, or (3, H W, 1) as these graphs leave it |
| in | `size` | int64 | (3,) | 3, H, W |
| in | `rows_shape` | int64 | (2,) | 3 h, H |
| in | `rows_index` | int32 | (3 h, T) | source rows under the filter, `runtime/taps.py` |
| in | `rows_weights` | float32 | (3 h, T) | the parts of their weights |
| in | `columns_shape` | int64 | (2,) | 3 w, W |
| in | `columns_index` | int32 | (3 w, U) | as for the rows |
| in | `columns_weights` | float32 | (3 w, U) | as for the rows |
| in | `grid` | int64 | (5,) | 3, rows of tiles, their height, columns of tiles, their width |
| out | `crops` | uint8 | (rows, columns, 3, height, width) | the tiles |

The weights become a matrix that is mostly zeros, for each axis one product. To gather what is under the filter would be a tenth
of the arithmetic, and ten times the memory traffic, which a GPU has less of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

Axis = Literal["width", "height"]
AXES: tuple[Axis, ...] = ("width", "height")
OPSET = 18
HALF = 32
"""Half a level, as a number of 2^16."""


def resize_file(first: Axis) -> str:
    """Return the name of the graph that resizes an axis first."""
    return f"resize_{first}_first.onnx"


def write_resize_graph(folder: Path, first: Axis) -> ir.Graph:
    """Write the graph that resizes an axis first into a folder and return it."""
    writer = _Writer()
    levels = writer.input("levels", ("G", "P", "C"), ir.DataType.UINT8)
    size = writer.input("size", (3,), ir.DataType.INT64)
    matrices = {"height": writer.matrix("rows", "h", "T"), "width": writer.matrix("columns", "w", "U")}
    grid = writer.input("grid", (5,), ir.DataType.INT64)
    planes = writer.node("Reshape", writer.node("Transpose", levels, perm=[0, 2, 1]), size)
    found = writer.node("Cast", planes, to=ir.DataType.FLOAT.value)
    for axis in (first, *(axis for axis in AXES if axis != first)):
        found = writer.resized(found, axis, matrices[axis])
    tiles = writer.node("Transpose", writer.node("Reshape", found, grid), perm=[1, 3, 0, 2, 4])
    # Last, since its kernel alone asks nothing of the address that it writes to.
    crops = writer.node("Cast", tiles, to=ir.DataType.UINT8.value)
    crops.name, crops.shape, crops.type = "crops", ir.Shape(("R", "S", 3, "h", "w")), ir.TensorType(ir.DataType.UINT8)
    graph = ir.Graph(
        writer.inputs, [crops], nodes=writer.nodes, initializers=writer.constants, opset_imports={"": OPSET}, name="resize"
    )
    ir.save(ir.Model(graph, ir_version=10, producer_name="leanvlm"), folder / resize_file(first))
    return graph


class _Writer:
    """Collects a graph's inputs, nodes and constants."""

    def __init__(self) -> None:
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def input(self, name: str, shape: tuple[int | str, ...], dtype: ir.DataType) -> ir.Value:
        self.inputs.append(ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype)))
        return self.inputs[-1]

    def node(self, op: str, *inputs: ir.Value, outputs: int = 1, **attributes: int | list[int] | ir.Tensor[Any]) -> ir.Value:
        return self.split(op, *inputs, outputs=outputs, **attributes)[0]

    def split(
        self, op: str, *inputs: ir.Value, outputs: int, **attributes: int | list[int] | ir.Tensor[Any]
    ) -> tuple[ir.Value, ...]:
        made = ir.node(op, list(inputs), attributes, num_outputs=outputs, name=f"/preprocess/{op}_{len(self.nodes)}")
        self.nodes.append(made)
        return tuple(made.outputs)

    def constant(self, value: float) -> ir.Value:
        made = ir.Value(name=f"constant_{len(self.constants)}", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.FLOAT))
        made.const_value = ir.Tensor(np.array(value, np.float32), name=made.name)
        self.constants.append(made)
        return made

    def matrix(self, name: str, size: str, count: str) -> ir.Value:
        """Return the matrix (3 outputs, source) of an axis, from its weights."""
        shape = self.input(f"{name}_shape", (2,), ir.DataType.INT64)
        index = self.input(f"{name}_index", (f"3{size}", count), ir.DataType.INT32)
        weights = self.input(f"{name}_weights", (f"3{size}", count), ir.DataType.FLOAT)
        zeros = self.node("ConstantOfShape", shape, value=ir.Tensor(np.zeros(1, np.float32)))
        return self.node("ScatterElements", zeros, index, weights, axis=1)

    def resized(self, planes: ir.Value, axis: Axis, matrix: ir.Value) -> ir.Value:
        """Return planes (3, H, W) of whole numbers with an axis resized, rounded and clipped."""
        if axis == "width":
            sums = self.node("MatMul", planes, self.node("Transpose", matrix, perm=[1, 0]))
        else:
            sums = self.node("MatMul", matrix, planes)
        high, middle, low = self.split("Split", sums, outputs=3, axis=2 if axis == "width" else 1, num_outputs=3)
        # floor((2^16 a + 2^8 b + c) / 2^22), with nothing between that fp32 does not hold exactly.
        lower = self.node("Add", middle, self.node("Floor", low))
        lower = self.node("Floor", self.node("Mul", lower, self.constant(2.0**-8)))
        upper = self.node("Add", self.node("Add", high, self.constant(HALF)), lower)
        rounded = self.node("Floor", self.node("Mul", upper, self.constant(2.0**-6)))
        return self.node("Clip", rounded, self.constant(0.0), self.constant(255.0))
