"""The most probable token as an output of the decoder, so that greedy decoding need not fetch the logits.

    logits ─ Cast ─ scores ─ Equal (scores) ─ Where (scores, else infinity) ─ ArgMax ─ GatherElements ─ top ─ Cast ─ top_logit
    scores ─ Equal (top) ─ Where (0 -1 -2 …, else -V) ─ ArgMax ─ next_token

A NaN, which equals nothing, counts as infinite; ArgMax itself may pass over it. Of equal logits the lowest id wins, as in NumPy
and PyTorch; in half precision equal ones are common. ArgMax and TopK of ONNX Runtime's CUDA provider promise no order, so the
second ArgMax is of numbers of which no two are equal. All of it is in fp32: on the processor ONNX Runtime computes some
operators of half precision in fp32 without rounding between them, so that a logit and its copy by another way would differ.

ReduceMax and ReduceMin took 26 us of one row on an H100, but 3.2 ms of two rows and 3.6 of 16: cuDNN reduces several rows with
few threads. With ArgMax it is 30 us of one row and 33 of 16.
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

    # Ids as fp32, exact up to 2^24, negative: the highest is the lowest id.
    ids = constant("greedy.ids", -np.arange(vocabulary, dtype=np.float32))
    beyond = constant("greedy.beyond", np.array(-vocabulary, np.float32))
    assert logits.dtype is not None
    infinity = constant("greedy.infinity", np.array(np.inf, np.float32))
    last, whole = {"axis": -1, "keepdims": 1}, {"to": ir.DataType.FLOAT}
    wide = ir.node("Cast", [logits], whole, name="/sample/Wide")
    scores = wide.outputs[0]
    number = ir.node("Equal", [scores, scores], name="/sample/IsNumber")
    ranked = ir.node("Where", [number.outputs[0], scores, infinity], name="/sample/Ranked")
    highest = ir.node("ArgMax", [ranked.outputs[0]], last, name="/sample/Highest")
    top = ir.node("GatherElements", [ranked.outputs[0], highest.outputs[0]], {"axis": -1}, name="/sample/Top")
    equal = ir.node("Equal", [scores, top.outputs[0]], name="/sample/Equal")
    tied = ir.node("Where", [equal.outputs[0], ids, beyond], name="/sample/Where")
    token = ir.node("ArgMax", [tied.outputs[0]], last, name="/sample/First")
    narrow = ir.node("Cast", [top.outputs[0]], {"to": logits.dtype}, name="/sample/Narrow")
    graph.extend([wide, number, ranked, highest, top, equal, tied, token, narrow])
    batch = logits.shape[0] if logits.shape is not None else "batch_size"
    for value, name, dtype in ((narrow.outputs[0], TOP_LOGIT, logits.dtype), (token.outputs[0], NEXT_TOKEN, ir.DataType.INT64)):
        value.name, value.shape, value.type = name, ir.Shape((batch, 1, 1)), ir.TensorType(dtype)
        graph.outputs.append(value)
    return 1
