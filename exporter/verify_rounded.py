"""What vision graphs in int8 make of two pictures as they will run, beside the checkpoint's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanvlm.exporter.graphs import VisionPlan
from leanvlm.exporter.reference import Reference
from leanvlm.exporter.verify import called, judge_vision, look, run_graph
from leanvlm.runtime.errors import VerificationError
from leanvlm.runtime.session import Session


def measure_rounding(session: Session, reference: Reference, planned: Sequence[VisionPlan]) -> dict[str, Any]:
    """Compare the vision graphs of an int8 bundle, as they will run, with the checkpoint's own weights.

    Args:
        session: The bundle, open as a user opens it: its kernels round activations too.
        reference: The checkpoint.
        planned: The vision graphs, as exported.

    Returns:
        For each graph `features`, the largest difference relative to the largest feature, and `kept_overlap`, the least share
        of kept tokens that are the checkpoint's, over two pictures. No bound judges them.

    Raises:
        VerificationError: Values that are not finite.
    """
    found = {}
    for shape in range(len(session.manifest.crops.shapes)):
        graphs = {graph.file: graph for graph in planned if graph.shape == shape}.values()
        view = look(session, reference, shape, {graph.pruner.scored_block for graph in graphs})
        for graph in graphs:
            outputs = run_graph(session, session.manifest.vision_graph(graph.budget, shape), view.inputs)
            measured = judge_vision(outputs, reference, graph.pruner, view.tokens[graph.pruner.scored_block])
            if not measured["finite"]:
                raise VerificationError(f"{graph.file}: values that are not finite (NaN or infinity), with rounded activations")
            found[called(graph, session.manifest)] = {key: measured[key] for key in ("features", "kept_overlap")}
    return found
