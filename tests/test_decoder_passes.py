"""The decoder's passes and the splice graph, on hand-made graphs, against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_models import assert_equal, run, types

from leanvlm.exporter.passes.greedy_token import add_greedy_token
from leanvlm.exporter.passes.last_position import GATHER, add_last_position
from leanvlm.exporter.splice_graph import SPLICE, write_splice_graph
from leanvlm.exporter.targets import TARGETS

Array = npt.NDArray[Any]

# --- Decoders -----------------------------------------------------------------------------------------------------------

NUMPY = {"fp32": np.float32, "fp16": np.float16}


def head(table: Array, *, gather: bool = False) -> ir.Model:
    """Return a decoder that is its last product: hidden (B, S, D) and the table (D, V) give logits (B, 1, V).

    With `gather` it takes the last position as the model builder's decoders do, else S must be 1.
    """
    dtype = ir.DataType.from_numpy(table.dtype)
    width, vocabulary = table.shape
    hidden = ir.Value(name="hidden", shape=ir.Shape(("batch_size", "S", width)), type=ir.TensorType(dtype))
    constants = {"table": table, "last": np.array(-1, np.int64), "axes": np.array([1], np.int64)}
    values = {}
    for name, array in constants.items():
        values[name] = ir.Value(name=name, shape=ir.Shape(array.shape),
                                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))  # fmt: skip
        values[name].const_value = ir.Tensor(array, name=name)
    logits = ir.Value(name="logits", shape=ir.Shape(("batch_size", 1, vocabulary)), type=ir.TensorType(dtype))
    nodes, last = [], hidden
    if gather:
        nodes.append(ir.node("Gather", [hidden, values["last"]], {"axis": 1}, name=GATHER))
        nodes.append(ir.node("Unsqueeze", [nodes[0].outputs[0], values["axes"]], name="/lm_head/prune/Unsqueeze"))
        last = nodes[1].outputs[0]
        last.shape = ir.Shape(("batch_size", 1, width))
    nodes.append(ir.node("MatMul", [last, values["table"]], outputs=[logits], name="/lm_head/MatMul"))
    initializers = [*values.values()] if gather else [values["table"]]
    graph = ir.Graph([hidden], [logits], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="decoder")
    return ir.Model(graph, ir_version=10)


# One row of a table (1, V), which a hidden state of one number scales.
ROWS = {
    "one maximum": [0.5, -1.0, 3.0, 2.5, -7.0],
    "ties at the top": [2.0, -3.0, 4.0, 4.0, -3.0, 4.0],
    "all equal": [1.0] * 9,
    "all zero": [0.0] * 9,
    "the first": [9.0, 1.0, 9.0, 9.0],
    "the last": [-2.0, -2.0, -2.0, -1.0],
    "minus infinity in places": [-np.inf, 1.0, -np.inf, 1.0],
    "minus infinity but one": [-np.inf, -np.inf, -5.0],
    "many": [float(value) for value in np.random.default_rng(2).integers(-50, 50, 3000)],
}


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("row", ROWS)
def test_greedy_token_is_the_first_of_the_best(row: str, dtype: str) -> None:
    """For a batch of two whose rows differ: the second is twice the first, or its negative where that is finite."""
    table = np.array([ROWS[row]], NUMPY[dtype])
    factor = -1.0 if np.isfinite(table).all() else 2.0
    hidden = np.array([[[1.0]], [[factor]]], NUMPY[dtype])
    model = head(table)
    assert add_greedy_token(model) == 1
    assert [value.name for value in model.graph.outputs] == ["logits", "top_logit", "next_token"]
    for optimise in (False, True):
        found = run(model, {"hidden": hidden}, optimise=optimise)
        np.testing.assert_array_equal(found["logits"], hidden * table)
        np.testing.assert_array_equal(found["next_token"], (hidden * table).argmax(axis=-1, keepdims=True))
        np.testing.assert_array_equal(found["top_logit"], (hidden * table).max(axis=-1, keepdims=True))
        assert found["next_token"].dtype == np.int64
        assert found["top_logit"].dtype == NUMPY[dtype]


@pytest.mark.parametrize("dtype", NUMPY)
def test_greedy_token_is_that_of_the_rounded_logits(dtype: str) -> None:
    """Of products that half precision does not hold, which ONNX Runtime may leave unrounded on their way within the graph."""
    random = np.random.default_rng(6)
    hidden = random.standard_normal((3, 1, 40)).astype(NUMPY[dtype])
    model = head(random.standard_normal((40, 2000)).astype(NUMPY[dtype]))
    add_greedy_token(model)
    for optimise in (False, True):
        found = run(model, {"hidden": hidden}, optimise=optimise)
        np.testing.assert_array_equal(found["next_token"], found["logits"].argmax(axis=-1, keepdims=True))
        np.testing.assert_array_equal(found["top_logit"], found["logits"].max(axis=-1, keepdims=True))


@pytest.mark.parametrize("dtype", NUMPY)
def test_top_logit_shows_that_logits_are_not_finite(dtype: str) -> None:
    """A hidden state of NaN makes every logit NaN; the other row of the batch keeps its token."""
    table = np.array([ROWS["one maximum"]], NUMPY[dtype])
    model = head(table)
    add_greedy_token(model)
    found = run(model, {"hidden": np.array([[[np.nan]], [[1.0]]], NUMPY[dtype])})
    assert not np.isfinite(found["top_logit"][0, 0, 0])
    assert found["top_logit"][1, 0, 0] == table.max()
    assert found["next_token"][1, 0, 0] == table.argmax()
    found = run(model, {"hidden": np.array([[[np.inf]]], NUMPY[dtype])})
    assert not np.isfinite(found["top_logit"]).any()


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("column", [0, 1, 4])
def test_top_logit_shows_a_single_logit_that_is_nan(column: int, dtype: str) -> None:
    table = np.array([ROWS["one maximum"]], NUMPY[dtype])
    table[0, column] = np.nan
    model = head(table)
    add_greedy_token(model)
    for optimise in (False, True):
        found = run(model, {"hidden": np.ones((1, 1, 1), NUMPY[dtype])}, optimise=optimise)
        assert not np.isfinite(found["top_logit"]).any()


def test_last_position_chooses_the_position() -> None:
    random = np.random.default_rng(4)
    table = random.standard_normal((6, 11), dtype=np.float32)
    hidden = random.standard_normal((2, 5, 6), dtype=np.float32)
    plain, model = head(table, gather=True), head(table, gather=True)
    assert add_last_position(model) == 1
    assert [value.name for value in model.graph.inputs] == ["hidden", "last_position"]
    assert types(model) == {"Gather": 1, "MatMul": 1}
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert product.inputs[0] is not None
    assert list(product.inputs[0].shape or ()) == ["batch_size", 1, 6]
    for position in range(5):
        found = run(model, {"hidden": hidden, "last_position": np.array([position])})["logits"]
        assert found.shape == (2, 1, 11)
        assert_equal({"logits": found}, {"logits": hidden[:, position : position + 1] @ table})
    assert_equal(run(model, {"hidden": hidden, "last_position": np.array([4])}), run(plain, {"hidden": hidden}))


def test_last_position_leaves_a_decoder_without_the_builders_gather() -> None:
    model = head(np.ones((6, 11), np.float32))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert add_last_position(model) == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_decoder_passes_work_together() -> None:
    random = np.random.default_rng(5)
    table = random.standard_normal((6, 11), dtype=np.float32)
    hidden = random.standard_normal((2, 5, 6), dtype=np.float32)
    model = head(table, gather=True)
    assert {name: rewrite(model) for name, rewrite in TARGETS["cuda"].decoder_passes.items()} == {
        "last_position": 1,
        "greedy_token": 1,
    }
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    found = run(model, {"hidden": hidden, "last_position": np.array([2])})
    np.testing.assert_array_equal(found["next_token"], (hidden[:, 2:3] @ table).argmax(axis=-1, keepdims=True))


# --- The splice graph ---------------------------------------------------------------------------------------------------

# Rows of the text, rows of the images, index: one of T or more is a row of the images.
SPLICES = {
    "images in the middle": (5, 3, [0, 1, 5, 6, 7, 2, 3, 4]),
    "images first": (2, 3, [2, 3, 4, 0, 1]),
    "two images apart": (3, 4, [0, 3, 4, 1, 5, 6, 2]),
    "repeated rows": (3, 2, [0, 3, 3, 4, 1, 1, 2, 0, 4, 4]),
    "one row": (1, 1, [1]),
    "no images": (3, 0, [2, 0, 1]),
}


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("case", SPLICES)
def test_splice_graph_takes_rows_in_the_order_of_the_prompt(case: str, dtype: str, tmp_path: Path) -> None:
    texts, images, index = SPLICES[case]
    write_splice_graph(tmp_path, 8, ir.DataType.from_numpy(np.dtype(NUMPY[dtype])))
    onnx.checker.check_model(tmp_path / SPLICE, full_check=True)
    random = np.random.default_rng(6)
    feeds = {
        "text": random.standard_normal((texts, 8)).astype(NUMPY[dtype]),
        "images": random.standard_normal((images, 8)).astype(NUMPY[dtype]),
        "index": np.array(index, np.int64),
    }
    session = onnxruntime.InferenceSession(tmp_path / SPLICE, providers=["CPUExecutionProvider"])
    (found,) = session.run(["inputs_embeds"], feeds)
    assert found.dtype == NUMPY[dtype]
    np.testing.assert_array_equal(found, np.concatenate([feeds["text"], feeds["images"]]).take(index, axis=0)[None])
