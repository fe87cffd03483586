"""From a torch module to an ONNX model: the one module that calls torch.onnx."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn


def trace(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    output_names: Sequence[str],
    opset: int,
    free: Mapping[str, Mapping[int, str]] | None = None,
) -> ir.Model:
    """Export a module to an ONNX model in memory.

    Args:
        module: In evaluation mode; branches only on its configuration.
        inputs: Name of each of the graph's inputs, in order, to an example of the traced shape; free axes of 2 or more.
        output_names: Names of its outputs, in order.
        opset: ONNX opset to write.
        free: Input to the names of its free axes; None frees the first axis of all, as `B`.
    """
    axes = {name: {0: "B"} for name in inputs} if free is None else {name: free.get(name, {}) for name in inputs}
    sizes = {name: torch.export.Dim(name, min=0) for names in axes.values() for name in names.values()}
    shapes: list[Any] = [{axis: sizes[name] for axis, name in axes[key].items()} for key in inputs]
    named = [p for p in inspect.signature(module.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if len(named) < len(shapes):
        # torch.export sees what a `*` takes as one tuple.
        shapes = [*shapes[: len(named)], tuple(shapes[len(named) :])]
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(output_names),
            dynamic_shapes=tuple(shapes),
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
