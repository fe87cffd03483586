"""Products with constant weights of tower and projector as products of 8-bit levels.

    x ─ MatMul (W) ─ y                    x ─ MatMulNBits (levels of W, one scale a block) ─ y

ONNX Runtime's quantiser makes the levels; its kernel for processors rounds each row of x to 8 bits too, block by block while it
runs, so nothing is calibrated and the rows of a batch stay independent. The stage prune, products of two activations and
convolutions stay as they are.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from leanvlm.exporter.passes.pattern import (
    Array,
    array,
    contrib_node,
    finish,
    is_constant,
    lazy_constant,
    producer,
    replace_value,
)
from leanvlm.exporter.passes.stage_names import STAGES
from leanvlm.runtime.optional import require

BITS = 8
# Inputs that share a scale. See bench/LOG.md, "int8 vision on the processor".
BLOCK = 128
ROUNDED_STAGES = STAGES[:2]
# Activations are rounded to 8 bits.
ACCURACY_LEVEL = 4


def round_products(model: ir.Model) -> int:
    """Round the weights of every such product of a graph in place, whose nodes have their stage's names; return how many."""
    return finish(model, sum(_round(model.graph, node) for node in list(model.graph)))


def _round(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "MatMul" or (node.name or "").split("/")[1:2] not in [[stage] for stage in ROUNDED_STAGES]:
        return False
    x, weight = node.inputs
    # A weight that two products share stands behind a transposition.
    turned = producer(weight, "Transpose")
    weight = turned.inputs[0] if turned is not None else weight
    if weight is None or not is_constant(weight, rank=2) or is_constant(x):
        return False
    assert weight.const_value is not None
    sizes = weight.const_value.shape.numpy()
    rows, columns = sizes if turned is None else sizes[::-1]
    blocks, name = -(-rows // BLOCK), node.name or ""
    # Levels and scales are made when they are written, one after the other.
    made = functools.lru_cache(maxsize=1)(functools.partial(_quantised, weight, turned is not None))
    levels = lazy_constant(graph, f"{name}/levels", ir.DataType.UINT8, (columns, blocks, BLOCK), lambda: made()[0])
    scales = lazy_constant(graph, f"{name}/scales", ir.DataType.FLOAT, (columns, blocks), lambda: made()[1])
    attributes = {"K": rows, "N": columns, "bits": BITS, "block_size": BLOCK, "accuracy_level": ACCURACY_LEVEL}
    rounded = contrib_node("MatMulNBits", [x, levels, scales], attributes, name)
    graph.insert_before(node, rounded)
    replace_value(node.outputs[0], rounded.outputs[0])
    return True


def _quantised(weight: ir.Value, turned: bool) -> tuple[Array, Array]:
    """Return the levels (out, blocks, BLOCK) and scales (out, blocks) of a weight (in, out), or (out, in) if it is turned."""
    library = require("onnxruntime.quantization.matmul_nbits_quantizer", "export")
    values = array(weight)
    config = library.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=BITS)
    levels, scales, _ = library.DefaultWeightOnlyQuantizer(config).qbits_block_quant(
        np.ascontiguousarray(values.T if turned else values, np.float32)
    )
    return levels, scales
