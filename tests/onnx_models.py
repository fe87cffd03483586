"""Running ONNX models in memory, and comparing what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from leanvlm.exporter import tolerances
from leanvlm.exporter.reference import relative_difference

Array = npt.NDArray[Any]


def run(model: ir.Model, feeds: Mapping[str, Array], *, optimise: bool = False) -> dict[str, Array]:
    """Run a model on the processor, node by node as it is written unless ONNX Runtime may optimise it."""
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def types(model: ir.Model) -> Counter[str]:
    """Count a graph's nodes by type; those of ONNX Runtime's own have their domain before them."""
    return Counter(f"{node.domain}.{node.op_type}".removeprefix("ai.onnx").removeprefix(".") for node in model.graph)


# Rounding leaves eigenvalues that should be zero at up to 3e-8, where the estimated root has a slope of 2e3: each adds up to
# 6e-5 to sums of 3 and more. The few of these small graphs moved the rank by 1.5e-4.
RANK = 5e-4


def assert_equal(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    """Compare outputs by name: integers exactly, others to the tolerance of image features in fp32."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        if value.dtype.kind == "f":
            limit = RANK if name == "effective_rank" else tolerances.FEATURES["fp32"]
            assert relative_difference(found[name], value) <= limit, name
        else:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
