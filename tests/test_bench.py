"""The benchmarks' statistics by hand, and RESULTS.md as it follows from the counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from leanvlm.calibration.scores import CaptionScore, Result, Scores
from leanvlm.demo import MODEL_DIR
from leanvlm.demo.built_in import BUILT_IN
from leanvlm.demo.packing import pack
from leanvlm.demo.scenes import held_out_questions, make_scene
from leanvlm.demo.training.canvas import Canvas
from leanvlm.exporter import ExportConfig
from leanvlm.exporter.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the checkout: bench is not installed")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The package `bench`, importable from the checkout's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import bench.counting
        import bench.report
        import bench.statistics
        import bench.study

        yield bench


def scores(right: list[int]) -> Scores:
    return Scores(right, [8] * len(right), {"count": (sum(right), 8 * len(right))})


def test_results_are_what_the_counts_give(bench: ModuleType) -> None:
    assert (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8") == bench.report.render_report()


def test_results_and_cards_are_of_the_shipped_models() -> None:
    def read(name: str) -> Any:
        return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))

    evaluated = read("evaluation-demo")["runs"]
    for model, known in BUILT_IN.items():
        sha256 = open_checkpoint(ExportConfig(model)).source().sha256
        gate = read(f"gate-{model}")
        assert (gate["sha256"], round(gate["erank_ref"], 2)) == (sha256, known.erank_ref)
        # The card's columns, in order: the first 200 scenes, then 1,000 for the larger model.
        runs = [run["right"] for run in evaluated if run["sha256"] == sha256 and "--first" not in run["conditions"]["command"]]
        runs.sort(key=len, reverse=True)
        card = (known.folder / "README.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| (answers|recall|absent), ([a-z-]+), (none 576|attention 64) \| (.+) \|$", card, re.MULTILINE)
        assert len(rows) == 4 * 2 * 3
        for quantity, kind, method, cells in rows:
            expected = [f"{run[kind][method][quantity]:.2f}" if kind in run else "" for run in runs]
            assert [cell.strip() for cell in cells.split("|")] == expected
    demo = open_checkpoint(ExportConfig("demo")).source().sha256
    for name in ("study-demo", "counting-demo", "positions-demo"):
        assert read(name)["model"]["sha256"] == demo


def test_readme_shows_the_profile_that_is_kept() -> None:
    profile = json.loads((ROOT / "bench" / "results" / "profile-demo.json").read_text(encoding="utf-8"))
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for stage in ("prune", "prefill"):
        cells = [profile["budgets"][budget]["stages_ms"][stage] for budget in ("64", "576")]
        shown = [f"{cell['p50']:.2f} ({cell['p90']:.2f})" for cell in cells]
        assert re.search(rf"│ {stage}[ *]+│ +{re.escape(shown[0])} │ +{re.escape(shown[1])} │", page)


def test_the_study_is_complete(bench: ModuleType) -> None:
    data = json.loads(bench.study.STUDY.read_text(encoding="utf-8"))
    found = {(row["method"], row["budget"], row["kind"]) for row in data["results"]}
    wanted = {(m, b, k) for m in bench.study.default_methods() for b in (192, 128, 64, 32) for k in ("simple", "complex")}
    assert wanted <= found
    assert all(len(row["right"]) >= 150 and sum(row["asked"]) >= 1000 for row in data["results"])
    assert {"commit", "machine", "versions", "command"} <= set(data["conditions"])


def test_a_sure_difference_and_none(bench: ModuleType) -> None:
    compare = bench.statistics.right_difference
    better, worse = scores([8, 7] * 40), scores([7, 6] * 40)
    sure = compare([(better, worse)])
    assert (sure.value, sure.low, sure.high) == pytest.approx((1 / 8,) * 3)
    assert sure.verdict() == "holds"
    assert compare([(worse, better)]).verdict() == "the opposite holds"
    assert compare([(scores([8, 7] * 40), scores([7, 8] * 40))]).verdict() == "not decided"


def test_interval_is_that_of_the_normal_law(bench: ModuleType) -> None:
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 9, 400), rng.integers(0, 9, 400)
    found = bench.statistics.right_difference([(scores(first.tolist()), scores(second.tolist()))])
    gain = (first - second) / 8
    error = 1.96 * gain.std(ddof=1) / len(gain) ** 0.5
    # The quantiles of 2000 draws scatter by about 4 % of the interval's half width.
    assert (found.low, found.high) == pytest.approx((gain.mean() - error, gain.mean() + error), abs=0.15 * error)


def test_hallucination_counts_mentions_not_captions(bench: ModuleType) -> None:
    def captions(*rows: tuple[int, int]) -> Scores:
        return Scores(captions=[CaptionScore(mentions, absent, 0, 1) for mentions, absent in rows])

    found = bench.statistics.chair_difference([(captions((4, 2), (6, 0)), captions((5, 0), (5, 1)))])
    assert found.value == pytest.approx(2 / 10 - 1 / 10)


def test_means_of_two_samples(bench: ModuleType) -> None:
    found = bench.statistics.mean_difference([2.0] * 30, [1.0] * 20)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_separation_is_the_chance_of_a_higher_value(bench: ModuleType) -> None:
    assert bench.statistics.separation([3, 2], [1, 2]).value == pytest.approx(3.5 / 4)
    rng = np.random.default_rng(1)
    first, second = rng.normal(1, 1, 300), rng.normal(0, 1, 300)
    found = bench.statistics.separation(first.tolist(), second.tolist())
    # For two normal laws one deviation apart it is the normal distribution function of 1 / sqrt(2).
    assert found.value == pytest.approx(0.760, abs=0.04)
    # Hanley and McNeil (1982).
    area = found.value
    ties = 299 * (area / (2 - area) - area**2) + 299 * (2 * area**2 / (1 + area) - area**2)
    error = ((area * (1 - area) + ties) / 300**2) ** 0.5
    assert (found.low, found.high) == pytest.approx((area - 1.96 * error, area + 1.96 * error), abs=0.3 * error)


def test_questions_ask_for_as_many_objects_as_their_answers_say(bench: ModuleType) -> None:
    asked = [(scene, q) for seed in range(60) for scene in [make_scene(seed, "complex")] for q in held_out_questions(scene)]
    counts = [(scene, question) for scene, question in asked if question.kind == "count"]
    assert {question.subtype for _, question in counts} == {"all", "shape", "color"}
    assert all(len(bench.counting.asked_objects(scene, question)) == int(question.answer) for scene, question in counts)


def test_oracle_gives_every_object_its_turn(bench: ModuleType) -> None:
    scene = make_scene(3, "complex")
    owners = Canvas(torch.device("cpu"), compiled=False).labels(pack([scene])).objects[0].tolist()
    chosen = bench.counting.oracle(scene, owners, 64)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 64
    sizes = [owners.count(number) for number in range(1, len(scene.objects) + 1)]
    kept = [[owners[patch] for patch in chosen].count(number) for number in range(1, len(scene.objects) + 1)]
    # Nobody has two more than another who could have had more.
    assert all(mine <= other + 1 for mine in kept for other, size in zip(kept, sizes, strict=True) if other < size)
    assert all(bench.counting.oracle(scene, owners, keep)[:1] for keep in (1, 575))


def test_wrong_counts_are_split(bench: ModuleType, tmp_path: Path) -> None:
    options = bench.counting.CountingOptions(4, 16, ("agile", "random"))
    path = tmp_path / "counting.json"
    bench.counting.measure_counting(options, path)
    data = json.loads(path.read_text(encoding="utf-8"))
    answers = {row["method"]: row["answers"] for row in data["results"]}
    assert answers.keys() == {"none", "agile", "random", "oracle"}
    assert len({tuple(objects for _, objects, _ in rows) for rows in answers.values()}) == 1
    assert all(least > 0 for _, _, least in answers["none"] + answers["oracle"])
    assert any(least == 0 for _, _, least in answers["random"])
    text = bench.report.counting_section(path, data)
    assert "| random | " in text
    assert str(tmp_path) not in text


def test_seeds_are_compared_on_the_scenes_that_all_have_seen(bench: ModuleType, tmp_path: Path) -> None:
    def study(seed: int, rights: list[int]) -> tuple[Path, dict[str, Any]]:
        rows = [
            Result(method, budget, kind, scores(rights if method == "agile" else [8] * len(rights)), "m").to_dict()
            for method, budget in (("none", 576), ("agile", 64))
            for kind in ("simple", "complex")
        ]
        model = {"id": "m", "sha256": "0" * 64, "erank_ref": 1.0, "size": "base", "seed": seed, "steps": [5 - seed, 5]}
        values = {kind: {"effective_rank": [1.0, 2.0], "entropy": [2.0, 1.0]} for kind in ("simple", "complex")}
        return tmp_path / "s.json", {"model": model, "conditions": {"commit": "c"}, "results": rows, "complexity": values}

    studies = [study(0, [8, 4, 0, 0]), study(1, [6, 2])]
    text = "\n".join(bench.report.seeds_section(studies))
    assert "| agile | 62.5 (50.0 to 75.0) |" in text
    assert "Unpruned, 576 tokens: 100.0 (100.0 to 100.0)" in text
    assert "| 0 | 5 | `m` |" in text
    assert "| 1 | 4, stopped before 5 | `m` |" in text
    bench.report.seeds_picture(tmp_path / "seeds.png", studies)
    assert (tmp_path / "seeds.png").is_file()


@pytest.mark.slow
def test_a_small_study_from_the_command_line_and_back(bench: ModuleType, tmp_path: Path) -> None:
    options = bench.study.StudyOptions(2, 1, ("attention", "divprune", "agile"), (64,))
    bench.study.study(options, tmp_path / "study.json")
    data = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    record = json.loads((MODEL_DIR / "training.json").read_text(encoding="utf-8"))
    assert data["model"]["seed"] == record["recipe"]["seed"]
    assert data["model"]["steps"] == [record["steps"], record["recipe"]["steps"]]
    text = bench.report.study_section(tmp_path / "study.json", data)
    assert "attention beats diversity on simple scenes" in text
    assert str(tmp_path) not in text
    result = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0
