"""Weights rounded as the reference sees them, against ONNX Runtime's own quantiser and a slow loop."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from torch import nn

from leanvlm.exporter.rounding import BITS, BLOCK, rounded, weights_rounded


def quantised(weight: np.ndarray, bits: int) -> np.ndarray:
    """Return a weight (outputs, inputs) as a graph with `MatMulNBits` multiplies by it: its product with the identity."""
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", dtype, ["n", columns])],
        [helper.make_tensor_value_info("y", dtype, ["n", rows])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    quantiser = MatMulNBitsQuantizer(model, algo_config=config)
    quantiser.process()
    graph_bytes = quantiser.model.model.SerializeToString()
    assert {node.op_type for node in onnx.load_from_string(graph_bytes).graph.node} == {"MatMulNBits"}
    session = onnxruntime.InferenceSession(graph_bytes, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": np.eye(columns, dtype=weight.dtype)})[0]).T


def weights(dtype: type) -> np.ndarray:
    """Return a matrix whose width is no whole number of blocks, with a block of zeros and one of a single large value.

    Values of half precision are often halves of a step, and of equal magnitude.
    """
    weight = np.random.default_rng(3).normal(0, 0.05, (256, 9 * BLOCK + 16)).astype(np.float16).astype(dtype)
    weight[2, :BLOCK] = 0
    weight[5, BLOCK : 2 * BLOCK] = 0
    weight[5, BLOCK + 7] = 2.5
    return weight


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding_is_that_of_the_quantiser(bits: int, dtype: type) -> None:
    weight = weights(dtype)
    found = rounded(torch.from_numpy(weight), bits, getattr(torch, np.dtype(dtype).name)).numpy()
    wanted = quantised(weight, bits).astype(np.float32)
    # A product in half precision rounds the value that it brings back; fp32 brings it back whole.
    np.testing.assert_allclose(found, wanted, rtol=1e-3 if dtype is np.float16 else 1e-6, atol=1e-7)


def test_rounding_by_hand() -> None:
    weight = torch.zeros(1, BLOCK)
    weight[0, :4] = torch.tensor([0.8, -0.31, 0.26, -0.9])
    # The largest magnitude is -0.9, which becomes level -8: a step is 0.1125, and 0.8 would be level 7.1.
    found = rounded(weight, 4, torch.float32)[0, :5]
    np.testing.assert_allclose(found, np.array([7, -3, 2, -8, 0]) * 0.1125, rtol=1e-6)
    # The end of the other sign has one level less.
    found = rounded(-weight, 4, torch.float32)[0, :4]
    np.testing.assert_allclose(found, np.array([7, -3, 2, -8]) * -0.1125, rtol=1e-6)
    # Of two ends the negative one sets the step, here 0.125, and halves go up.
    found = rounded(torch.tensor([[1.0, -1.0, 0.3125, -0.3125]]), 4, torch.float32)[0]
    assert found.tolist() == [0.875, -1.0, 0.375, -0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_module_computes_rounded_and_keeps_its_weights(dtype: torch.dtype) -> None:
    linear = nn.Linear(40, 6, bias=False)
    linear.weight.data = linear.weight.data.to(dtype)
    norm = nn.LayerNorm(40)
    before = linear.weight.data.clone()
    with torch.no_grad(), weights_rounded(nn.Sequential(norm, linear), 4, dtype):
        once, again = linear(torch.eye(40)), linear(torch.eye(40))
    np.testing.assert_array_equal(once.numpy().T, rounded(before, 4, dtype).numpy())
    np.testing.assert_array_equal(again, once)
    assert linear.weight.dtype == dtype
    assert torch.equal(linear.weight.data, before)
    with torch.no_grad():
        plain = linear(torch.eye(40, dtype=dtype))
    assert torch.equal(plain.T, before)
    assert not torch.equal(plain.float(), once)
