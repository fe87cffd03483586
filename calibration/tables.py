"""Results as a table in the terminal and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from leanvlm.calibration.plot import Lines, save_plot
from leanvlm.calibration.scores import Result
from leanvlm.demo.scenes import FAMILIES


def print_results(results: Sequence[Result]) -> None:
    """Print one table for each kind of scenes on standard output."""
    console = Console(highlight=False, markup=False)
    for kind in dict.fromkeys(result.kind for result in results):
        console.print(_table(kind, [result for result in results if result.kind == kind]))
    print("right answers in % (95 % interval); absent: share of the mentioned objects that are not there (CHAIR-i);")
    print("captions with: share of captions that mention such an object (CHAIR-s); recall: share of the objects mentioned")


def _table(kind: str, results: Sequence[Result]) -> Table:
    first = results[0].scores
    table = Table(
        title=f"{kind} scenes: {len(first.right)}, with {sum(first.asked)} short questions and {len(first.captions)} captions",
        title_justify="left",
    )
    families = [family for family in FAMILIES if family in first.kinds]
    for name in ("source", "method"):
        table.add_column(name)
    for name in ("tokens", "all", *families, "absent", "captions with", "recall"):
        table.add_column(name, justify="right")
    for result in results:
        scores = result.scores
        low, high = scores.interval
        table.add_row(
            result.source,
            result.method,
            str(result.budget),
            f"{100 * scores.accuracy:.1f} ({100 * low:.1f}-{100 * high:.1f})",
            *(f"{100 * right / asked:.1f}" for right, asked in (scores.kinds[family] for family in families)),
            *(f"{100 * share:.1f}" for share in (scores.chair_i, scores.chair_s, scores.recall)),
        )
    return table


def plot_results(path: Path, results: Sequence[Result]) -> None:
    """Draw accuracy over budget, one panel for each kind of scenes; unpruned results become a level to compare with."""
    panels = []
    several = len({(result.source, result.method) for result in results}) != len({result.method for result in results})
    for kind in dict.fromkeys(result.kind for result in results):
        series: dict[str, list[tuple[float, float]]] = {}
        level = None
        for result in (result for result in results if result.kind == kind):
            percent = 100 * result.scores.accuracy
            if result.method == "none":
                level = ("unpruned", percent)
            else:
                name = f"{result.source}: {result.method}" if several else result.method
                series.setdefault(name, []).append((result.budget, percent))
        # With nothing pruned there is no curve: the unpruned points stand for themselves.
        series = series or {"none": [(r.budget, 100 * r.scores.accuracy) for r in results if r.kind == kind]}
        panels.append(Lines(f"{kind} scenes", "image tokens kept", "right answers, %", series, level))
    save_plot(path, panels)
