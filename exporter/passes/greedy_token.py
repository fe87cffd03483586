"""The most probable token as an output of the decoder, so that greedy decoding need not fetch the logits.

    logits ─ Equal (logits) ─ Where (logits, else infinity) ─ ReduceMax ─ top_logit
    logits ─ Equal (top_logit) ─ Where (0 1 2 …, else V) ─ ReduceMin ─ Cast ─ next_token

A NaN, which equals nothing, counts as infinite; ReduceMax itself passes over it in most positions. Of equal logits the lowest
id wins, as in NumPy and PyTorch; in half precision equal ones are common. ArgMax and TopK of ONNX Runtime's CUDA provider
promise no order.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

LOGITS, NEXT_TOKEN, TOP_LOGIT = "logits", "next_token", "top_logit"


def add_greedy_token(model: ir.Model) -> int:
    """Give a decoder the outputs `next_token` (B, 1, 1) int64 and `top_logit` (B, 1, 1), in place; return 1."""
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    vocabulary = logits.shape[-1] if logits.shape is not None else None
    assert isinstance(vocabulary, int), "the decoder's vocabulary is not known"

    def constant(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(ir.DataType.from_numpy(values.dtype)))
        value.const_value = ir.Tensor(values, name=name)
        graph.register_initializer(value)
        return value

    axis = constant("greedy.axis", np.array([-1], np.int64))
    # Ids as fp32, exact up to 2^24: reductions of integers have no kernel on a GPU.
    ids = constant("greedy.ids", np.arange(vocabulary, dtype=np.float32))
    beyond = constant("greedy.beyond", np.array(vocabulary, np.float32))
    assert logits.dtype is not None
    infinity = constant("greedy.infinity", np.array(np.inf, logits.dtype.numpy()))
    number = ir.node("Equal", [logits, logits], name="/sample/IsNumber")
    ranked = ir.node("Where", [number.outputs[0], logits, infinity], name="/sample/Ranked")
    top = ir.node("ReduceMax", [ranked.outputs[0], axis], name="/sample/ReduceMax")
    equal = ir.node("Equal", [logits, top.outputs[0]], name="/sample/Equal")
    tied = ir.node("Where", [equal.outputs[0], ids, beyond], name="/sample/Where")
    first = ir.node("ReduceMin", [tied.outputs[0], axis], name="/sample/ReduceMin")
    token = ir.node("Cast", [first.outputs[0]], {"to": ir.DataType.INT64}, name="/sample/Cast")
    graph.extend([number, ranked, top, equal, tied, first, token])
    batch = logits.shape[0] if logits.shape is not None else "batch_size"
    for value, name, dtype in ((top.outputs[0], TOP_LOGIT, logits.dtype), (token.outputs[0], NEXT_TOKEN, ir.DataType.INT64)):
        value.name, value.shape, value.type = name, ir.Shape((batch, 1, 1)), ir.TensorType(dtype)
        graph.outputs.append(value)
    return 1
