"""Vision graphs put together of two traces, against the module that is traced as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from onnxruntime import InferenceSession

from leanvlm.exporter import ExportConfig, vision_graphs
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.decoders import planes_of
from leanvlm.exporter.graphs import VisionGraph, VisionPlan
from leanvlm.exporter.passes.stage_names import STAGES
from leanvlm.exporter.plan import pruner_for
from leanvlm.exporter.pruners import NoPruner
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.vision_graphs import Tokens, VisionTracer
from leanvlm.runtime.manifest import VISION_OUTPUTS

# Padding; a token in front of the grid; merged tokens; planes.
CASES = [
    ("llava_next", "agile"), ("llava/full", "vispruner"), ("llava", "visionzip"), ("qwen3_vl", "agile"),
    ("qwen3_vl", "visionzip"), ("smolvlm", "divprune"),
]  # fmt: skip


# Those that have most of it together; the others are slow.
USUAL = CASES[:1] + CASES[2:3] + CASES[4:5]


@pytest.mark.parametrize(
    ("shape", "method"), [pytest.param(*case, marks=[pytest.mark.slow] * (case not in USUAL)) for case in CASES]
)  # fmt: skip
def test_two_traces_are_the_module(shape: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruned and unpruned over one trace of the tower; two images, and three, which were not traced."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny.EVERY[shape](tmp_path / "checkpoint"))))
    parts, spec, size = checkpoint.family.parts(load_model(checkpoint)), checkpoint.spec, checkpoint.spec.shape
    pruner = pruner_for(method, spec, min(9, spec.tokens_per_crop // 2))
    padded, opset = checkpoint.frame.crops.is_padded, TARGETS["cpu"].opset
    tower, traced = parts.tower(pruner.scored_block, None, size), counted(monkeypatch)
    tracer = VisionTracer(opset, TARGETS["cpu"].passes, spec.leading, padded)
    tokens = Tokens(tower, parts.project, spec.signals, planes=planes_of(parts.decoder) > 0)
    tracer.add("one", tokens.eval(), torch.zeros(2, 3, *size.pixels))
    generator = torch.Generator().manual_seed(5)
    for each in (pruner, NoPruner(keep=size.tokens - spec.leading)):
        planned = VisionPlan(0, each.keep, each, each.keep + spec.leading, "vision.onnx")
        model = tracer.graph("one", planned, size, parts.project)
        names = [node.name for node in model.graph]
        assert len(set(names)) == len(names)
        assert {str(name).split("/")[1] for name in names} == set(STAGES)
        assert [value.name for value in model.graph.inputs] == ["pixel_values", *(["valid"] if padded else [])]
        assert [value.name for value in model.graph.outputs] == list(VISION_OUTPUTS)
        module = VisionGraph(tower, parts.project, each, size.grid, spec.leading).eval()
        session = InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
        for count in (2, 3):
            given = {"pixel_values": torch.randn(count, 3, *size.pixels, generator=generator)}
            if padded:
                given["valid"] = (torch.rand(count, size.tokens, generator=generator) > 0.3).float()
            found = session.run(None, {name: value.numpy() for name, value in given.items()})
            with torch.no_grad():
                wanted = module(*given.values())
            for name, one, other in zip(VISION_OUTPUTS, found, wanted, strict=True):
                np.testing.assert_allclose(one, other.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)
    assert len(traced) == 3, "the tower was traced again"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is traced."""
    real: Callable[..., ir.Model] = vision_graphs.trace
    seen: list[str] = []

    def noted(module: torch.nn.Module, *given: object, **options: object) -> ir.Model:
        seen.append(type(module).__name__)
        return real(module, *given, **options)

    monkeypatch.setattr(vision_graphs, "trace", noted)
    return seen


def test_what_a_pruner_does_not_read_is_not_computed(tmp_path: Path) -> None:
    """The unpruned graph needs no keys and no unsplit attention of the tower; the attention for pictures stays."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny.llava(tmp_path / "checkpoint"))))
    parts, size = checkpoint.family.parts(load_model(checkpoint)), checkpoint.spec.shape
    tracer = VisionTracer(18, TARGETS["cpu"].passes, 0, padded=False)
    tokens = Tokens(parts.tower("feature", None, size), parts.project, checkpoint.spec.signals)
    tracer.add("one", tokens.eval(), torch.zeros(2, 3, *size.pixels))
    sizes = {}
    for method in ("prumerge", "none"):
        pruner = pruner_for(method, checkpoint.spec, 20) if method != "none" else NoPruner(keep=size.tokens)
        graph = tracer.graph("one", VisionPlan(0, 20, pruner, 20, "v"), size, parts.project).graph
        # The tower's own, whatever the pruner adds.
        sizes[method] = len([node for node in graph if str(node.name).startswith("/vision/")])
    assert sizes["none"] < sizes["prumerge"]
