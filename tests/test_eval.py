"""`leanvlm eval`: scores by hand, a bundle's answers, and the fast check in torch beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import BUDGET, Command
from PIL import Image

from leanvlm.calibration.evaluate import Exam, evaluate, parse_kinds
from leanvlm.calibration.scores import Result, Scores, score_caption, wilson
from leanvlm.calibration.study import Examinee, pruners_of, run_study
from leanvlm.demo.render import render
from leanvlm.demo.scenes import TRAINING_SEED, Question, caption, make_scene
from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import load_model, open_checkpoint
from leanvlm.exporter.pruners import PRUNERS
from leanvlm.runtime.errors import InputError

EXAM = Exam(scenes=4, captions=2)


@pytest.fixture(scope="module")
def examinee() -> Examinee:
    checkpoint = open_checkpoint(ExportConfig("demo"))
    return Examinee(checkpoint, load_model(checkpoint))


@pytest.fixture(scope="module")
def in_torch(examinee: Examinee) -> list[Result]:
    return run_study(examinee, EXAM, ["agile"], [BUDGET]).results


def by_cell(results: list[Result]) -> dict[tuple[str, int], Scores]:
    return {(result.kind, result.budget): result.scores for result in results}


def test_a_bundle_and_torch_give_the_same_scores(demo_bundle: Path, in_torch: list[Result]) -> None:
    bundle = evaluate([demo_bundle], EXAM, None, 1, lambda text, count: None)
    assert by_cell(bundle) == by_cell(in_torch)
    assert {(result.method, result.budget) for result in bundle} == {("agile", 64), ("none", 576)}


def test_the_unpruned_model_answers_and_the_pruned_one_errs(in_torch: list[Result]) -> None:
    cells = by_cell(in_torch)
    assert cells["simple", 576].accuracy == 1.0
    assert cells["complex", 576].accuracy >= 0.97
    assert cells["complex", BUDGET].accuracy < 1.0  # else the agreement above proves little


def test_the_check_agrees_with_generating_every_answer(examinee: Examinee) -> None:
    scenes = [make_scene(seed, "complex") for seed in range(3)]
    tokens = examinee.side.tokens(render(scenes))
    pruner = pruners_of(examinee.side.checkpoint, ["random"], [48])["random", 48]
    kept = examinee.side.keep(pruner, tokens)
    asked = [EXAM.questions(scene)[0] for scene in scenes]
    checked = examinee.check(kept, [examinee.script(questions) for questions in asked])
    for row, questions in enumerate(asked):
        texts = examinee.generate(kept[row].expand(len(questions), -1, -1), [question.text for question in questions])
        assert checked[row] == [text == question.answer for text, question in zip(texts, questions, strict=True)]
    outcomes = [outcome for row in checked for outcome in row]
    assert 0 < sum(outcomes) < len(outcomes)


def test_questions_side_by_side_do_not_see_each_other(examinee: Examinee) -> None:
    tokens = examinee.side.tokens(render([make_scene(0, "simple")]))
    first, *others = EXAM.questions(make_scene(0, "simple"))[0]
    wrong = Question(first.kind, first.text, first.answer + " and more")
    together = examinee.check(tokens.features, [examinee.script([wrong, first, *others])])[0]
    assert together[0] is False
    assert all(together[1:])


def test_every_registered_pruner_can_be_studied(examinee: Examinee) -> None:
    exam = Exam(scenes=1, kinds=("simple",), captions=0)
    results = run_study(examinee, exam, list(PRUNERS), [32]).results
    assert {result.method for result in results} == set(PRUNERS)
    assert {result.budget for result in results if result.method != "none"} == {32}
    assert torch.get_num_threads() >= 1


def test_captions_by_hand() -> None:
    scene = make_scene(1, "complex")
    text = caption(scene)
    names = text.count(",") + 1
    assert score_caption(text, scene) == (names, 0, names, names)
    assert score_caption(f"{text}, a purple unicorn", scene) == (names + 1, 1, names, names)
    first = text.split(", ")[0]
    assert score_caption(f"{first}, {first}", scene).found == 1
    assert score_caption("", scene) == (0, 0, 0, names)


def test_shares_by_hand() -> None:
    scores = Scores()
    scores.add_scene([("count", True), ("count", False)])
    scores.add_scene([("sign", True)])
    scene = make_scene(1, "complex")
    scores.captions = [score_caption(caption(scene), scene), score_caption("a purple unicorn", scene)]
    there = scores.captions[0].present
    assert (scores.right, scores.asked, scores.kinds) == ([1, 1], [2, 1], {"count": (1, 2), "sign": (1, 1)})
    assert scores.accuracy == pytest.approx(2 / 3)
    assert (scores.chair_s, scores.recall) == (0.5, 0.5)
    assert scores.chair_i == pytest.approx(1 / (there + 1))
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict()))) == scores


# From the formula, worked with 30 digits in `bc`; 81 of 263 is the example of Newcombe (1998).
@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)


def test_kinds_and_scenes_are_checked() -> None:
    assert parse_kinds(" simple, complex,simple ") == ("simple", "complex")
    with pytest.raises(InputError, match="known: simple, medium, complex"):
        Exam(kinds=("hard",))
    with pytest.raises(InputError, match="--scenes 0"):
        Exam(scenes=0)
    for first, scenes in [(-1, 2), (TRAINING_SEED - 1, 2), (TRAINING_SEED, 1)]:
        with pytest.raises(InputError, match=f"--first {first} with --scenes {scenes} is not possible"):
            Exam(scenes=scenes, first=first)
    assert Exam(scenes=1, first=TRAINING_SEED - 1).first == TRAINING_SEED - 1


def test_exam_may_start_at_another_scene() -> None:
    exam = Exam(scenes=3, kinds=("complex", "simple"), captions=1, first=7)
    batches = list(exam.batches(2))
    assert [(kind, [scene.seed for scene in scenes]) for kind, scenes in batches] == [
        ("complex", [7, 8]),
        ("complex", [9]),
        ("simple", [7, 8]),
        ("simple", [9]),
    ]
    scenes = [scene for kind, drawn in batches for scene in drawn if kind == "simple"]
    assert scenes == [make_scene(seed, "simple") for seed in (7, 8, 9)]
    assert [exam.questions(scene)[1] is not None for scene in scenes] == [True, False, False]


def test_command_line(tmp_path: Path, demo_bundle: Path, leanvlm: Command) -> None:
    counts, plot = tmp_path / "counts.json", tmp_path / "plot.png"
    result = leanvlm(
        "eval", demo_bundle, "--scenes", 1, "--kinds", "simple", "--budget", 64, "--json", counts, "--plot", plot
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "simple scenes: 1, with" in result.stdout
    assert "complex" not in result.stdout
    data = json.loads(counts.read_text())
    assert [(row["method"], row["budget"], row["kind"]) for row in data["results"]] == [("agile", 64, "simple")]
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


def test_command_line_with_a_checkpoint(leanvlm: Command) -> None:
    result = leanvlm(
        "eval", "--model", "demo", "--pruner", "attention", "--pruner", "agile:gate=none", "--scenes", 1, "--kinds", "simple"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "agile:gate=none" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("eval", "give bundles, or --model"),
        ("eval nowhere", "not a folder"),
        ("eval here --model demo --pruner agile", "give bundles, or --model"),
        ("eval --model demo", "--pruner goes with --model"),
        ("eval nowhere --pruner agile", "--pruner goes with --model"),
        ("eval nowhere --kinds hard", "--kinds 'hard'"),
        ("eval nowhere --scenes 0", "'--scenes'"),
        ("eval --model demo --pruner best", "pruner 'best' is not known"),
        ("eval --model demo --pruner agile --budget 576", "budget 576 is not possible"),
        ("eval nowhere --json missing/counts.json", "does not exist"),
    ],
)
def test_wrong_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvlm: Command, arguments: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = leanvlm(*arguments.split())
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert words in result.stderr


def test_a_budget_that_a_bundle_lacks(demo_bundle: Path, leanvlm: Command) -> None:
    result = leanvlm("eval", demo_bundle, "--budget", 65)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "it holds 64, 576" in result.stderr
