"""The chapter that compares training seeds: what of a method's accuracy is the method, and what the luck of one training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.cells import Cells, budgets_of, cells_of, kinds_of, methods_of, table
from bench.statistics import separation
from leanvlm.calibration.plot import Lines, save_plot

SEEDS_PICTURE = Path(__file__).parent / "results" / "seeds-demo.png"
# The paper's order on complex scenes, best first; and what the picture shows beside it.
ORDER = ("agile", "divprune", "attention", "random")
SHOWN = (*ORDER, "scope", "vispruner")
ORDER_BUDGETS = (64, 32)

Studies = Sequence[tuple[Path, dict[str, Any]]]


def seeds_section(studies: Studies) -> Iterator[str]:
    """Yield the chapter, if there are studies of several seeds."""
    if len(studies) < 2:
        return
    cells, scenes = [cells_of(data) for _, data in studies], _common_scenes(studies)
    yield "## Study over training seeds: mean and range\n"
    yield _conditions(studies, scenes)
    yield f"![Accuracy over budget, mean and range](results/{SEEDS_PICTURE.name})\n"
    for kind in kinds_of(cells[0]):
        yield _accuracy(kind, cells, scenes)
    yield _order(studies, cells, scenes)
    yield _separation(studies)


def seeds_picture(path: Path, studies: Studies) -> None:
    """Draw the mean accuracy over the budget, with bars from the lowest seed to the highest."""
    if len(studies) < 2:
        return
    cells, scenes = [cells_of(data) for _, data in studies], _common_scenes(studies)
    panels = []
    for kind in kinds_of(cells[0]):
        series: dict[str, list[tuple[float, float]]] = {}
        ranges: dict[str, list[tuple[float, float, float]]] = {}
        for method in (method for method in SHOWN if method in methods_of(cells[0], kind)):
            found = {budget: _percents(cells, kind, method, budget, scenes) for budget in budgets_of(cells[0])}
            series[method] = [(budget, sum(values) / len(values)) for budget, values in found.items()]
            ranges[method] = [(budget, min(values), max(values)) for budget, values in found.items()]
        panels.append(
            Lines(f"{kind} scenes, {len(cells)} seeds", "image tokens kept", "right answers, %", series, None, ranges)
        )
    save_plot(path, panels)


def _common_scenes(studies: Studies) -> int:
    return min(len(row["right"]) for _, data in studies for row in data["results"])


def _percents(cells: Sequence[Cells], kind: str, method: str, budget: int, scenes: int) -> list[float]:
    """Right answers in % about the first scenes of a kind, one for each seed."""
    scores = [found[kind, method, budget] for found in cells]
    return [100 * sum(score.right[:scenes]) / sum(score.asked[:scenes]) for score in scores]


def _conditions(studies: Studies, scenes: int) -> str:
    rows = []
    for path, data in studies:
        model, run = data["model"], data["conditions"]
        link = f"[{path.name}](results/{path.name})"
        done, planned = model["steps"]
        steps = str(done) if done == planned else f"{done}, stopped before {planned}"
        rows.append(
            [str(model["seed"]), steps, f"`{model['id']}`", model["sha256"][:12], str(model["erank_ref"]), run["commit"], link]
        )
    results = [row for row in studies[0][1]["results"] if row["method"] == "none"]
    asked = ", ".join(f"{scenes} {row['kind']} scenes with {sum(row['asked'][:scenes])} short questions" for row in results)
    heads = ["training seed", "steps", "model", "weights", "reference rank", "commit", "raw counts"]
    return (
        "The same recipe from several seeds of weights, scenes and dropping; the shipped model is one of them, chosen as "
        f"its card says. Each is asked about the same {asked}. The conditions of each run are in its file.\n\n"
        + table(heads, rows)
    )


def _accuracy(kind: str, cells: Sequence[Cells], scenes: int) -> str:
    budgets = budgets_of(cells[0])
    total = next(budget for k, method, budget in cells[0] if (k, method) == (kind, "none"))
    found = {
        (method, budget): _percents(cells, kind, method, budget, scenes)
        for method in methods_of(cells[0], kind)
        for budget in budgets
    }
    methods = sorted(methods_of(cells[0], kind), key=lambda method: -sum(sum(found[method, budget]) for budget in budgets))
    rows = [[method, *(_spread(found[method, budget]) for budget in budgets)] for method in methods]
    title = f"### {kind.capitalize()} scenes over {len(cells)} seeds: right answers, %, mean (lowest to highest)\n\n"
    whole = f"Unpruned, {total} tokens: {_spread(_percents(cells, kind, 'none', total, scenes))}.\n\n"
    return title + whole + table(["tokens kept", *map(str, budgets)], rows)


def _spread(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def _order(studies: Studies, cells: Sequence[Cells], scenes: int) -> str:
    """Say for each seed whether the paper's order is found; nothing in the training asks for it."""
    budgets = [budget for budget in ORDER_BUDGETS if all(("complex", m, budget) in found for found in cells for m in ORDER)]
    rows = []
    for (_, data), found in zip(studies, cells, strict=True):
        for budget in budgets:
            shares = [_percents([found], "complex", method, budget, scenes)[0] for method in ORDER]
            holds = all(better >= worse for better, worse in pairwise(shares))
            rows.append(
                [str(data["model"]["seed"]), str(budget), *(f"{share:.1f}" for share in shares), "yes" if holds else "no"]
            )
    title = "### The paper's order on complex scenes, seed by seed: right answers, %\n\n"
    return title + table(["training seed", "tokens kept", *ORDER, "in this order"], rows)


def _separation(studies: Studies) -> str:
    rows = []
    for _, data in studies:
        complexity = data["complexity"]
        for ground, suffix in (("computed", ""), ("photographed", "-photo")):
            if f"complex{suffix}" in complexity:
                pair = complexity[f"complex{suffix}"], complexity[f"simple{suffix}"]
                found = [separation(pair[0][name], pair[1][name]) for name in ("effective_rank", "entropy")]
                cells = [f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})" for area in found]
                rows.append([str(data["model"]["seed"]), ground, str(len(pair[0]["entropy"])), *cells])
    title = (
        "### Do effective rank and attention entropy tell simple from complex scenes?\n\n"
        'Area under the ROC curve for "complex scenes have more of it": 0.5 is chance, 1 is sure, below 0.5 complex scenes '
        "have less; in parentheses the 95 % interval of a bootstrap over scenes. Both grounds have the same scenes on them.\n\n"
    )
    return title + table(["training seed", "ground", "scenes of each kind", "effective rank", "attention entropy"], rows)
