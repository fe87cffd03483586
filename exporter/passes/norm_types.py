"""Widen what a norm reads to the type of its scale: the operator may mix them, but engines refuse it.

    x (fp16), scale (fp32) -> RMSNormalization (fp32)    becomes    x -> Cast -> RMSNormalization

A norm that is computed in fp32, scale and all, is written so in half precision (Gemma's).
"""

from __future__ import annotations

import onnx_ir as ir


def widen_norm_inputs(model: ir.Model) -> int:
    """Cast the input of every RMSNormalization whose scale has another type, in place; return how many were cast."""
    changed = 0
    for node in list(model.graph):
        read, scale = (node.inputs[0], node.inputs[1]) if node.op_type == "RMSNormalization" else (None, None)
        if read is None or scale is None or scale.dtype is None or read.dtype == scale.dtype:
            continue
        cast = ir.node("Cast", [read], {"to": scale.dtype}, name=f"{node.name}/Cast")
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.type = f"{node.outputs[0].name}_wide", read.shape, ir.TensorType(scale.dtype)
        node.replace_input_with(0, wide)
        model.graph.insert_before(node, cast)
        changed += 1
    return changed
