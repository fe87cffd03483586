"""The benchmarks' statistics by hand, and RESULTS.md as it follows from the counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from leanvlm.calibration.scores import CaptionScore, Scores

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the checkout: bench is not installed")


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The package `bench`, importable from the checkout's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        import bench.report
        import bench.statistics
        import bench.study

        yield bench


def scores(right: list[int]) -> Scores:
    return Scores(right, [8] * len(right), {"count": (sum(right), 8 * len(right))})


def test_results_are_what_the_counts_give(bench: ModuleType) -> None:
    assert (ROOT / "bench" / "RESULTS.md").read_text(encoding="utf-8") == bench.report.render_report()


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


@pytest.mark.slow
def test_a_small_study_from_the_command_line_and_back(bench: ModuleType, tmp_path: Path) -> None:
    options = bench.study.StudyOptions(2, 1, ("attention", "divprune", "agile"), (64,))
    bench.study.study(options, tmp_path / "study.json")
    data = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    text = bench.report.study_section(tmp_path / "study.json", data)
    assert "attention beats diversity on simple scenes" in text
    assert str(tmp_path) not in text
    result = subprocess.run([sys.executable, "-m", "bench", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0
