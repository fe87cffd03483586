"""A vision graph as far as one of its stages, to time that stage on a GPU.

A host's clock says nothing of single kernels on a device that works by itself, and a graph that is run node by node is another
graph. But the whole graph less the graph that ends before a stage is what that stage takes.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from leanvlm.exporter.passes.stage_names import STAGES


def cut_after(model: ir.Model, stage: str) -> ir.Model:
    """Return a copy of a named graph that ends with `stage`; its outputs are what later stages read, and what was an output."""
    cut = model.clone()
    graph, wanted = cut.graph, STAGES[: STAGES.index(stage) + 1]
    kept = [node for node in graph if _stage(node) in wanted]
    outputs = [value for node in kept for value in node.outputs if _leaves(value, wanted)]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    RemoveUnusedNodesPass()(cut)
    return cut


def _leaves(value: ir.Value, wanted: tuple[str, ...]) -> bool:
    return value.is_graph_output() or any(_stage(use.node) not in wanted for use in value.uses())


def _stage(node: ir.Node) -> str:
    return (node.name or "").lstrip("/").split("/")[0]
