"""The bias before an activation as one more row of the weights.

    x ─ MatMul (W) ─ Add (b) ─ QuickGelu          [x 1 … 1] ─ MatMul (W over b over 0) ─ QuickGelu

ONNX Runtime's CUDA provider first writes a bias into every row of a product's result and then adds the product to it: on an
H200 9.5 us for CLIP-L's 577 x 4096, as long as the product itself. Widening x by eight ones takes 2 us. (For the other
biases of a block no such kernel runs: they ride in the attention and in the norms.)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from leanvlm.exporter.passes.pattern import Array, array, constant, finish, lazy_constant, linear, replace_value

# Tensor cores want rows of whole 16 bytes.
COLUMNS = 8


def fold_bias_columns(model: ir.Model) -> int:
    """Fold the bias of every linear map before a QuickGelu in place; return how many were folded."""
    return finish(model, sum(_fold(model.graph, node) for node in list(model.graph)))


def _fold(graph: ir.Graph, node: ir.Node) -> bool:
    found = linear(node.inputs[0]) if node.op_type == "QuickGelu" else None
    if found is None or found.x.shape is None or len(found.x.shape) != 3:
        return False
    old, name, (rows, columns) = node.inputs[0], found.product.name or "", found.shape
    assert old is not None

    def widened() -> Array:
        weight, zeros = found.read_weight(), np.zeros((COLUMNS - 1, columns))
        return np.concatenate([weight, array(found.bias)[None], zeros.astype(weight.dtype)])

    pads = constant(graph, "bias_column_pads", np.array([0, 0, 0, 0, 0, COLUMNS], np.int64))
    one = constant(graph, "bias_column_one", np.array(1, found.dtype.numpy()))
    pad = ir.node("Pad", [found.x, pads, one], name=f"{name}/Pad")
    weight = lazy_constant(graph, f"{name}/weight", found.dtype, (rows + COLUMNS, columns), widened)
    product = ir.node("MatMul", [pad.outputs[0], weight], name=name)
    graph.insert_before(node, [pad, product])
    replace_value(old, product.outputs[0])
    return True
