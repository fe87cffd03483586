"""`leanvlm calibrate gate`: references against NumPy's own singular values, and what an export makes of the file."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from PIL import Image
from test_wrong_inputs import png
from transformers import LlavaForConditionalGeneration

from leanvlm.calibration.gate import MIN_IMAGES, Folder, TrainingScenes, errors, fit_gate, measure
from leanvlm.calibration.plot import Histogram, Lines, save_plot
from leanvlm.calibration.vision import VisionSide
from leanvlm.demo.built_in import BUILT_IN
from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.gate_file import GateFile, read_gate_file
from leanvlm.exporter.plan import plan
from leanvlm.exporter.pruners import AgilePruner
from leanvlm.exporter.pruners.gates import exact_effective_rank
from leanvlm.runtime import load
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.commands.inspection import describe
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.preprocess import preprocess


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small images, a file that is none, and a hidden file."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(MIN_IMAGES):
        levels = np.kron(rng.integers(0, 256, (4 + number, 5, 3)), np.ones((12, 12, 1)))
        Image.fromarray(levels.astype(np.uint8)).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def tiny_gate(tiny_llava: Path, pictures: Path) -> GateFile:
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    side, folder = VisionSide(checkpoint, load_model(checkpoint)), Folder(pictures)
    return fit_gate(side, folder, measure(side, folder, lambda count: None), [8, 64, 121])


def test_references_are_those_of_an_svd_of_transformers_features(tiny_llava: Path, pictures: Path, tiny_gate: GateFile) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32, attn_implementation="eager").eval()
    spec = open_checkpoint(ExportConfig(str(tiny_llava))).image_spec
    pixels = torch.from_numpy(preprocess([pictures / f"{n}.png" for n in range(MIN_IMAGES)], spec))
    with torch.no_grad():
        features = torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output)).double().numpy()
        out = model.model.vision_tower(pixels, output_attentions=True)
    values = [np.linalg.svd(f - f.mean(0), compute_uv=False) for f in features]
    shares = [v / v.sum() for v in values]
    ranks = [np.exp(-(s[s > 0] * np.log(s[s > 0])).sum()) for s in shares]
    attention = out.attentions[model.config.vision_feature_layer][:, :, 0, 1:].mean(1).double().numpy()
    attention /= attention.sum(1, keepdims=True)
    entropies = -(attention * np.log(attention)).sum(1)
    # Two fp32 implementations of the tower; see tolerances.FEATURES and ATTENTION.
    assert tiny_gate.erank_ref == pytest.approx(np.mean(ranks), rel=1e-4)
    assert tiny_gate.entropy_ref == pytest.approx(np.mean(entropies), rel=1e-4)


def test_no_picture_ends_the_calibration(tmp_path: Path, tiny_llava: Path, pictures: Path, tiny_gate: GateFile) -> None:
    """Whatever lies in the folder, the rest is measured, and every file that was left out is named."""
    folder = Path(shutil.copytree(pictures, tmp_path / "some"))
    (folder / "folder.png").mkdir()
    (folder / "broken.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "7.png").read_bytes()[:300])
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, 1))
    Image.new("RGB", (1, 100_000)).save(folder / "narrow.png")  # Opens; it is too large once resized for the model.
    os.mkfifo(folder / "pipe.png")
    checkpoint = open_checkpoint(ExportConfig(str(tiny_llava)))
    side, images = VisionSide(checkpoint, load_model(checkpoint)), Folder(folder)
    steps: list[int] = []
    gate = fit_gate(side, images, measure(side, images, steps.append), [8])
    bad = ["bomb.png", "broken.png", "cut.png", "empty.png", "loop.png", "narrow.png", "notes.txt", "pipe.png"]
    assert images.unreadable == bad
    assert images.left_out == ", ".join(bad)
    assert (gate.images, gate.erank_ref) == (tiny_gate.images, tiny_gate.erank_ref)
    assert sum(steps) <= len(images)


def test_what_is_compared_and_counted(tiny_gate: GateFile) -> None:
    assert tiny_gate.images == MIN_IMAGES
    assert tiny_gate.figures["unreadable"] == 1
    assert set(tiny_gate.figures["kept_overlap"]) == {"8", "64"}  # 121 is every token


@pytest.mark.parametrize("model", BUILT_IN)
def test_built_in_models_have_the_references_of_their_training_scenes(model: str) -> None:
    checkpoint = open_checkpoint(ExportConfig(model))
    found = measure(VisionSide(checkpoint, load_model(checkpoint)), TrainingScenes(24), lambda count: None).exact
    error = found.std(ddof=1) / len(found) ** 0.5
    assert checkpoint.erank_ref == pytest.approx(found.mean(), abs=3 * error)
    assert checkpoint.erank_ref == BUILT_IN[model].erank_ref != 90.0


def test_training_scenes_are_mixed_like_those_of_training() -> None:
    kinds = Counter(scene.kind for scene in TrainingScenes(100).scenes())
    assert sum(count for kind, count in kinds.items() if kind.endswith("-photo")) == 35
    assert kinds["complex"] + kinds["complex-photo"] > kinds["simple"] + kinds["simple-photo"] > 15
    # So that any part is like the whole.
    first = [scene.kind.endswith("-photo") for scene in TrainingScenes(100).scenes()][:40]
    assert 5 < sum(first) < 25


def test_errors_by_hand() -> None:
    found = errors(np.array([10.0, 20.0]), np.array([11.0, 20.0]))
    assert found == {"r2": 0.98, "mean_error": 0.05, "worst_error": 0.1}
    assert errors(np.array([5.0, 5.0]), np.array([5.0, 5.0]))["r2"] == 1.0


@pytest.mark.slow
def test_the_estimate_holds_on_the_built_in_scenes() -> None:
    checkpoint = open_checkpoint(ExportConfig("demo"))
    side, scenes = VisionSide(checkpoint, load_model(checkpoint)), TrainingScenes(32)
    gate = fit_gate(side, scenes, measure(side, scenes, lambda count: None), [64])
    assert gate.figures["estimator"]["worst_error"] < 0.01
    assert gate.figures["kept_overlap"]["64"]["worst"] >= 0.95


def test_file_is_read_back_equal(tmp_path: Path, tiny_gate: GateFile) -> None:
    whole = GateFile("name", "0" * 64, 8, "here", 3.0, 2.0, {"a": [1]}, {"torch": "2"})
    for gate in (whole, tiny_gate):
        (tmp_path / "gate.json").write_bytes(gate.to_bytes())
        assert read_gate_file(tmp_path / "gate.json") == gate


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 1}, "schema 2"),
        ({"erank_ref": 0}, "erank_ref is 0.0"),
        ({"erank_ref": "many"}, "valid"),
        ({"entropy_ref": float("nan")}, "NaN is not a number in JSON"),
        ({"images": None}, "images is null; it must be a whole number"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, tiny_gate: GateFile, change: dict[str, object], words: str) -> None:
    path = tmp_path / "gate.json"
    path.write_bytes(tiny_gate.to_bytes())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=words):
        read_gate_file(path)


def test_an_export_takes_the_file_s_values_where_the_spec_sets_none(
    tmp_path: Path, tiny_llava: Path, tiny_gate: GateFile
) -> None:
    path = tmp_path / "gate.json"
    path.write_bytes(tiny_gate.to_bytes())
    asked = ExportConfig(str(tiny_llava), (8,), tmp_path / "out", "agile:entropy_ref=3.5", gate_file=path)
    pruner = plan(asked).vision[0].pruner
    assert isinstance(pruner, AgilePruner)
    assert pruner == AgilePruner(keep=8, erank_ref=tiny_gate.erank_ref, entropy_ref=3.5)


def test_a_reference_travels_into_graph_and_manifest(tmp_path: Path, leanvlm: Command) -> None:
    checkpoint = open_checkpoint(ExportConfig("demo-small"))
    path, bundle = tmp_path / "gate.json", tmp_path / "small-64"
    path.write_bytes(GateFile("leanvlm-demo-small", checkpoint.source().sha256, 8, "test", 60.0, 5.5).to_bytes())
    result = leanvlm("export", "--model", "demo-small", "--gate-file", path, "-o", bundle)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(bundle)
    assert (manifest.source.id, manifest.source.licence) == ("leanvlm-demo-small", "apache-2.0")
    assert manifest.pruner.params["erank_ref"] == 60.0
    assert manifest.pruner.gate is not None
    assert manifest.pruner.gate["file"] == "gate.json"
    assert "erank_ref=60.0" in describe(bundle, manifest)
    pictures = list(TrainingScenes(8))
    tokens = VisionSide(checkpoint, load_model(checkpoint)).tokens(pictures)
    with load(bundle) as session:
        pruned, whole = (session.encode_images(pictures, budget) for budget in (64, 576))
    exact = exact_effective_rank(tokens.features).tolist()
    assert [image.crops[0].pruning.effective_rank for image in pruned] == pytest.approx(exact, rel=0.02)
    # Only the gate pays for a rank.
    assert {image.crops[0].pruning.effective_rank for image in whole} == {None}
    checked = manifest.verification["vision"]
    assert checked["64"]["effective_rank"]["error"] < 0.02
    assert "effective_rank" not in checked["576"]


def test_command_line(tmp_path: Path, tiny_llava: Path, pictures: Path, leanvlm: Command) -> None:
    output = tmp_path / "mine.json"
    result = leanvlm("calibrate", "gate", "--model", tiny_llava, "--images", pictures, "-o", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(output)
    assert "notes.txt" in result.stderr
    assert read_gate_file(output).images == MIN_IMAGES
    with Image.open(output.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
    again = leanvlm("calibrate", "gate", "--model", tiny_llava, "--images", pictures, "-o", output)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("calibrate gate", "Missing option '--model'"),
        ("calibrate gate --model llava", "--images is missing"),
        ("calibrate gate --model demo --scenes 3", "at least 8 images"),
        ("calibrate gate --model demo --images nowhere", "not a folder"),
        ("calibrate gate --model demo --images . --scenes 9", "exclude each other"),
        ("calibrate gate --model demo -o nowhere/gate.json", "does not exist"),
        ("export --model demo --gate-file nowhere.json", "cannot be read"),
    ],
)
def test_wrong_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvlm: Command, arguments: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = leanvlm(*arguments.split())
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert words in result.stderr
    assert not list(tmp_path.iterdir())


def test_too_few_usable_images(tmp_path: Path, tiny_llava: Path, pictures: Path, leanvlm: Command) -> None:
    shutil.copytree(pictures, tmp_path / "some")
    (tmp_path / "some" / "0.png").write_bytes(b"broken")
    result = leanvlm("calibrate", "gate", "--model", tiny_llava, "--images", tmp_path / "some", "-o", tmp_path / "gate.json")
    assert result.returncode == 2
    assert "only 7 of 9 files are usable images" in result.stderr
    assert "left out: 0.png, notes.txt" in result.stderr
    assert not (tmp_path / "gate.json").exists()


def test_a_gate_file_of_another_model_is_refused(tmp_path: Path, tiny_gate: GateFile, leanvlm: Command) -> None:
    path = tmp_path / "gate.json"
    path.write_bytes(tiny_gate.to_bytes())
    result = leanvlm("export", "--model", "demo", "--gate-file", path, "-o", tmp_path / "out")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "was measured on tiny-llava" in result.stderr


def test_a_gate_file_needs_a_pruner_with_a_gate(tmp_path: Path, tiny_llava: Path, tiny_gate: GateFile) -> None:
    path = tmp_path / "gate.json"
    path.write_bytes(tiny_gate.to_bytes())
    with pytest.raises(InputError, match="'attention' has none"):
        plan(ExportConfig(str(tiny_llava), (8,), tmp_path / "out", "attention", gate_file=path))


def test_plots_show_their_series(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    names = [f"method {n}" for n in range(9)]
    lines = Lines("title", "x", "y", {name: [(32, n), (64, n + 1)] for n, name in enumerate(names)}, ("level", 5.0))
    save_plot(path, [lines, Histogram("title", "x", {"values": [1.0, 2.0, 2.0]}, ("mean", 5 / 3))])
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    for wanted in ("#D55E00", "#0072B2", "#009E73", "#000000"):
        rgb = tuple(int(wanted[k : k + 2], 16) for k in (1, 3, 5))
        assert rgb in colours
    save_plot(path, [Histogram("all alike", "x", {"values": [3.0, 3.0]})])
    assert path.stat().st_size > 0
