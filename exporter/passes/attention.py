"""Attention as one node of ONNX Runtime's, with the three projections as one product.

    x ─ MatMul+Add ─ Reshape ─ Transpose ┐                        x ─ Attention (packed W, packed b) ─ y
    x ─ MatMul+Add ─ Reshape ─ Transpose ┼ Attention ─ Transpose ─ Reshape ─ y      or, where a projection has another user,
    x ─ MatMul+Add ─ Reshape ─ Transpose ┘                        q, k, v ─ MultiHeadAttention ─ y

One product of width 3 D keeps a GPU busier than three of width D, and its bias is added where the heads are split anyway.
The scored block's keys have another user (the class token's attention), so its projections stay apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from leanvlm.exporter.passes.pattern import (
    Array,
    Linear,
    array,
    contrib_node,
    finish,
    lazy_constant,
    linear,
    producer,
    replace_value,
)


def fuse_attention(model: ir.Model) -> int:
    """Fuse every self-attention of a graph in place; return how many were fused."""
    return finish(model, sum(_fuse(model.graph, node) for node in list(model.graph)))


def _fuse(graph: ir.Graph, node: ir.Node) -> bool:
    # More inputs are a mask or a cache.
    if node.op_type != "Attention" or node.domain not in ("", "ai.onnx") or len([v for v in node.inputs if v is not None]) != 3:
        return False
    if node.attributes.get_int("is_causal", 0) or node.attributes.get_float("softcap", 0):
        return False
    splits = [_split(value) for value in node.inputs]
    merged = _after_merge(node.outputs[0])
    if any(s is None for s in splits) or merged is None:
        return False
    heads = {value.shape[1] if value is not None and value.shape is not None else None for value in node.inputs}
    count = heads.pop()
    if heads or not isinstance(count, int):  # Grouped keys have another operator.
        return False
    found = [s for s in splits if s is not None]
    attributes: dict[str, Any] = {"num_heads": count}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes.get_float("scale")
    name, parts = node.name or "", _packable(found)
    if parts is None:
        fused = contrib_node("MultiHeadAttention", [s.inputs[0] for s in found], attributes, name)
    else:
        fused = contrib_node("Attention", [parts[0].x, *_packed(graph, name, parts)], attributes, name)
    graph.insert_before(node, fused)
    replace_value(merged, fused.outputs[0])
    return True


def _split(value: ir.Value | None) -> ir.Node | None:
    """Return the node that reshapes a (B, S, D) to heads before it is turned into this (B, H, S, d)."""
    turned = producer(value, "Transpose")
    if turned is None or tuple(turned.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    return producer(turned.inputs[0], "Reshape")


def _after_merge(value: ir.Value) -> ir.Value | None:
    """Return the (B, S, D) that a (B, H, S, d) becomes."""
    turned = _only_user(value, "Transpose")
    if turned is None or tuple(turned.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    merged = _only_user(turned.outputs[0], "Reshape")
    shape = merged.outputs[0].shape if merged is not None else None
    return merged.outputs[0] if merged is not None and shape is not None and len(shape) == 3 else None


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def _packable(splits: list[ir.Node]) -> list[Linear] | None:
    """Return the projections if they are linear in the same x, of one shape, and used by this attention alone."""
    found = [part for split in splits if (part := linear(split.inputs[0])) is not None]
    used = [value for split in splits for value in (split.inputs[0], split.outputs[0]) if value is not None]
    alone = all(len(list(value.uses())) == 1 for value in used)
    same = len({(id(part.x), part.shape) for part in found}) == 1
    return found if len(found) == 3 and alone and same else None


def _packed(graph: ir.Graph, name: str, parts: list[Linear]) -> list[ir.Value]:
    """Return the weights (D, 3 D) and biases (3 D,) of three projections side by side."""
    dtype, (rows, columns) = parts[0].dtype, parts[0].shape

    def weights() -> Array:
        return np.concatenate([part.read_weight() for part in parts], axis=1)

    def biases() -> Array:
        return np.concatenate([array(part.bias) for part in parts])

    return [
        lazy_constant(graph, f"{name}/weight", dtype, (rows, 3 * columns), weights),
        lazy_constant(graph, f"{name}/bias", dtype, (3 * columns,), biases),
    ]
