"""Drop what the exporter noted on each node and value: stack traces with the exporting machine's paths, half of a file."""

from __future__ import annotations

import onnx_ir as ir


def strip_metadata(model: ir.Model) -> int:
    """Clear the metadata and doc strings of a model in place; return how many entries went."""
    holders: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [model, model.graph, *model.graph]
    holders += [*model.graph.inputs, *model.graph.initializers.values()]
    holders += [value for node in model.graph for value in node.outputs]
    gone = 0
    for holder in holders:
        gone += len(holder.metadata_props)
        holder.metadata_props.clear()
        holder.doc_string = None
    return gone
