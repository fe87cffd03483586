"""Every pruner as an ONNX graph: standard operators, a quick export, ONNX Runtime's choice, a TensorRT-RTX engine."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tiny
import torch
from reference import REFERENCE, Crop, agile_with_margin
from test_pruners import crops, exact_tokens
from torch import Tensor, nn

from leanvlm.exporter import ExportConfig, tolerances
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.dialect import foreign_nodes
from leanvlm.exporter.graphs import VisionGraph
from leanvlm.exporter.passes.topk_count import fix_topk_counts
from leanvlm.exporter.pruners import PRUNERS, VisionTokens, parse
from leanvlm.exporter.pruners.agile import select_tokens
from leanvlm.exporter.pruners.base import ScoredBlock
from leanvlm.exporter.reference import Reference, relative_difference
from leanvlm.exporter.towers.base import Seen
from leanvlm.exporter.trace import trace
from leanvlm.runtime.manifest import VISION_OUTPUTS

Array = npt.NDArray[Any]
SPECS = [*sorted(PRUNERS), "agile:gate=entropy", "hybrid:gate=erank", "prumerge:sample=release", "vispruner:gate=erank"]
INPUTS = ("features", "hidden", "keys", "saliency", "unsplit")
FORBIDDEN = {"Loop", "If", "Scan", "NonZero", "Compress", "Unique", "ScatterElements", "ScatterND", "Scatter"}
GRID, KEEP, WIDTH = (24, 24), 64, 256
EXPORT_SECONDS = 60.0


class Chooser(nn.Module):
    """A pruner as a module: tensors in, tensors out."""

    def __init__(self, spec: str, keep: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.pruner = parse(spec, keep=keep)
        self.grid = grid

    def forward(self, features: Tensor, hidden: Tensor, keys: Tensor, saliency: Tensor, unsplit: Tensor) -> tuple[Tensor, ...]:
        """Return the indices, and the merged tokens of a pruner that merges."""
        kept = self.pruner(VisionTokens(features, Seen(hidden, keys, saliency, unsplit), self.grid))
        return (kept.indices,) if kept.hidden is None else (kept.indices, kept.hidden)


def tensors(tokens: VisionTokens) -> dict[str, Tensor]:
    return {name: getattr(tokens, name) for name in INPUTS}


def graph_of(spec: str, keep: int, grid: tuple[int, int], width: int, opset: int) -> onnx.ModelProto:
    chooser, example = Chooser(spec, keep, grid).eval(), tensors(exact_tokens(2, grid, 0, width))
    names = ("indices", "merged")[: len(chooser(*example.values()))]
    traced = trace(chooser, example, output_names=names, opset=opset)
    fix_topk_counts(traced)
    return ir.to_proto(traced)


@cache
def exported(spec: str) -> tuple[onnx.ModelProto, float]:
    """Return the full-size graph of a pruner, as for TensorRT, and the seconds of processor time that its export took."""
    start = time.process_time()
    return graph_of(spec, KEEP, GRID, WIDTH, opset=20), time.process_time() - start


def session_of(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("spec", SPECS)
def test_full_size_graph(spec: str) -> None:
    proto, seconds = exported(spec)
    onnx.checker.check_model(proto, full_check=True)
    ops = Counter(node.op_type for node in proto.graph.node)
    assert seconds < EXPORT_SECONDS
    assert not FORBIDDEN & set(ops)
    assert list(foreign_nodes(ir.from_proto(proto))) == []
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions
    assert max((len(node.input) for node in proto.graph.node if node.op_type == "Concat"), default=0) <= 32
    assert proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value == (576 if spec == "none" else KEEP)


@pytest.mark.parametrize("spec", SPECS)
def test_full_size_graph_chooses_as_torch_does(spec: str) -> None:
    """At the traced batch of 2 and at 3; the tokens' products are exact, so that not one index may differ."""
    session = session_of(exported(spec)[0])
    chooser = Chooser(spec, KEEP, GRID)
    for batch in (2, 3):
        inputs = tensors(exact_tokens(batch, GRID, batch, WIDTH))
        wanted = chooser(*inputs.values())
        found = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
        np.testing.assert_array_equal(found[0], wanted[0].numpy())
        for merged, other in zip(found[1:], wanted[1:], strict=True):
            np.testing.assert_allclose(merged, other.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("spec", SPECS)
def test_other_opsets(spec: str, opset: int) -> None:
    grid = (5, 6)
    proto = graph_of(spec, 7, grid, 64, opset)
    onnx.checker.check_model(proto, full_check=True)
    inputs = tensors(exact_tokens(3, grid, 1))
    session = session_of(proto)
    found = session.run(None, {i.name: inputs[i.name].numpy() for i in session.get_inputs()})
    assert proto.opset_import[0].version == opset
    np.testing.assert_array_equal(found[0], Chooser(spec, 7, grid)(*inputs.values())[0].numpy())


@pytest.mark.parametrize(("name", "scored"), [("visionzip", "feature"), ("prumerge", "last")])
def test_merged_tokens_are_projected_in_the_vision_graph(tiny_llava: Path, name: str, scored: ScoredBlock) -> None:
    """From pixels to embeddings, against the loops on what the unmodified model computes."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    model, grid = load_model(checkpoint), checkpoint.spec.grid
    parts = checkpoint.family.parts(model)
    graph = VisionGraph(parts.tower(scored, None, checkpoint.spec.shape), parts.project, parse(name, keep=20), grid).eval()
    pixels = torch.randn(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    traced = trace(graph, {"pixel_values": pixels}, output_names=VISION_OUTPUTS, opset=18)
    found = dict(zip(VISION_OUTPUTS, session_of(ir.to_proto(traced)).run(None, {"pixel_values": pixels.numpy()}), strict=True))
    original = Reference(checkpoint, model)
    for b, crop in enumerate(crops(original.vision(pixels.numpy(), scored))):
        chosen, merged = REFERENCE[name](crop, 20)
        assert found["keep_indices"][b].tolist() == chosen
        assert merged is not None
        wanted = original.project(torch.from_numpy(merged).float()).numpy()
        assert relative_difference(found["image_features"][b], wanted) < tolerances.MERGED["fp32"]


@pytest.mark.parametrize("spec", SPECS)
def test_builds_as_a_tensorrt_rtx_engine(spec: str) -> None:
    """An engine for an RTX 30 (SM 8.6) can be built on any machine."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(exported(spec)[0].SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    if network.num_inputs:
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            shape = tuple(tensor.shape)[1:]
            profile.set_shape(tensor.name, (1, *shape), (1, *shape), (4, *shape))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes > 0


class Selection(nn.Module):
    """The selection of `agile`, given the image's complexity."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, attention: Tensor, features: Tensor, ratio: Tensor) -> tuple[Tensor, ...]:
        """Return indices, the number selected and whether the selection converged."""
        return select_tokens(attention, features, ratio, keep=self.keep)


@cache
def selection(count: int, keep: int) -> onnxruntime.InferenceSession:
    """Return the selection as a graph with a free width."""
    example = (torch.rand(2, count), torch.randn(2, count, 256), torch.ones(2))
    batch, width = torch.export.Dim("B"), torch.export.Dim("D")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter's own deprecations.
        program = torch.onnx.export(
            Selection(keep).eval(), example, dynamo=True, opset_version=18, verbose=False,
            input_names=["attention", "features", "ratio"], output_names=["indices", "num_selected", "converged"],
            dynamic_shapes=({0: batch}, {0: batch, 2: width}, {0: batch}),
        )  # fmt: skip
    assert program is not None
    return session_of(program.model_proto)


def feature_set(rng: np.random.Generator, kind: str, count: int, width: int) -> Array:
    """Draw the features of one crop (N, D) in float32: `kind` is how their spectrum falls off."""
    if kind == "duplicates":
        centres = rng.normal(size=(count // 6, width))
        features = centres[rng.integers(0, len(centres), count)] + rng.uniform(0.05, 0.8) * rng.normal(size=(count, width))
        features[:: rng.integers(5, 20)] = features[0]
        return features.astype(np.float32)
    size = np.arange(1, width + 1)
    scale = {
        "iid": np.ones(width),
        "power": size ** -rng.uniform(0.5, 1.5),
        "exponential": np.exp(-size / rng.uniform(5, 80)),
    }[kind]
    # A common mean brings the cosines into the range of the thresholds.
    features = rng.normal(size=(count, width)) * scale + rng.uniform(0.5, 3.0) * scale * rng.normal(size=width)
    return features.astype(np.float32)


def exact_ratio(features: Array) -> float:
    """Return the effective rank of the centred features, in float64, over AgilePruner's reference of 90."""
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(centred @ centred.T), 0.0))
    share = singular[singular > 0] / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()) / 90.0)


def compare_selections(sets: int, seed: int, sizes: tuple[int, ...], widths: tuple[int, ...]) -> int:
    """Compare the exported selection with the loop on random sets; return how many draws were too close to a threshold."""
    rng = np.random.default_rng(seed)
    redrawn = done = 0
    while done < sets:
        kind = ("iid", "power", "exponential", "duplicates")[done % 4]
        count, width = int(rng.choice(sizes)), int(rng.choice(widths))
        keep = min(int(rng.choice((1, 32, 64, 128, 192, count))), count)
        features = feature_set(rng, kind, count, width)
        attention = rng.permutation(rng.dirichlet(np.full(count, 0.3))).astype(np.float32)
        ratio = exact_ratio(features)
        crop = Crop(features, features, features, attention, attention)
        expected, margin = agile_with_margin(crop, keep, ratio)
        if margin < 1e-6:
            redrawn += 1
            continue
        feed = {"attention": attention[None], "features": features[None], "ratio": np.array([ratio], np.float32)}
        indices, _, converged = selection(count, keep).run(None, feed)
        assert converged.all(), (kind, count, width, keep)
        assert indices[0].tolist() == expected, (kind, count, width, keep, margin)
        done += 1
    return redrawn


def test_agile_keeps_exactly_the_tokens_of_the_loop() -> None:
    assert compare_selections(24, seed=0, sizes=(144,), widths=(256, 512, 1024)) <= 24


@pytest.mark.slow
def test_agile_keeps_exactly_the_tokens_of_the_loop_200_times(capsys: pytest.CaptureFixture[str]) -> None:
    redrawn = compare_selections(200, seed=1, sizes=(144, 576, 729), widths=(256, 1024, 4096))
    with capsys.disabled():
        print(f"\n200 of 200 sets equal; {redrawn} draws had a distance within 1e-6 of its threshold")
    assert redrawn <= 200
