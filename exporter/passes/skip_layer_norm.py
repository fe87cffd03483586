"""Residual sum, the bias before it and layer normalisation as one node.

    skip ──────────────┐                                       x, skip, bias ─ SkipLayerNormalization ─ y
    x ─ Add (bias) ─ Add ─ LayerNormalization ─ y                                                     └ sum
                      └ sum

Root mean square normalisation (Qwen's ViT) has an operator of the same kind, SkipSimplifiedLayerNormalization. The position
embeddings, a constant sum before the first norm, are taken in the same way.
"""

from __future__ import annotations

import onnx_ir as ir

from leanvlm.exporter.passes.pattern import array, constant, contrib_node, finish, is_constant, producer, replace_value

# What normalises, to the fused operator and how many constants it has, scale and shift.
KINDS = {"LayerNormalization": ("SkipLayerNormalization", 2), "RMSNormalization": ("SkipSimplifiedLayerNormalization", 1)}


def fuse_skip_layer_norm(model: ir.Model) -> int:
    """Fuse every normalised sum of a graph in place; return how many were fused."""
    return finish(model, sum(_fuse(model.graph, node) for node in list(model.graph)))


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    operator, constants = KINDS.get(node.op_type, ("", 0))
    total = producer(node.inputs[0], "Add") if operator else None
    if total is None or len(node.inputs) < 1 + constants or node.attributes.get_int("axis", -1) != -1:
        return False
    skip, x = total.inputs
    if not _same_rows(skip, x):
        return False
    if is_constant(x, rank=2) and x is not None:  # Position embeddings (S, D), the same for every image.
        skip, x = constant(graph, f"{x.name}_row", array(x)[None]), skip
    elif is_constant(skip) or is_constant(x) or x is None or x.shape is None or len(x.shape) != 3:
        return False
    biased = producer(x, "Add")
    bias = None
    if biased is not None and is_constant(biased.inputs[1], rank=1) and x is not None and len(list(x.uses())) == 1:
        x, bias = biased.inputs
    inputs = [x, skip, *node.inputs[1 : 1 + constants], *([bias] if bias is not None else [])]
    fused = contrib_node(operator, inputs, {"epsilon": node.attributes.get_float("epsilon", 1e-5)}, node.name or "", outputs=4)
    fused.outputs[1].name = fused.outputs[2].name = ""  # Mean and variance are for training.
    graph.insert_before(total, fused)
    replace_value(node.outputs[0], fused.outputs[0])
    if any(use.node is not node for use in total.outputs[0].uses()):
        replace_value(total.outputs[0], fused.outputs[3])
    else:
        fused.outputs[3].name = ""
    return True


def _same_rows(skip: ir.Value | None, x: ir.Value | None) -> bool:
    """Whether both are (B, S, D), or the second is (S, D): a sum that is broadcast in another way is no residual."""
    if skip is None or x is None or skip.shape is None or x.shape is None or len(skip.shape) != 3:
        return False
    return len(x.shape) in (2, 3) and list(x.shape) == list(skip.shape)[-len(x.shape) :]
