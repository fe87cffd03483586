"""What TensorRT's ONNX parser takes: the operators that the oldest supported TensorRT knows, and a check against them.

JetPack 6.2 has TensorRT 10.3 and JetPack 7.1 10.13; neither imports opset 23's `Attention` (10.14 does). So graphs for
`tensorrt` are of opset 20 unless this machine's TensorRT is newer, and must do with the operators below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

import onnx_ir as ir

from leanvlm.exporter.targets import TARGETS
from leanvlm.runtime.engines.library import FUSED, number
from leanvlm.runtime.errors import UnsupportedModelError

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
NUMBERS = (*FLOATS, "INT32", "INT64")
ALL = (*NUMBERS, "BOOL")
# Operator to the types of its first data input. From the table `docs/operators.md` of github.com/onnx/onnx-tensorrt at
# release 10.1-GA (commit 96e781103c, June 2024), the newest one that was at hand before TensorRT 10.3: what 10.1 takes, 10.3
# takes. Left out are what it refuses, and operators with subgraphs, random numbers, recurrence or data-dependent shapes, which
# a pruned graph must not hold.
_BY_TYPES: dict[tuple[str, ...], str] = {
    NUMBERS: "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul "
    "Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
    "ReduceSumSquare Relu ScatterElements ScatterND Sign SpaceToDepth Sub Sum TopK",
    FLOATS: "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum "
    "Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalMaxPool GroupNormalization HardSigmoid HardSwish "
    "InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax MatMul MaxPool MeanVarianceNormalization PRelu "
    "Pow Reciprocal Resize Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu",
    ("BOOL",): "And Not Or Xor",
    (*ALL, "UINT8"): "Cast",
    ALL: "Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity Reshape Shape Size Slice "
    "Split Squeeze Tile Transpose Trilu Unsqueeze Where",
}
TENSORRT_10_3: Mapping[str, tuple[str, ...]] = {op: types for types, ops in _BY_TYPES.items() for op in ops.split()}
# What opset 23 adds for TensorRT 10.14 and later and for TensorRT-RTX: parsed and built with TensorRT-RTX 1.7.
TENSORRT_10_14: Mapping[str, tuple[str, ...]] = {**TENSORRT_10_3, "Attention": FLOATS, "RMSNormalization": FLOATS}
# Where a graph says which entries or axes: the parser wants a constant there. Operator to the number of that input.
CONSTANT_INPUTS = {"Squeeze": 1, "Unsqueeze": 1, "Slice": 3, "Pad": 3, **dict.fromkeys(("ReduceMax", "ReduceMin"), 1)}
CONSTANT_INPUTS |= dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceProd", "ReduceL1", "ReduceL2", "CumSum"), 1)
TOPK_LIMIT = 3840
# From here on attention is one operator.
FUSED_OPSET = 23


def target_opset(target: str) -> int:
    """Return the opset of a target's graphs; for `tensorrt` it depends on the TensorRT that this machine has, if it has one."""
    record = TARGETS[target]
    if record.newer_opset is None:
        return record.opset
    found = installed_tensorrt()
    return record.newer_opset if found is not None and found >= FUSED else record.opset


def installed_tensorrt() -> tuple[int, ...] | None:
    """Return the version (major, minor) of this environment's `tensorrt` package, or None."""
    try:
        return number(version("tensorrt"))[:2]
    except PackageNotFoundError:
        return None


def check_dialect(model: ir.Model, file: str) -> None:
    """Check that a graph for TensorRT is in its parser's dialect.

    Raises:
        UnsupportedModelError: A node that the parser refuses, by name.
    """
    foreign = next(foreign_nodes(model), None)
    if foreign is not None:
        raise UnsupportedModelError(f"{file} cannot be written for TensorRT: {foreign}")


def foreign_nodes(model: ir.Model) -> Iterator[str]:
    """Yield each node outside the dialect of the model's opset, as `name: what is wrong`."""
    opset = model.opset_imports.get("", 0)
    known = TENSORRT_10_14 if opset >= FUSED_OPSET else TENSORRT_10_3
    for node in model.graph.all_nodes():
        problem = _problem(node, known)
        if problem is not None:
            yield f"{node.name}: {problem}"


def _problem(node: ir.Node, known: Mapping[str, tuple[str, ...]]) -> str | None:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    if node.domain or node.op_type not in known:
        return f"its parser does not take the operator {name}"
    data = node.inputs[1 if node.op_type == "Where" else 0] if node.inputs else None
    if data is not None and data.dtype is not None and data.dtype.name not in known[node.op_type]:
        return f"its parser does not take {name} of {data.dtype.name}"
    index = CONSTANT_INPUTS.get(node.op_type)
    if index is not None and index < len(node.inputs):
        axes = node.inputs[index]
        made = None if axes is None else axes.producer()
        if axes is not None and axes.const_value is None and (made is None or made.op_type != "Constant"):
            return f"the axes of {name} must be a constant"
    if node.op_type == "TopK":
        count = node.inputs[1].const_value if node.inputs[1] is not None else None
        if node.attributes.get_int("sorted", 1) != 1 or count is None or int(count.numpy().item()) >= TOPK_LIMIT:
            return f"TopK must sort, with a constant number under {TOPK_LIMIT}"
    return None
