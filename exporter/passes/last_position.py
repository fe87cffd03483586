"""Which position of the prompt the logits belong to, as an input of the decoder.

    hidden ─ Gather (-1) ─ Unsqueeze ─ lm_head          hidden ─ Gather (last_position) ─ lm_head

The builder takes the last position. A prompt that is padded to the length of a captured graph ends before it.
"""

from __future__ import annotations

import onnx_ir as ir

GATHER = "/lm_head/prune/Gather"
LAST_POSITION = "last_position"


def add_last_position(model: ir.Model) -> int:
    """Give a decoder of the model builder the input `last_position` (1,) int64, in place; return 1, or 0 if it has none."""
    graph = model.graph
    gather = next((node for node in graph if node.name == GATHER), None)
    if gather is None:
        return 0
    (use,) = gather.outputs[0].uses()
    unsqueeze = use.node
    position = ir.Value(name=LAST_POSITION, shape=ir.Shape((1,)), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(position)
    gather.replace_input_with(1, position)
    ir.convenience.replace_all_uses_with(unsqueeze.outputs[0], gather.outputs[0])
    gather.outputs[0].shape = unsqueeze.outputs[0].shape
    graph.remove(unsqueeze, safe=True)
    return 1
