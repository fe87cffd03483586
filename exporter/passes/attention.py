"""Attention as one node of ONNX Runtime's, with the three projections as one product.

    x ─ MatMul+Add ─ Reshape ─ Transpose ┐                        x ─ Attention (packed W, packed b) ─ y
    x ─ MatMul+Add ─ Reshape ─ Transpose ┼ Attention ─ Transpose ─ Reshape ─ y      or, where a projection has another user,
    x ─ MatMul+Add ─ Reshape ─ Transpose ┘                        q, k, v ─ MultiHeadAttention ─ y

One product of width 3 D keeps a GPU busier than three of width D, and its bias is added where the heads are split anyway.
The scored block's keys have another user (the class token's attention), so its projections stay apart. So do queries and keys
that are turned by their positions, and windows that are a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from leanvlm.exporter.passes.pattern import (
    Array,
    Linear,
    array,
    constant,
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
    turned = [_heads(value) for value in node.inputs]
    heads = [value for value in turned if value is not None]
    merged = _after_merge(node.outputs[0])
    counts = {None if value.shape is None else value.shape[2] for value in heads}
    count = counts.pop() if len(heads) == 3 else None
    if merged is None or counts or not isinstance(count, int):  # Grouped keys have another operator.
        return False
    attributes: dict[str, Any] = {"num_heads": count}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes.get_float("scale")
    splits = [split for value in heads if (split := _split(value)) is not None]
    name, parts = node.name or "", _packable(splits)
    if parts is None:
        rows: list[ir.Value | None] = [
            _flat(graph, node, value, f"{name}/{part}") for value, part in zip(heads, "qkv", strict=True)
        ]
        fused = contrib_node("MultiHeadAttention", rows, attributes, name)
    else:
        fused = contrib_node("Attention", [parts[0].x, *_packed(graph, name, parts)], attributes, name)
    graph.insert_before(node, fused)
    _use(node, merged, fused)
    return True


def _heads(value: ir.Value | None) -> ir.Value | None:
    """Return the (B, S, H, d) that is turned into this (B, H, S, d)."""
    turned = producer(value, "Transpose")
    if turned is None or tuple(turned.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    source = turned.inputs[0]
    return source if source is not None and source.shape is not None and len(source.shape) == 4 else None


def _split(heads: ir.Value) -> ir.Node | None:
    """Return the node that splits a (B, S, D) into these heads (B, S, H, d), and into nothing else, such as windows."""
    split = producer(heads, "Reshape")
    source = None if split is None else split.inputs[0]
    if source is None or source.shape is None or len(source.shape) != 3 or heads.shape is None:
        return None
    return split if source.shape[1] == heads.shape[1] else None


def _flat(graph: ir.Graph, before: ir.Node, heads: ir.Value, name: str) -> ir.Value:
    """Return a (B, S, H, d) as (B, S, D): what it was split from, or where it was something else, reshaped."""
    split, sizes = _split(heads), heads.shape
    if split is not None and split.inputs[0] is not None:
        return split.inputs[0]
    assert sizes is not None
    count, head = sizes[2:]
    assert isinstance(count, int)
    assert isinstance(head, int)
    width = count * head
    wanted = constant(graph, f"heads_of_{width}", np.array([0, 0, width], np.int64))
    reshaped = ir.node("Reshape", [heads, wanted], name=f"{name}/Reshape")
    graph.insert_before(before, reshaped)
    reshaped.outputs[0].shape, reshaped.outputs[0].type = ir.Shape([sizes[0], sizes[1], width]), heads.type
    return reshaped.outputs[0]


def _after_merge(value: ir.Value) -> ir.Node | None:
    """Return what reshapes a (B, H, S, d), turned back, to three axes."""
    turned = _only_user(value, "Transpose")
    if turned is None or tuple(turned.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    merged = _only_user(turned.outputs[0], "Reshape")
    shape = merged.outputs[0].shape if merged is not None else None
    return merged if shape is not None and len(shape) == 3 else None


def _use(node: ir.Node, merged: ir.Node, fused: ir.Node) -> None:
    """Put what was fused in the place of an attention and what follows it.

    It comes as (B, S, D). Where that is not what the reshaping makes, such as of windows a whole image, it is reshaped.
    """
    mixed, shape = node.outputs[0].shape, merged.outputs[0].shape
    if mixed is not None and shape is not None and mixed[2] == shape[1]:
        replace_value(merged.outputs[0], fused.outputs[0])
    else:
        merged.replace_input_with(0, fused.outputs[0])


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
