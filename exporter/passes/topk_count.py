"""Write TopK's number as a constant where the exporter computes it from a shape that is fixed: TensorRT wants it so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def fix_topk_counts(model: ir.Model) -> int:
    """Replace computed numbers of TopK in place by those of its output's shape; return how many were replaced."""
    replaced = 0
    for node in model.graph:
        count = node.inputs[1] if node.op_type == "TopK" else None
        shape = node.outputs[0].shape
        if count is None or count.const_value is not None or shape is None:
            continue
        kept = shape[node.attributes.get_int("axis", -1)]
        if isinstance(kept, int):
            name = f"{node.outputs[0].name}_count"
            constant = ir.val(name, const_value=ir.tensor(np.array([kept], np.int64), name=name))
            model.graph.register_initializer(constant)
            node.replace_input_with(1, constant)
            replaced += 1
    if replaced:
        RemoveUnusedNodesPass()(model)
    return replaced
