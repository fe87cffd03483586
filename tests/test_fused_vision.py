"""Whole vision graphs as fused for a GPU: equal to the plain graph and to the module, one weights file, cuts by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_models import assert_equal, run
from torch import nn
from towers import BATCHES, BLOCKS, CHANGES, GRID, IMAGE_SIZE, SHARED, Array, apply, clip, levels

from leanvlm.exporter import tolerances
from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.passes.cut_stage import cut_after
from leanvlm.exporter.passes.shared_weights import ALIGNMENT, save_sharing
from leanvlm.exporter.passes.stage_names import STAGES
from leanvlm.exporter.pruners import NoPruner, Pruner, parse
from leanvlm.exporter.reference import relative_difference
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.towers.clip import ClipTower
from leanvlm.exporter.trace import trace
from leanvlm.runtime.manifest import VISION_OUTPUTS
from leanvlm.runtime.preprocess import ImageSpec

FEATURES = 48
TOKENS, KEEP = GRID[0] * GRID[1], 4
IMAGE = ImageSpec(
    resize=None, crop=(IMAGE_SIZE, IMAGE_SIZE), image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28), layout="uint8"
)


@dataclass(frozen=True)
class Vision:
    """A vision graph as a module, as traced and as fused for a GPU."""

    module: VisionGraph
    traced: ir.Model
    fused: ir.Model
    changed: Mapping[str, int]


@pytest.fixture(scope="module")
def visions() -> dict[int, Vision]:
    """Vision graphs over levels, one that keeps 4 of 16 tokens and an unpruned one, by their budget; nothing may change them.

    Their feature layer is the last but one, as in LLaVA-1.5.
    """
    model = clip(SHARED)
    torch.manual_seed(1)
    projector = nn.Sequential(nn.Linear(SHARED, FEATURES), nn.GELU(), nn.Linear(FEATURES, FEATURES)).requires_grad_(False)
    pruners: dict[int, Pruner] = {KEEP: parse("agile", keep=KEEP), TOKENS: NoPruner(TOKENS)}
    found = {}
    for budget, pruner in pruners.items():
        module = VisionGraph(ClipTower(model, (BLOCKS - 1,), BLOCKS - 2, IMAGE), projector, pruner, GRID).eval()
        example = {"pixel_values": torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)}
        traced = trace(module, example, output_names=VISION_OUTPUTS, opset=TARGETS["cuda"].opset)
        apply(traced, ["stage_names", "strip_metadata"])
        fused = traced.clone()
        found[budget] = Vision(module, traced, fused, apply(fused, list(CHANGES)))
    return found


@pytest.mark.parametrize("budget", [KEEP, TOKENS])
def test_fused_vision_graph_equals_the_plain_one(visions: dict[int, Vision], budget: int) -> None:
    vision = visions[budget]
    assert dict(vision.changed) == {"quick_gelu": 2, "attention": 2, "skip_layer_norm": 4, "bias_column": 2}
    assert {(node.name or "").split("/")[1] for node in vision.fused.graph} == set(STAGES)
    for batch in BATCHES:
        wanted = run(vision.traced, levels(batch))
        assert wanted["keep_indices"].shape == (batch, budget)
        assert_equal(run(vision.fused, levels(batch)), wanted)
        assert_equal(run(vision.fused, levels(batch), optimise=True), wanted)


@pytest.mark.parametrize("budget", [KEEP, TOKENS])
def test_fused_vision_graph_equals_the_module(visions: dict[int, Vision], budget: int) -> None:
    feeds = levels(3)
    with torch.no_grad():
        wanted = visions[budget].module(torch.from_numpy(feeds["pixel_values"]))
    found = run(visions[budget].fused, feeds)
    np.testing.assert_array_equal(found["keep_indices"], wanted[1].numpy())
    assert relative_difference(found["image_features"], wanted[0].numpy()) <= tolerances.FEATURES["fp32"]
    np.testing.assert_allclose(found["attention"], wanted[6].numpy(), rtol=tolerances.ATTENTION)


def test_fused_graphs_of_several_budgets_store_their_weights_once(visions: dict[int, Vision], tmp_path: Path) -> None:
    sizes = {}
    for name, budgets in {"one": (KEEP,), "two": (KEEP, TOKENS)}.items():
        folder = tmp_path / name
        folder.mkdir()
        models = {f"vision_{budget}.onnx": visions[budget].fused.clone() for budget in budgets}
        save_sharing(models, folder, "vision.data")
        sizes[name] = (folder / "vision.data").stat().st_size
        for budget in budgets:
            path = folder / f"vision_{budget}.onnx"
            onnx.checker.check_model(path, full_check=True)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            outputs = session.run(list(VISION_OUTPUTS), levels(3))
            assert_equal(dict(zip(VISION_OUTPUTS, outputs, strict=True)), run(visions[budget].fused, levels(3)))
    packed = sum(value.const_value.nbytes for name, value in visions[KEEP].fused.graph.initializers.items()
                 if value.const_value is not None and name.startswith("/vision"))  # fmt: skip
    assert packed > 8 * ALIGNMENT
    assert packed < sizes["one"] == sizes["two"]


def among(outputs: Mapping[str, Array], wanted: Array) -> bool:
    """Whether one of the outputs is `wanted`."""
    near = tolerances.FEATURES["fp32"]
    return any(value.shape == wanted.shape and relative_difference(value, wanted) <= near for value in outputs.values())


@pytest.mark.parametrize("kind", ["traced", "fused"])
@pytest.mark.parametrize("budget", [KEEP, TOKENS])
def test_cuts_end_with_what_the_module_has_there(visions: dict[int, Vision], budget: int, kind: str) -> None:
    vision, feeds = visions[budget], levels(3)
    model: ir.Model = getattr(vision, kind)
    written = ir.to_proto(model).SerializeToString(deterministic=True)
    with torch.no_grad():
        hidden, _, attention, *_ = vision.module.vision(torch.from_numpy(feeds["pixel_values"]))
        features = vision.module.project(hidden)
    cuts = {stage: cut_after(model, stage) for stage in STAGES}
    assert ir.to_proto(model).SerializeToString(deterministic=True) == written
    for index, (stage, cut) in enumerate(cuts.items()):
        assert {(node.name or "").split("/")[1] for node in cut.graph} == set(STAGES[: index + 1])
        assert [value.name for value in cut.graph.inputs] == ["pixel_values"]
        assert all(value.dtype is not None for value in cut.graph.outputs), stage
    found = {stage: run(cut, feeds) for stage, cut in cuts.items()}
    assert among(found["vision"], hidden.numpy())
    assert not among(found["vision"], features.numpy())
    assert among(found["project"], features.numpy())
    for stage in ("vision", "project"):
        np.testing.assert_allclose(found[stage]["attention"], attention.numpy(), rtol=tolerances.ATTENTION)
    assert_equal({name: found["prune"][name] for name in VISION_OUTPUTS}, run(model, feeds))
