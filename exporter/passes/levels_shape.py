"""Ask the converted pixels for their shape, not the levels: TensorRT takes uint8 as a graph's input and for a Cast alone."""

from __future__ import annotations

import onnx_ir as ir


def shape_behind_cast(model: ir.Model) -> int:
    """Let every Shape of a uint8 input read the input's Cast instead, in place; return how many do."""
    moved = 0
    for value in model.graph.inputs:
        if value.dtype != ir.DataType.UINT8:
            continue
        users = [node for node, _ in value.uses()]
        cast = next((node for node in users if node.op_type == "Cast"), None)
        for node in users:
            if cast is not None and node.op_type == "Shape":
                node.replace_input_with(0, cast.outputs[0])
                moved += 1
    if moved:
        model.graph.sort()
    return moved
