"""Vision graphs in int8: what is rounded, what is not, and that the verification holds it to the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tiny
import torch
from onnx_models import run, types

from leanvlm import ExportConfig, export
from leanvlm.demo import SAMPLES_DIR
from leanvlm.exporter.passes import rounded_products
from leanvlm.exporter.passes.rounded_products import BITS, BLOCK, round_products
from leanvlm.exporter.plan import plan
from leanvlm.exporter.reference import relative_difference
from leanvlm.exporter.rounding import rounded
from leanvlm.exporter.tolerances import BATCHED, FEATURES, OPENVINO_LOGITS
from leanvlm.runtime import load
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.errors import InputError, VerificationError

# Inputs that are no whole number of blocks, and outputs.
ROWS, COLUMNS = BLOCK + 40, 64
NBITS = "com.microsoft.MatMulNBits"


def product(name: str, *, turned: bool = False) -> tuple[ir.Model, np.ndarray]:
    """Return x W as a graph whose node has a name, and W (in, out); turned, the graph has W's transpose."""
    weight = np.random.default_rng(0).normal(0, 0.1, (ROWS, COLUMNS)).astype(np.float32)
    held = np.ascontiguousarray(weight.T) if turned else weight
    x = ir.Value(name="x", shape=ir.Shape(["n", ROWS]), type=ir.TensorType(ir.DataType.FLOAT))
    constant = ir.Value(name="w", shape=ir.Shape(held.shape), type=ir.TensorType(ir.DataType.FLOAT))
    constant.const_value = ir.Tensor(held, name="w")
    turning = [ir.node("Transpose", [constant], {"perm": [1, 0]})] if turned else []
    node = ir.node("MatMul", [x, turning[0].outputs[0] if turning else constant], name=name)
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    node.outputs[0].shape = ir.Shape(["n", COLUMNS])
    graph = ir.Graph([x], node.outputs, nodes=[*turning, node], initializers=[constant], opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10), weight


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["/vision/blocks/0/mlp/fc1/MatMul", "/project/merged/linear_1/MatMul"])
def test_a_product_is_that_with_rounded_weights(name: str, turned: bool) -> None:
    model, weight = product(name, turned=turned)
    assert round_products(model) == 1
    assert types(model) == {NBITS: 1}
    assert round_products(model) == 0
    # Whole numbers up to 127 are levels themselves: the kernel that rounds activations leaves them.
    x = np.random.default_rng(1).integers(-127, 128, (5, ROWS)).astype(np.float32)
    x[:, ::16] = 127
    wanted = x @ rounded(torch.from_numpy(weight.T.copy()), BITS, torch.float32, BLOCK).numpy().T
    np.testing.assert_allclose(run(model, {"x": x})["y"], wanted, atol=FEATURES["fp32"] * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["/prune/MatMul_3", "/decoder/layers.0/MatMul", "MatMul"])
def test_other_stages_stay(name: str) -> None:
    model, _ = product(name)
    assert round_products(model) == 0
    assert types(model) == {"MatMul": 1}


@pytest.mark.parametrize(
    ("target", "asked", "line"),
    [
        ("cuda", "int8", "--vision-precision does not go with target 'cuda'; it is for cpu: leave it out"),
        ("tensorrt", "fp32", "--vision-precision does not go with target 'tensorrt'; it is for cpu: leave it out"),
        ("cpu", "int4", "vision precision 'int4' is not known; known: fp32, int8"),
    ],
)
def test_what_cannot_be_is_refused(target: str, asked: str, line: str) -> None:
    with pytest.raises(InputError) as error:
        ExportConfig("demo", target=target, vision_precision=asked)  # type: ignore[arg-type]
    assert str(error.value) == line


@pytest.mark.parametrize("shape", ["qwen2_5_vl", "gemma3"])
def test_families_that_cannot_be_verified_are_refused(shape: str, tmp_path: Path) -> None:
    checkpoint = tiny.EVERY[shape](tmp_path / "checkpoint")
    with pytest.raises(InputError, match=f"not possible for '{shape}'"):
        plan(ExportConfig(str(checkpoint), (6,), tmp_path / "out", vision_precision="int8"))


def test_the_default_rounds_nothing(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest.vision_precision == "fp32"
    assert "rounded" not in manifest.verification
    assert all(NBITS not in types(ir.load(tiny_bundle / graph.file)) for graph in manifest.vision)


@pytest.fixture(scope="module")
def bundle(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounded") / "tiny"
    export(ExportConfig(str(tiny_llava), (16,), folder, vision_precision="int8"))
    return folder


def test_tower_and_projector_are_rounded_and_verified(bundle: Path, tiny_bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (manifest.precision, manifest.vision_precision) == ("fp32", "int8")
    for graph in manifest.vision:
        model, plain = ir.load(bundle / graph.file), ir.load(tiny_bundle / graph.file)
        names = [node.name or "" for node in model.graph if node.op_type == "MatMulNBits"]
        # Four blocks of six products, queries and keys of a fifth, the projector's two.
        assert len(names) >= 26
        assert {name.split("/")[1] for name in names} == {"vision", "project"}
        kept = [[node.name for node in one.graph if (node.name or "").startswith("/prune")] for one in (model, plain)]
        assert kept[0] == kept[1]
    measured = manifest.verification
    for name, graph in measured["vision"].items():
        # What eight bits cost is far over what the check lets pass.
        assert measured["rounded"][name]["features"] > 100 * graph["features"]
    sizes = [(folder / "vision.data").stat().st_size for folder in (bundle, tiny_bundle)]
    assert sizes[0] < sizes[1] / 2


def test_rows_of_a_batch_stay_independent(bundle: Path) -> None:
    images = [SAMPLES_DIR / "complex-9003.png", SAMPLES_DIR.parent / "photographs" / "coffee.jpg"]
    with load(bundle, cache_mb=0) as session:
        together = session.encode_images(images, 121)
        alone = [session.encode_images([image], 121)[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        rows, wanted = (np.asarray(features.crops[0].embeddings) for features in (one, other))
        assert relative_difference(rows, wanted) <= BATCHED["int8"]


def test_wrong_levels_are_found(tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rounded_products._quantised

    def wrong(weight: ir.Value, turned: bool) -> tuple[np.ndarray, np.ndarray]:
        levels, scales = right(weight, turned)
        levels[0, 0, 0] ^= 64
        return levels, scales

    monkeypatch.setattr(rounded_products, "_quantised", wrong)
    with pytest.raises(VerificationError, match="vision graph of budget"):
        export(ExportConfig(str(tiny_llava), (16,), tmp_path / "out", vision_precision="int8"))
    assert not (tmp_path / "out").exists()


def test_openvino_reads_it_too(bundle: Path) -> None:
    pytest.importorskip("openvino")
    image = SAMPLES_DIR / "complex-9003.png"
    with load(bundle) as plain, load(bundle, provider="openvino:f32") as session:
        wanted, found = (one.encode_images([image], 121)[0].crops[0].embeddings for one in (plain, session))
    difference = np.abs(np.asarray(found) - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max()
    assert difference < 2 * OPENVINO_LOGITS["int8"]
