"""From a torch module to an ONNX model: the one place that calls torch.onnx."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, nn

OPSET = {"cpu": 18, "cuda": 23, "tensorrt-rtx": 23, "tensorrt": 20}


def trace(module: nn.Module, inputs: Mapping[str, Tensor], *, output_names: Sequence[str], opset: int) -> ir.Model:
    """Export a module, the first axis `B` of whose inputs is free, to an ONNX model in memory.

    Args:
        module: In evaluation mode; branches only on its configuration.
        inputs: Name of each of the graph's inputs, in order, to an example of the traced shape; the first axis may be any
            size of 2 or more, the same for all.
        output_names: Names of its outputs, in order.
        opset: ONNX opset to write.
    """
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(output_names),
            dynamic_shapes=({0: torch.export.Dim("B")},) * len(inputs),
            verbose=False,
        )
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's notes on torchvision's absence and its own deprecations; errors still pass."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
