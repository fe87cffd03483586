"""Root mean square normalisation as ONNX Runtime's older operator, which has long had kernels on every provider.

x ─ RMSNormalization ─ y        becomes        x ─ SimplifiedLayerNormalization ─ y
"""

from __future__ import annotations

import onnx_ir as ir

from leanvlm.exporter.passes.pattern import finish, replace_value

ATTRIBUTES = ("axis", "epsilon", "stash_type")


def simplify_norms(model: ir.Model) -> int:
    """Replace every one of a graph in place; return how many were replaced."""
    found = [node for node in model.graph if node.op_type == "RMSNormalization" and node.domain in ("", "ai.onnx")]
    for node in found:
        attributes = [node.attributes[name] for name in ATTRIBUTES if name in node.attributes]
        # It stands in ONNX's own domain there, not among the others.
        made = ir.Node("", "SimplifiedLayerNormalization", node.inputs, attributes, name=node.name)
        model.graph.insert_before(node, made)
        replace_value(node.outputs[0], made.outputs[0])
    return finish(model, len(found))
