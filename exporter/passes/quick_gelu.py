"""CLIP's activation as one node: x * Sigmoid(alpha * x) becomes QuickGelu(x, alpha)."""

from __future__ import annotations

import onnx_ir as ir

from leanvlm.exporter.passes.pattern import array, contrib_node, finish, is_constant, producer, replace_value


def fuse_quick_gelu(model: ir.Model) -> int:
    """Fuse every such activation of a graph in place; return how many were fused."""
    return finish(model, sum(_fuse(model.graph, node) for node in list(model.graph)))


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type != "Mul":
        return False
    for x, gate in (node.inputs, node.inputs[::-1]):
        sigmoid = producer(gate, "Sigmoid")
        scaled = producer(sigmoid.inputs[0], "Mul") if sigmoid is not None else None
        if x is None or scaled is None or x not in scaled.inputs:
            continue
        factor = scaled.inputs[1] if scaled.inputs[0] is x else scaled.inputs[0]
        if factor is None or not is_constant(factor) or array(factor).size != 1:
            continue
        fused = contrib_node("QuickGelu", [x], {"alpha": float(array(factor).item())}, node.name or "")
        graph.insert_before(node, fused)
        replace_value(node.outputs[0], fused.outputs[0])
        return True
    return False
