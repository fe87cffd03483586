"""What commands say and draw of images that are cut into tiles, against transformers' own processors and slow loops."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from conftest import Command
from PIL import Image
from transformers import AutoImageProcessor

from leanvlm import ExportConfig, export
from leanvlm.calibration import gate
from leanvlm.calibration.study import pruners_of
from leanvlm.calibration.vision import VisionSide
from leanvlm.exporter.checkpoint import open_checkpoint
from leanvlm.exporter.config import parse_budgets
from leanvlm.exporter.gate_file import read_gate_file
from leanvlm.exporter.plan import plan
from leanvlm.runtime import load
from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.bundle import read_manifest
from leanvlm.runtime.commands.profile_report import _compared
from leanvlm.runtime.crops import Arrangement, CropShape
from leanvlm.runtime.errors import CheckpointError, UnsupportedModelError
from leanvlm.runtime.layout import CropFeatures, ImageFeatures, Layout, image_tokens

pytestmark = pytest.mark.filterwarnings("ignore:a bundle for tensorrt-rtx runs on cpu")
KEPT = 6
SIZES = [(300, 200), (90, 60), (60, 200), (40, 40), (70, 70), (211, 140), (300, 80), (30, 400), (140, 140)]


@dataclass(frozen=True)
class Cut:
    """A bundle, its checkpoint, and how 300 x 200 pixels are cut: rows and columns of tiles, tokens, where the whole stands."""

    bundle: Path
    checkpoint: Path
    tiles: tuple[int, int]
    pixels: int
    cells: int
    thumbnail: str

    def kept(self, picture: Path) -> list[Pruning]:
        """Return what pruning does to a picture's crops."""
        with load(self.bundle, device="cpu") as session:
            return [crop.pruning for crop in session.encode_images([picture], KEPT)[0].crops]


@pytest.fixture(scope="session")
def llava_next(tile_bundle: Callable[[str], Path]) -> Cut:
    bundle = tile_bundle("llava_next")
    return Cut(bundle, bundle.parent / "checkpoint", (2, 2), 70, 5, "first")


@pytest.fixture(scope="session")
def smolvlm(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """A bundle for TensorRT-RTX, at 60 of 90 tokens, which are 6 of a crop's 9; the tile that shows all stands last."""
    folder = tmp_path_factory.mktemp("smolvlm")
    checkpoint = tiny.TINY["smolvlm"](folder / "checkpoint")
    # In fp32, so that no near tie of a random model is chosen otherwise.
    export(ExportConfig(str(checkpoint), parse_budgets("60/90"), folder / "bundle", target="tensorrt-rtx", precision="fp32"))
    return Cut(folder / "bundle", checkpoint, (2, 3), 84, 3, "last")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of different sizes, lighter than any padding."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for number, (width, height) in enumerate(SIZES):
        coarse = Image.fromarray(rng.integers(60, 256, (9, 11, 3)).astype(np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def picture(pictures: Path) -> Path:
    return pictures / "0.png"


# --- run ----------------------------------------------------------------------------------------------------------------


def shown(crops: list[Pruning]) -> int:
    """Count the kept tokens that show 300 x 200 pixels on 2 x 2 tiles: all of the first crop, of the others lines 2 to 7."""
    count = crops[0].kept
    for at, crop in enumerate(crops[1:]):
        for index in crop.indices:
            count += 2 <= at // 2 * 5 + index // 5 < 8
    return count


def test_json_of_one_image_has_its_tiles_and_crops(leanvlm: Command, llava_next: Cut, picture: Path) -> None:
    command = ["run", llava_next.bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 2, "--json"]
    result = leanvlm(*command)
    pruning = json.loads(result.stdout)["pruning"]
    assert list(pruning) == ["pruner", "kept", "total", "tiles", "crops"]
    kept, crops = shown(llava_next.kept(picture)), pruning["crops"]
    assert (pruning["pruner"], pruning["kept"], pruning["total"], pruning["tiles"]) == ("agile", kept, 85, [2, 2])
    assert f"{kept} of 85 image tokens" in result.stderr
    assert [(crop["kept"], crop["total"]) for crop in crops] == [(KEPT, 25)] * 5
    names = {"kept", "total", "effective_rank", "attention_entropy", "num_selected", "converged"}
    assert all(crop.keys() == names for crop in crops)
    whole = json.loads(leanvlm(*command, "--budget", 25).stdout)["pruning"]
    assert (whole["pruner"], whole["kept"], whole["total"]) == ("none", 85, 85)


def test_json_of_two_images_sums_them(leanvlm: Command, llava_next: Cut, pictures: Path) -> None:
    images = ["--image", pictures / "0.png", "--image", pictures / "6.png"]
    options = ["--prompt", "What?", "--max-new-tokens", 2, "--json"]
    pruning = json.loads(leanvlm("run", llava_next.bundle, *images, *options).stdout)["pruning"]
    assert [(image["tiles"], len(image["crops"])) for image in pruning["images"]] == [([2, 2], 5), ([1, 3], 4)]
    for name in ("kept", "total"):
        assert pruning[name] == sum(image[name] for image in pruning["images"])


# --- The picture --------------------------------------------------------------------------------------------------------


def seen(cut: Cut, picture: Path) -> npt.NDArray[np.float64]:
    """Return the crops (C, H, W, 3) as transformers' own processor cuts them, as levels."""
    processor: Any = AutoImageProcessor.from_pretrained(cut.checkpoint)
    with Image.open(picture) as image:
        pixels = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return 255 * (pixels * std + mean).transpose(0, 2, 3, 1)


def corners(cut: Cut) -> list[tuple[int, int]]:
    """Return where the crops begin, in order: two white pixels between tiles, twelve to the whole image above or below."""
    rows, columns = cut.tiles
    step = cut.pixels + 2
    if cut.thumbnail == "first":
        return [(0, 0), *((cut.pixels + 12 + row * step, column * step) for row in range(rows) for column in range(columns))]
    tiles = [(row * step, column * step) for row in range(rows) for column in range(columns)]
    return [*tiles, (rows * step - 2 + 12, 0)]


@pytest.mark.parametrize("command", ["run", "inspect"])
@pytest.mark.parametrize("name", ["llava_next", "smolvlm"])
def test_kept_cells_are_bright_at_the_right_tile(
    leanvlm: Command, picture: Path, tmp_path: Path, request: pytest.FixtureRequest, name: str, command: str
) -> None:
    cut: Cut = request.getfixturevalue(name)
    options = ["--prompt", "What?", "--max-new-tokens", 2] if command == "run" else []
    arguments = [command, cut.bundle, "--image", picture, "--device", "cpu", *options, "--overlay", tmp_path / "kept.png"]
    result = leanvlm(*arguments)
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "kept.png") as image:
        drawn = np.asarray(image.convert("RGB")).astype(float)
    rows, columns = cut.tiles
    size = (rows * (cut.pixels + 2) - 2 + 12 + cut.pixels, columns * (cut.pixels + 2) - 2)
    assert drawn.shape == (size[0], 2 * size[1] + 12, 3)
    expected, crops = np.full((*size, 3), 255.0), cut.kept(picture)
    cell, hottest = cut.pixels // cut.cells, max(float(crop.attention.max()) for crop in crops)
    for levels, crop, (top, left) in zip(seen(cut, picture), crops, corners(cut), strict=True):
        for index in range(cut.cells**2):
            y, x = index // cut.cells * cell, index % cut.cells * cell
            light = 1.0 if index in crop.indices else 0.22
            expected[top + y : top + y + cell, left + x : left + x + cell] = light * levels[y : y + cell, x : x + cell]
            heat = drawn[top + y + cell // 2, size[1] + 12 + left + x + cell // 2]
            assert (heat.min() == 255) == (crop.attention[index] == hottest)
    # Levels are cut to whole numbers.
    assert np.abs(drawn[:, : size[1]] - expected).max() <= 1.01


# --- inspect and profile ------------------------------------------------------------------------------------------------


def test_inspect_says_how_an_image_is_cut(leanvlm: Command, llava_next: Cut, picture: Path) -> None:
    lines = leanvlm("inspect", llava_next.bundle, "--image", picture).stdout.splitlines()
    kept = shown(llava_next.kept(picture))
    assert "budgets   6, 25 of 25 image tokens a crop" in lines
    assert "crops     up to 5 of 70 x 70 pixels an image" in lines
    assert "crops             5: 2 x 2 tiles (rows x columns) and the whole image" in lines
    assert f"kept              {kept} of 85 image tokens" in lines
    (merit,) = (line for line in lines if line.startswith("on merit"))
    selected, filled = map(int, re.findall(r"\d+", merit)[:2])
    assert selected + filled == 5 * KEPT
    assert ("were padding" in merit) == (kept < 5 * KEPT)
    whole = leanvlm("inspect", llava_next.bundle, "--image", picture, "--budget", 25).stdout
    assert "kept              85 of 85 image tokens" in whole
    assert "on merit" not in whole


def test_profile_counts_the_tokens_of_all_crops(leanvlm: Command, llava_next: Cut, picture: Path, tmp_path: Path) -> None:
    reports = ["--json", tmp_path / "figures.json", "--html", tmp_path / "page.html"]
    few = ["--runs", 1, "--warmup", 0, "--max-new-tokens", 2]
    result = leanvlm("profile", llava_next.bundle, "--image", picture, *few, *reports)
    assert result.returncode == 0, result.stderr
    budgets = json.loads((tmp_path / "figures.json").read_text())["budgets"]
    kept = shown(llava_next.kept(picture))
    assert {budget: figures["image_tokens"] for budget, figures in budgets.items()} == {
        "6": {"total": 85, "kept": kept},
        "25": {"total": 85, "kept": 85},
    }
    assert {figures["crops"] for figures in budgets.values()} == {5}
    assert "1 runs, 5 crops an image" in result.stdout
    assert "1 runs, 5 crops an image" in (tmp_path / "page.html").read_text()
    assert f"{kept} of 85 tokens" in result.stdout


# --- calibrate and eval -------------------------------------------------------------------------------------------------


def test_a_gate_file_counts_images_and_crops(
    leanvlm: Command, llava_next: Cut, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images go through the tower in batches of eight crops or, where one becomes more, alone."""
    batches: list[tuple[int, int]] = []
    by_shape = VisionSide.by_shape

    def noted(side: VisionSide, images: Any, *arguments: Any) -> Any:
        found = by_shape(side, images, *arguments)
        batches.append((len(images), sum(len(one.features) for one in found)))
        return found

    monkeypatch.setattr(VisionSide, "by_shape", noted)
    output = tmp_path / "gate.json"
    asked = ["--model", llava_next.checkpoint, "--images", pictures, "--budget", "30/125,9", "-o", output]
    result = leanvlm("calibrate", "gate", *asked)
    assert result.returncode == 0, result.stderr
    crops = sum(len(seen(llava_next, pictures / f"{number}.png")) for number in range(len(SIZES)))
    assert f"measured          {crops} crops of 9 images" in result.stdout
    assert (sum(images for images, _ in batches), sum(count for _, count in batches)) == (9, crops)
    assert all(images == 1 or count <= gate.BATCH for images, count in batches)
    found = read_gate_file(output)
    assert (found.images, found.figures["crops"]) == (9, crops)
    assert {budget: values["crops"] for budget, values in found.figures["kept_overlap"].items()} == {"6": crops, "9": crops}
    request = plan(ExportConfig(str(llava_next.checkpoint), (KEPT,), tmp_path / "out", gate_file=output))
    assert request.gate is not None
    assert (request.gate["images"], request.vision[0].pruner.erank_ref) == (9, found.erank_ref)  # type: ignore[attr-defined]


def test_crops_do_not_make_up_for_images(leanvlm: Command, llava_next: Cut, pictures: Path, tmp_path: Path) -> None:
    """Three pictures are fifteen crops, and too few."""
    folder = tmp_path / "few"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes((pictures / "0.png").read_bytes() if number < 3 else b"none")
    asked = ["--model", llava_next.checkpoint, "--images", folder, "-o", tmp_path / "gate.json"]
    result = leanvlm("calibrate", "gate", *asked)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "only 3 of 8 files are usable images" in result.stderr


@pytest.mark.parametrize("name", ["internvl", "smolvlm/whole"])
def test_models_that_need_more_than_tokens_are_evaluated_as_bundles(tmp_path: Path, name: str) -> None:
    """One is cut into tiles, the other has marks around its one crop."""
    checkpoint = open_checkpoint(ExportConfig(str(tiny.TINY[name](tmp_path / "checkpoint"))))
    with pytest.raises(UnsupportedModelError, match="leanvlm export it, then leanvlm eval the bundle"):
        pruners_of(checkpoint, ["agile"], [1])


# --- build --------------------------------------------------------------------------------------------------------------


def test_engines_have_room_for_an_image_of_the_most_crops(leanvlm: Command, smolvlm: Cut, tmp_path: Path) -> None:
    """However few positions are asked for, all crops of one image fit, pruned, with what stands around them."""
    pytest.importorskip("tensorrt_rtx")
    Image.new("RGB", (250, 250), (90, 160, 60)).save(tmp_path / "square.png")
    options = ["--image", tmp_path / "square.png", "--prompt", "What?", "--max-new-tokens", 2, "--json"]
    answer = json.loads(leanvlm("run", smolvlm.bundle, "--device", "cpu", *options).stdout)
    assert (answer["pruning"]["tiles"], answer["pruning"]["kept"]) == ([3, 3], 10 * KEPT)
    asked = ["--engine", "tensorrt-rtx", "--sm", "89", "--max-prompt", 50, "--max-positions", 60, "--dry-run"]
    result = leanvlm("build", smolvlm.bundle, *asked)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"--onnx=(\S+)", result.stdout) == ["vision_6.onnx", "vision_9.onnx", "decoder.onnx"]
    assert "--maxShapes=pixel_values:4x3x84x84" in result.stdout
    room = max(map(int, re.findall(r"inputs_embeds:1x(\d+)x128", result.stdout)))
    assert answer["prompt_tokens"] <= room <= read_manifest(smolvlm.bundle).decoder.context_length


def test_the_manifest_has_a_share_as_a_number(smolvlm: Cut) -> None:
    assert read_manifest(smolvlm.bundle).budgets == (KEPT, 9)


# --- More tiles than are left unpruned ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "counts"), [(20, (340, 425)), (25, (74, 74))])
def test_tokens_are_kept_of_those_that_there_were(kept: int, counts: tuple[int, int]) -> None:
    """17 crops of 25 tokens: unpruned, the 400 of 16 tiles are interpolated to the 49 of about two."""
    shape = CropShape((70, 70), (5, 5))
    pruning = Pruning(kept, None, kept, True, np.arange(kept), np.ones(25, np.float32), shape)
    crops = (CropFeatures(np.zeros((kept, 4), np.float32), pruning),) * 17
    image = ImageFeatures(crops, Arrangement((4, 4), "first"))
    found = image_tokens(image, Layout(mosaic=True, row_end="line", limit=2))
    assert (found.kept, found.total) == counts


@pytest.mark.parametrize(
    ("budgets", "speedup", "words"),
    [
        (2, 2.5, "2.50 times sooner than unpruned"),
        (2, 0.8, "1.25 times later than unpruned"),
        (1, 1.0, "measured of the unpruned model alone"),
    ],
)
def test_what_is_later_is_not_called_sooner(budgets: int, speedup: float, words: str) -> None:
    assert words in _compared({"budgets": dict.fromkeys(range(budgets)), "speedup": speedup})


def test_a_mark_that_is_the_image_token_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = tiny.TINY["internvl"](tmp_path / "checkpoint")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"start_image_token": "<image>"}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has '<image>' in a mark around images"):
        plan(ExportConfig(str(checkpoint), (4,), tmp_path / "bundle"))
