"""Training: what a batch holds, what the network computes, and a run from its first step to the written folder."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from leanvlm.calibration import model_card
from leanvlm.demo import MODEL_DIR, SMALL_DIR
from leanvlm.demo.mixture import Mixture
from leanvlm.demo.packing import pack
from leanvlm.demo.render import Renderer
from leanvlm.demo.scenes import COLORS, KINDS, PHOTO_KINDS, SHAPES, Kind, Scene, held_out_questions, make_scene
from leanvlm.demo.training import train
from leanvlm.demo.training.batches import IGNORED, QUESTION_TOKENS, QUESTIONS, Batch, Script, draw_batch, drawn, make_batch
from leanvlm.demo.training.canvas import NOTHING, SHAPE_CLASSES, Canvas, PatchLabels
from leanvlm.demo.training.checkpoint import named_weights, read_folder, write_folder
from leanvlm.demo.training.examine import examine
from leanvlm.demo.training.muon import Muon, orthogonalised
from leanvlm.demo.training.network import SIZES, Twin, normalised
from leanvlm.demo.training.objective import Objective, Tokens, choose
from leanvlm.demo.training.recipe import Recipe
from leanvlm.demo.training.train import Options
from leanvlm.runtime.errors import InputError

CPU = torch.device("cpu")
IMAGE_TOKEN = 3


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(seed, kind) for kind in (*PHOTO_KINDS, *KINDS) for seed in (0, 3)]


@pytest.fixture(scope="module")
def twin() -> Twin:
    """A network with no weight left at zero."""
    torch.manual_seed(0)
    made = Twin(SIZES["tiny"])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.15)
    return made.eval()


def flat(batch: Batch) -> list[Any]:
    arrays = {**vars(batch), **vars(batch.scenes)}
    return [array for name, array in sorted(arrays.items()) if name != "scenes"]


def test_processes_that_draw_load_no_torch() -> None:
    code = "import sys, leanvlm.demo.training.batches; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_batch_depends_on_seed_and_step_not_on_workers(script: Script) -> None:
    mixture = Mixture(images=4)
    here = [draw_batch(mixture, 1, step, script) for step in range(2, 5)]
    for one, other in zip(here, drawn(mixture, 1, range(2, 5), workers=2), strict=True):
        for left, right in zip(flat(one), flat(other), strict=True):
            np.testing.assert_array_equal(left, right)
    assert not np.array_equal(here[0].ids, draw_batch(mixture, 0, 2, script).ids)


def test_batches_are_drawn_from_training_seeds_in_the_mixture(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, Kind]] = []

    def noted(seed: int, kind: Kind) -> Scene:
        asked.append((seed, kind))
        return make_scene(seed, kind)

    monkeypatch.setattr("leanvlm.demo.mixture.make_scene", noted)
    draw_batch(Mixture(images=200), 0, 0, script)
    seeds, kinds = zip(*asked, strict=True)
    assert min(seeds) >= 10**9
    assert len(set(seeds)) == 200
    assert [kind.endswith("-photo") for kind in kinds] == [True] * 70 + [False] * 130
    assert 0.4 < sum("complex" in kind for kind in kinds) / 200 < 0.7


def test_slots_hold_questions_and_targets_the_answers(script: Script, scenes: list[Scene]) -> None:
    batch = make_batch(scenes, script)
    decode = script._tokenizer.decode
    for row, scene in enumerate(scenes):
        for slot, question in enumerate(held_out_questions(scene)):
            slot = QUESTIONS if question.kind == "caption" else slot
            start = slot * QUESTION_TOKENS
            end = start + QUESTION_TOKENS if slot < QUESTIONS else None
            ids, targets = batch.ids[row, start:end], batch.targets[row, start:end]
            text = decode(ids[ids > 0].tolist(), skip_special_tokens=False)
            assert text == f"\n{question.text} ASSISTANT: {question.answer}</s>"
            assert decode(targets[targets != IGNORED].tolist(), skip_special_tokens=False) == f" {question.answer}</s>"
            asked = np.flatnonzero(targets != IGNORED)
            np.testing.assert_array_equal(ids[asked + 1], targets[asked])


def test_contents_and_digits_are_the_scenes(script: Script, scenes: list[Scene]) -> None:
    batch = make_batch(scenes, script)
    for row, scene in enumerate(scenes):
        there = {f"{COLORS[i // 8]} {SHAPES[i % 8]}" for i in np.flatnonzero(batch.contents[row, :64])}
        assert there == {f"{o.color} {o.shape}" for o in scene.objects}
        assert batch.contents[row, 64] == (scene.sign is not None)
        text = scene.sign.text if scene.sign else ""
        assert batch.digits[row].tolist() == [int(digit) for digit in text] + [10] * (4 - len(text))


def test_canvas_draws_what_the_renderer_draws(scenes: list[Scene]) -> None:
    canvas, renderer = Canvas(CPU, compiled=False).images(pack(scenes)).int(), Renderer("cpu").images(scenes).int()
    difference = (canvas - renderer).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3


def test_patch_labels_are_where_the_objects_are_drawn() -> None:
    scenes = [make_scene(seed, "complex") for seed in range(6)]
    assert any(scene.sign for scene in scenes)
    empty = [dataclasses.replace(scene, objects=(), sign=None) for scene in scenes]
    renderer = Renderer("cpu")
    changed = (renderer.images(scenes).int() != renderer.images(empty).int()).any(1)
    covered = changed.view(-1, 24, 14, 24, 14).float().mean((2, 4)).flatten(1)
    labels = Canvas(CPU, compiled=False).labels(pack(scenes))
    assert (labels.shapes[covered == 0] == 0).all()
    assert (labels.shapes[covered > 0.6] > 0).all()
    for row, scene in enumerate(scenes):
        for number, thing in enumerate(scene.objects, 1):
            x = thing.cx + (0.7 * thing.radius if thing.shape == "ring" else 0)
            patch = int(thing.cy // 14) * 24 + int(x // 14)
            assert labels.shapes[row, patch] == SHAPES.index(thing.shape) + 1
            assert labels.colors[row, patch] == COLORS.index(thing.color) + 1
            assert labels.objects[row, patch] == number
            assert labels.centers[row, patch] == int(thing.cy // 14) * 24 + int(thing.cx // 14)
        if scene.sign is not None:
            center = int(scene.sign.cy // 14) * 24 + int(scene.sign.cx // 14)
            assert set(labels.centers[row][labels.shapes[row] == SHAPE_CLASSES - 1].tolist()) == {center}
        assert torch.equal(labels.centers[row] == NOTHING, labels.shapes[row] == 0)
        digits = set(labels.digits[row].tolist()) - {0, 1}
        assert digits == {int(digit) + 2 for digit in (scene.sign.text if scene.sign else "")}


def test_muon_steps_along_the_nearest_orthogonal_matrix() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(96, 16)
    left, _, right = torch.linalg.svd(gradient[:48].T, full_matrices=False)
    nearest = left @ right
    found = orthogonalised(gradient[:48].T[None])[0].float()
    # The steps end near 1, not at it (Jordan et al., 2024).
    assert torch.linalg.svdvals(found).sub(1).abs().max() < 0.4
    assert nn.functional.cosine_similarity(found.flatten(), nearest.flatten(), dim=0) > 0.97

    parameter = nn.Parameter(torch.ones(96, 16))
    parameter.grad = gradient
    Muon([(parameter, 2)], momentum=0.95, decay=0.5, compiled=False).step(0.1)
    expected = 0.95 - 0.1 * 0.2 * 48**0.5 * found.T
    torch.testing.assert_close(parameter.data[:48], expected, atol=5e-3, rtol=0)


def test_written_folder_is_the_same_function_in_transformers(
    twin: Twin, script: Script, scenes: list[Scene], tmp_path: Path
) -> None:
    write_folder(twin, tmp_path)
    rounded = read_folder(tmp_path)
    model: Any
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    shown = scenes[:2]
    batch, images = make_batch(shown, script), normalised(Renderer("cpu").images(shown), torch.float32)
    ids = torch.from_numpy(batch.ids)
    with torch.no_grad():
        logits = _twin_logits(rounded, script, images, ids, torch.arange(576).expand(2, -1), 576)
        for row, slot in ((0, 0), (1, 3), (1, QUESTIONS)):
            start = slot * QUESTION_TOKENS
            asked = ids[row, start : start + QUESTION_TOKENS]
            prompt = torch.tensor([*script.head, *[IMAGE_TOKEN] * 576, *asked.tolist()])[None]
            theirs = model(input_ids=prompt, pixel_values=images[row : row + 1]).logits[0, -QUESTION_TOKENS:]
            torch.testing.assert_close(logits[row, start : start + QUESTION_TOKENS], theirs, atol=2e-4, rtol=1e-3)


def test_dropped_tokens_are_as_if_they_had_never_been_there(
    twin: Twin, script: Script, scenes: list[Scene], tmp_path: Path
) -> None:
    write_folder(twin, tmp_path)
    rounded = read_folder(tmp_path)
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    shown = scenes[:2]
    images = normalised(Renderer("cpu").images(shown), torch.float32)
    ids = torch.from_numpy(make_batch(shown, script).ids)
    order = choose(Canvas(CPU, compiled=False).labels(pack(shown)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = _twin_logits(rounded, script, images, ids, order, 40)
        features = torch.stack(list(model.model.get_image_features(images, return_dict=True).pooler_output))
        embed = model.get_input_embeddings()
        for row in range(2):
            kept = features[row][order[row, :40].sort().values]
            inputs = torch.cat([embed(torch.tensor(script.head)), kept, embed(ids[row, :QUESTION_TOKENS])])
            theirs = model(inputs_embeds=inputs[None]).logits[0, -QUESTION_TOKENS:]
            torch.testing.assert_close(logits[row, :QUESTION_TOKENS], theirs, atol=2e-4, rtol=1e-3)


def _twin_logits(twin: Twin, script: Script, images: Tensor, ids: Tensor, order: Tensor, kept: int) -> Tensor:
    order, positions, visible = Tokens(len(script.head), CPU).keep(order, kept)
    tokens = twin.project(twin.vision(images)[0])
    tokens = torch.gather(tokens, 1, order[:, :, None].expand_as(tokens))
    return twin.answer(torch.tensor(script.head), tokens, ids, positions, visible)


def test_shipped_weights_go_through_the_twin_and_back(tmp_path: Path) -> None:
    shipped = read_folder(MODEL_DIR)
    write_folder(shipped, tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(MODEL_DIR / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((MODEL_DIR / "config.json").read_text())
    found = examine(shipped, 3, CPU)
    assert found.keys() == {*KINDS, *PHOTO_KINDS}
    assert np.mean([found[kind]["answers"] for kind in KINDS]) > 0.99


def test_small_model_has_at_most_three_mebibytes() -> None:
    assert 2 * sum(weight.numel() for _, weight in named_weights(Twin(SIZES["small"]))) < 3 * 2**20 - 20_000


def made_labels(images: int, objects: Tensor, shapes: Tensor) -> PatchLabels:
    """Labels (576,) of one image, repeated; colours, digits and centres do not count in choosing."""
    repeated = (labels.expand(images, -1) for labels in (shapes, shapes, shapes, objects, objects))
    return PatchLabels(*repeated)


def test_tokens_under_objects_are_favoured_in_most_images() -> None:
    objects = torch.zeros(576, dtype=torch.long)
    objects[::8] = 1
    first = choose(made_labels(2000, objects, objects), torch.Generator().manual_seed(0))[:, :64]
    share = (first % 8 == 0).float().mean(1)
    # By chance 0.125; a factor of e^4 gives 0.8, as the 64 nearly use up the 72 under the object.
    assert 0.11 < share[share < 0.25].mean() < 0.14
    assert 0.45 < (share > 0.3).float().mean() < 0.6
    assert 0.17 < (share > 0.8).float().mean() < 0.27


def test_objects_of_an_image_are_favoured_unequally() -> None:
    objects = torch.zeros(576, dtype=torch.long)
    objects[::16], objects[8::16] = 1, 2
    first = choose(made_labels(2000, objects, objects), torch.Generator().manual_seed(0))[:, :64]
    one, other = ((first % 16 == offset).float().sum(1) for offset in (0, 8))
    uneven = torch.maximum(one, other) > 2 * torch.minimum(one, other)
    assert 0.9 < one.mean() / other.mean() < 1.1
    assert 0.2 < uneven.float().mean() < 0.6


def test_something_of_every_object_and_of_the_sign_is_kept() -> None:
    objects, shapes = torch.zeros(576, dtype=torch.long), torch.zeros(576, dtype=torch.long)
    for number in range(1, 13):
        objects[40 * number : 40 * number + number] = number
        shapes[objects == number] = number % 8 + 1
    shapes[570:] = SHAPE_CLASSES - 1
    first = choose(made_labels(200, objects, shapes), torch.Generator().manual_seed(0))[:, :13]
    for row in first:
        assert sorted(objects[row].tolist()) == list(range(13))
        assert (shapes[row] == SHAPE_CLASSES - 1).sum() == 1
    # Whichever token of it: the last object has twelve.
    assert len({int(index) for index in first.flatten() if objects[index] == 12}) == 12


def test_place_losses_ask_for_each_tokens_place_and_for_the_centre_of_what_it_shows() -> None:
    class Guess(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return tokens

    objective = Objective(Twin(SIZES["tiny"]), Recipe(size="tiny"), [1], torch.float32)
    objective.heads.place = Guess()
    rng = np.random.default_rng(0)
    centers = np.where(rng.random((2, 576)) < 0.2, rng.integers(0, 576, (2, 576)), NOTHING)
    guesses = rng.normal(size=(2, 576, 4 * 24)).astype(np.float32)
    places, of_centers = [], []
    for image, patch in np.ndindex(2, 576):
        parts = guesses[image, patch].reshape(4, 24).astype(np.float64)
        row, column, center_row, center_column = parts - np.log(np.exp(parts).sum(1, keepdims=True))
        places.append(-row[patch // 24] - column[patch % 24])
        center = centers[image, patch]
        if center != NOTHING:
            of_centers.append(-center_row[center // 24] - center_column[center % 24])
    found = objective._place_losses(torch.from_numpy(guesses), torch.from_numpy(centers))
    assert [loss.item() for loss in found] == pytest.approx([np.mean(places), np.mean(of_centers)], rel=1e-5)
    nothing = objective._place_losses(torch.from_numpy(guesses), torch.full((2, 576), NOTHING))
    assert nothing[1].item() == 0


def test_schedule_goes_by_steps() -> None:
    recipe = Recipe(steps=1000, warm_up=100)
    rates = [recipe.rate_at(step) for step in range(1000)]
    assert rates[0] < rates[50] < rates[99] == max(rates)
    assert rates[-1] == pytest.approx(0.02 * recipe.rate, rel=0.01)
    kept = [recipe.kept_at(step) for step in range(1000)]
    assert set(kept[:120]) == {None}
    dropped = [count for count in kept[120:] if count is not None]
    assert 0.35 < len(dropped) / 880 < 0.45
    assert 32 <= min(dropped) < 40 < 500 < max(dropped) <= 576


def test_smoke_run_learns_and_writes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--smoke", "--output", str(tmp_path)])
    train.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["complete"]
    assert record["images"] == 30 * 8
    assert record["curve"][-1]["loss"] == losses[-1]
    assert lines[-1]["held_out"] == record["held_out"]
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_evaluation_ends_in_one_line_of_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["model_card", "--scenes", "2", "--kinds", "simple,complex-photo", "--pruner", "random"])
    model_card.main()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["first"], last["scenes"]) == (0, 2)
    assert last["right"].keys() == {"simple", "complex-photo"}
    expected = examine(read_folder(MODEL_DIR), 2, CPU)
    for kind, methods in last["right"].items():
        assert methods.keys() == {"none 576", "random 64"}
        assert methods["none 576"]["answers"] == pytest.approx(100 * expected[kind]["answers"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "folder"), [("demo", MODEL_DIR), ("demo-small", SMALL_DIR)])
def test_card_says_what_evaluation_finds(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["model_card", "--model", model, "--scenes", "200"])
    model_card.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["right"]
    pattern = r"^\| (answers|recall|absent), ([a-z-]+), (none 576|attention 64) \| ([\d.]+) \|"
    card = re.findall(pattern, (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(card) == 4 * 2 * 3
    for quantity, kind, method, value in card:
        assert found[kind][method][quantity] == pytest.approx(float(value), abs=0.2), (quantity, kind, method)


SHORT = Recipe(size="tiny", steps=6, mixture=Mixture(images=2, kinds=("simple",)), warm_up=2, drop_from=0, checked=1)


def test_resumed_run_ends_where_an_uninterrupted_one_ends(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.train(SHORT, Options(whole))
    stopped = train.train(SHORT, Options(parts, time_limit=0))
    assert stopped["steps"] == 1
    assert (parts / "model.safetensors").exists()
    with pytest.raises(InputError, match="holds a run that is not finished; add --resume"):
        train.train(SHORT, Options(parts))
    with pytest.raises(InputError, match="has other options; it was started with"):
        train.train(dataclasses.replace(SHORT, seed=1), Options(parts, resume=True))
    resumed = train.train(SHORT, Options(parts, resume=True))
    assert resumed["complete"]
    assert not (parts / "state.pt").exists()
    one, other = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=1e-4, rtol=1e-2, msg=name)


def test_interrupted_run_leaves_a_folder_and_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = train.Trainer.step

    def interrupted(self: train.Trainer, number: int, batch: Batch) -> None:
        take(self, number, batch)
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(SHORT, Options(tmp_path))
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 2
    assert (tmp_path / "state.pt").exists()
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoke", "--resume"], "--resume: there is no state.pt in"),
        (["--smoke", "--workers", "-1"], "--workers must be at least 0"),
        pytest.param([], "training needs a CUDA device; --smoke tries it on the CPU", id="no GPU"),
    ],
)
def test_wrong_inputs_end_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--output", str(tmp_path / "new"), *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        train.main()
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
