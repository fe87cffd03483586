"""The vision graphs of a bundle, from two traces: tower and projector once for each crop shape, pruning once for each budget.

A tower of 32 blocks takes a minute to trace and rewrite, a pruner seconds. The parts are joined in the graph, with the weights
shared, and what a budget's pruner does not read of the tower falls away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn

from leanvlm.exporter.graphs import PruneStage, VisionPlan, finished
from leanvlm.exporter.passes import Pass
from leanvlm.exporter.passes.stage_names import STAGES
from leanvlm.exporter.towers.base import Seen
from leanvlm.exporter.trace import trace
from leanvlm.runtime.crops import PIXELS, VALID, CropShape
from leanvlm.runtime.manifest import VISION_OUTPUTS

FEATURES = "features"


class Tokens(nn.Module):
    """The first part: pixel values to features, and what the tower tells of them.

    Args:
        tower: Returns `Seen`.
        projector: Makes features.
        signals: What the tower tells the pruners.
        planes: Whether it makes planes for the decoder.
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, signals: Collection[str], *, planes: bool = False) -> None:
        super().__init__()
        self.vision, self.project = tower, projector
        fields = {"hidden", *signals, *(["deep"] if planes else [])}
        self.told = tuple(name for name in Seen._fields if name in fields)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Map pixel values (B, 3, H, W) to features (B, N, D) and the fields of `Seen` that the tower tells, in order."""
        seen: Seen = self.vision(pixel_values)
        return self.project(seen.hidden), *(getattr(seen, name) for name in self.told)


class Choice(nn.Module):
    """The second part: features, and what the tower tells, to the outputs of a vision graph.

    Args:
        prune: The pruner.
        projector: For tokens that it merges.
        told: Which fields of `Seen` come behind the features, in order; `valid` may stand behind them.
    """

    def __init__(self, prune: PruneStage, projector: nn.Module, told: tuple[str, ...]) -> None:
        super().__init__()
        self.prune, self.project, self.told = prune, projector, told

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Map features (B, N, D) and what else is given to the outputs named in `VISION_OUTPUTS`."""
        parts: dict[str, Any] = dict.fromkeys(Seen._fields) | dict(zip(self.told, given[1:], strict=False))
        valid = given[-1] if len(given) > 1 + len(self.told) else None
        seen = Seen(**parts)
        return finished(self.prune(given[0], seen, valid), seen, self.project)


class VisionTracer:
    """Traces vision graphs; what they have in common is traced once.

    Args:
        opset: ONNX opset.
        passes: Rewrite either part, in order.
        leading: Tokens in front of the grid, which are always kept.
        padded: Whether graphs are told which tokens show the image.
    """

    def __init__(self, opset: int, passes: Mapping[str, Pass], leading: int, padded: bool) -> None:
        self._opset, self._passes, self._leading, self._padded = opset, passes, leading, padded
        self._fronts: dict[Any, tuple[ir.Model, dict[str, Tensor]]] = {}

    @property
    def keys(self) -> Collection[Any]:
        """The keys that were added."""
        return self._fronts.keys()

    def add(self, key: Any, tokens: Tokens, pixels: Tensor) -> None:
        """Trace tower and projector for graphs of a key, with pixel values (2, 3, H, W) of the shape."""
        names = (FEATURES, *tokens.told)
        model = trace(tokens, {PIXELS: pixels}, output_names=[f"seen.{name}" for name in names], opset=self._opset)
        examples = {name: _like(value, len(pixels)) for name, value in zip(names, model.graph.outputs, strict=True)}
        self._rewrite(model)
        self._fronts[key] = model, examples

    def graph(self, key: Any, planned: VisionPlan, shape: CropShape, projector: nn.Module) -> ir.Model:
        """Return the whole vision graph of a plan, over the front of a key."""
        front, examples = self._fronts[key]
        told = tuple(name for name in examples if name != FEATURES)
        inputs = {f"given.{name}": value for name, value in examples.items()}
        if self._padded:
            inputs[VALID] = torch.ones(2, shape.tokens)
        choice = Choice(PruneStage(planned.pruner, shape.grid, self._leading), projector, told).eval()
        back = trace(choice, inputs, output_names=VISION_OUTPUTS, opset=self._opset)
        self._rewrite(back)
        return joined(front.clone(), back, [f"given.{name}" for name in examples])

    def _rewrite(self, model: ir.Model) -> None:
        for rewrite in self._passes.values():
            rewrite(model)


def _like(value: ir.Value, batch: int) -> Tensor:
    """Return zeros of the shape and dtype of a graph's value, whose first size alone is free."""
    assert value.shape is not None
    assert value.dtype is not None
    sizes = [size for size in value.shape[1:] if isinstance(size, int)]
    assert len(sizes) == len(value.shape) - 1, "only the batch is free"
    return torch.from_numpy(np.zeros((batch, *sizes), value.dtype.numpy()))


def joined(front: ir.Model, back: ir.Model, names: list[str]) -> ir.Model:
    """Put two graphs behind one another; the second is used up.

    Args:
        front: Its outputs are the second's first inputs, in order.
        back: Its other inputs, and its outputs, become those of the whole.
        names: Of the inputs that are taken from the first.
    """
    graph, other = front.graph, back.graph
    assert not front.functions, "a trace makes no functions"
    assert not back.functions, "a trace makes no functions"
    given = {value.name: value for value in other.inputs}
    for name, source in zip(names, list(graph.outputs), strict=True):
        # What the pruner does not read is no input of its trace any more, or has no users.
        if name in given:
            ir.convenience.replace_all_uses_with(given[name], source)
    outputs = list(other.outputs)
    ends = {id(value) for value in outputs}
    for value in list(other.initializers.values()):
        del other.initializers[str(value.name)]
        value.name = f"{STAGES[-1]}.{value.name}"
        graph.register_initializer(value)
    nodes = list(other)
    other.outputs.clear()
    other.remove(nodes)
    for at, node in enumerate(nodes):
        node.name = _renamed(node, at)
        for value in node.outputs:
            if id(value) not in ends and value.name:
                value.name = f"{STAGES[-1]}.{value.name}"
    graph.extend(nodes)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    more = [value for value in other.inputs if value.name not in names]
    other.inputs.clear()
    graph.inputs.extend(more)
    for domain, opset in back.opset_imports.items():
        front.opset_imports.setdefault(domain, opset)
    RemoveUnusedNodesPass()(front)
    return front


def _renamed(node: ir.Node, at: int) -> str:
    """Return the name of the second graph's node that no node of the first has."""
    name, project, prune = node.name or "", f"/{STAGES[1]}/", f"/{STAGES[-1]}/"
    if name.startswith(project):
        return name.replace(project, f"{project}merged/", 1)
    # Shape arithmetic, which has no module of its own, is named after the first stage.
    return name if name.startswith(prune) else f"{prune}{node.op_type}/{at}"
