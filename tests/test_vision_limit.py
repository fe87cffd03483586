"""How far a vision graph may be from its checkpoint: rounding passes on any model, the smallest mistake on none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from torch import nn

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import load_model
from leanvlm.exporter.dialect import target_opset
from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.plan import Plan, plan
from leanvlm.exporter.pruners import NoPruner
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.exporter.targets import TARGETS
from leanvlm.exporter.trace import trace
from leanvlm.exporter.verify import probe_images, verify
from leanvlm.runtime import load
from leanvlm.runtime.errors import VerificationError
from leanvlm.runtime.manifest import VISION_OUTPUTS
from leanvlm.runtime.preprocess import preprocess
from leanvlm.runtime.session import Session


def planned(folder: Path) -> Plan:
    return plan(ExportConfig(str(folder), (16,), folder.parent / "never-written"))


@pytest.mark.parametrize("seed", [13, 14])
def test_rounding_alone_passes(tmp_path: Path, seed: int) -> None:
    """On models whose graphs were over the fixed limit, and were refused, though nothing is wrong with them."""
    checkpoint = planned(tiny.llava(tmp_path / "checkpoint", seed=seed)).checkpoint
    pixels = preprocess(probe_images(), checkpoint.image_spec)
    model, spec = load_model(checkpoint), checkpoint.spec
    parts = checkpoint.family.parts(model)
    tower = parts.tower("feature", None, checkpoint.spec.shape).float()
    module = VisionGraph(tower, parts.project.float(), NoPruner(keep=spec.tokens_per_crop), spec.grid).eval()
    example = {"pixel_values": torch.zeros(2, 3, *spec.image_size)}
    graph = trace(module, example, output_names=VISION_OUTPUTS, opset=target_opset("cpu"))
    for rewrite in TARGETS["cpu"].passes.values():
        rewrite(graph)
    ir.save(graph, tmp_path / "vision.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["image_features"], {"pixel_values": pixels})[0]
    reference = Reference(checkpoint, model)
    features = reference.vision(pixels).features.numpy()
    rounding = reference.rounding(pixels, features)
    assert relative_difference(found, features) <= tolerances.features_limit("fp32", rounding)
    # By transformers alone, in double precision from end to end.
    theirs: Any = load_model(checkpoint).double()
    with torch.no_grad():
        states = theirs.model.vision_tower(torch.from_numpy(pixels).double(), output_hidden_states=True).hidden_states
        exact = theirs.model.multi_modal_projector(states[spec.layers[0]][:, 1:]).numpy()
    np.testing.assert_allclose(rounding, relative_difference(features, exact), rtol=1e-3)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_limit_has_its_ends() -> None:
    assert tolerances.features_limit("fp32", 0.0) == tolerances.FEATURES["fp32"]
    assert tolerances.features_limit("fp32", 1e-5) == pytest.approx(3e-5)
    for far in (1.0, float("inf"), float("nan")):
        assert tolerances.features_limit("fp32", far) <= tolerances.FEATURES_MOST
    assert tolerances.features_limit("fp16", 1e-5) == tolerances.FEATURES["fp16"]


def number(name: str) -> Callable[[Any], None]:
    """Change one number of a weight by 1 %: its largest."""

    def change(model: Any) -> None:
        weight = model.get_parameter(name)
        weight.data = weight.data.clone()
        weight.data.view(-1)[weight.abs().argmax()] *= 1.01

    return change


def eps(value: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for module in model.model.vision_tower.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = value

    return change


def tanh_in_the_projector(model: Any) -> None:
    model.model.multi_modal_projector.act = nn.GELU("tanh")


def exact_gelu_in_one_block(model: Any) -> None:
    model.model.vision_tower.encoder.layers[3].mlp.activation_fn = nn.GELU()


TOWER = "model.vision_tower.encoder.layers"
MISTAKES: dict[str, Callable[[Any], None]] = {
    "a number of the first block": number(f"{TOWER}.0.mlp.fc1.weight"),
    "a number of a query": number(f"{TOWER}.2.self_attn.q_proj.weight"),
    "a number of the last block": number(f"{TOWER}.3.self_attn.v_proj.weight"),
    "a number of the projector": number("model.multi_modal_projector.linear_2.weight"),
    "a number of the patches": number("model.vision_tower.embeddings.patch_embedding.weight"),
    "eps": eps(1e-4),
    "tanh for erf": tanh_in_the_projector,
    "erf for a sigmoid": exact_gelu_in_one_block,
}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle) as session:
        yield session


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_small_mistake_does_not_pass(tiny_llava: Path, bundle: Session, mistake: str) -> None:
    """Made in the checkpoint, which makes the bundle the one that is wrong."""
    request = planned(tiny_llava)
    model = load_model(request.checkpoint)
    with torch.no_grad():
        MISTAKES[mistake](model)
    with pytest.raises(VerificationError, match="vision graph of budget 16: features differ by"):
        verify(bundle, Reference(request.checkpoint, model), request.vision)


@pytest.mark.parametrize(
    ("precision", "budget", "least"), [("fp32", 6, 5.88), ("fp16", 3, 2.7), ("fp16", 6, 5), ("fp16", 64, 57.6)]
)
def test_in_half_precision_one_token_may_differ(precision: str, budget: int, least: float) -> None:
    """Of a few that is more than the share that may; of three it would be any."""
    assert tolerances.kept_least(precision, budget) == pytest.approx(least)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_end": None}, "takes 70 places in a prompt, the checkpoint's 73"),
        ({"mosaic": False, "row_end": None}, "takes 100 places in a prompt, the checkpoint's 73"),
    ],
)
def test_a_layout_that_is_not_the_checkpoints_does_not_pass(
    tile_bundle: Callable[[str], Path], change: dict[str, Any], message: str
) -> None:
    folder = tile_bundle("llava_next")
    request = planned(folder.parent / "checkpoint")
    with load(folder) as session:
        session.manifest = replace(session.manifest, layout=replace(session.manifest.layout, **change))
        with pytest.raises(VerificationError, match=message):
            verify(session, Reference(request.checkpoint, load_model(request.checkpoint)), request.vision)


def test_tokens_of_another_tile_do_not_pass(tile_bundle: Callable[[str], Path]) -> None:
    """As many as there should be, in another order."""
    folder = tile_bundle("llava_next")
    request = planned(folder.parent / "checkpoint")
    reference = Reference(request.checkpoint, load_model(request.checkpoint))
    look = reference.look

    def turned(*given: Any) -> tuple[Any, Any]:
        tokens, packed = look(*given)
        return tokens, packed[::-1].copy()

    reference.look = turned  # type: ignore[method-assign]
    with load(folder) as session, pytest.raises(VerificationError, match="an unpruned image's tokens are not the checkpoint's"):
        verify(session, reference, request.vision)


def test_no_mistake_passes(tiny_llava: Path, bundle: Session) -> None:
    request = planned(tiny_llava)
    measured = verify(bundle, Reference(request.checkpoint, load_model(request.checkpoint)), request.vision)
    for found in measured["vision"].values():
        assert found["features"] <= tolerances.features_limit("fp32", found.get("rounding", 0.0))
