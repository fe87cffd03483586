"""Results as a table in the terminal and as a chart."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from leanvlm.calibration.plot import Lines, draw_plot
from leanvlm.calibration.scores import Result
from leanvlm.demo.scenes import FAMILIES

PIPE_WIDTH = 120


def print_results(results: Sequence[Result]) -> None:
    """Print two tables for each kind of scenes on standard output: what counts, and right answers by kind of question."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=PIPE_WIDTH)
    for kind in dict.fromkeys(result.kind for result in results):
        chosen = [result for result in results if result.kind == kind]
        console.print(_overview(kind, chosen))
        console.print(_by_question(kind, chosen))
    print("right: answers in % (95 % interval); absent: share of the mentioned objects that are not there (CHAIR-i);")
    print("captions: share of captions that mention such an object (CHAIR-s); recall: share of the objects mentioned")


def _overview(kind: str, results: Sequence[Result]) -> Table:
    first = results[0].scores
    title = f"{kind} scenes: {len(first.right)}, with {sum(first.asked)} short questions and {len(first.captions)} captions"
    table = _empty(title, ("right", "absent", "captions", "recall"))
    for result in results:
        scores = result.scores
        low, high = (100 * end for end in scores.interval)
        shares = [f"{100 * share:.1f}" for share in (scores.chair_i, scores.chair_s, scores.recall)]
        table.add_row(*_names(result), f"{100 * scores.accuracy:.1f} ({low:.1f}-{high:.1f})", *shares)
    return table


def _by_question(kind: str, results: Sequence[Result]) -> Table:
    families = [family for family in FAMILIES if family in results[0].scores.kinds]
    table = _empty(f"{kind} scenes, right answers by kind of question, %", families)
    for result in results:
        counts = [result.scores.kinds[family] for family in families]
        table.add_row(*_names(result), *(f"{100 * right / asked:.1f}" for right, asked in counts))
    return table


def _empty(title: str, numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("source", "method"):
        table.add_column(name, overflow="fold")
    for name in ("tokens", *numbers):
        table.add_column(name, justify="right")
    return table


def _names(result: Result) -> tuple[str, str, str]:
    return result.source, result.method, str(result.budget)


def plot_results(results: Sequence[Result]) -> bytes:
    """Draw accuracy over budget, one panel for each kind of scenes; unpruned results become a level. Returns a PNG file."""
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
    return draw_plot(panels)
