"""What a study counted, by kind of scenes, method and budget; and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanvlm.calibration.scores import Result, Scores

Cells = dict[tuple[str, str, int], Scores]


def cells_of(data: dict[str, Any]) -> Cells:
    """Return kind of scenes, method and budget to what was counted."""
    results = [Result.from_dict(row) for row in data["results"]]
    return {(result.kind, result.method, result.budget): result.scores for result in results}


def kinds_of(cells: Cells) -> list[str]:
    """Kinds of scenes, in the order of the results."""
    return list(dict.fromkeys(kind for kind, _, _ in cells))


def budgets_of(cells: Cells) -> list[int]:
    """Budgets of the pruned results, largest first."""
    return sorted({budget for _, method, budget in cells if method != "none"}, reverse=True)


def methods_of(cells: Cells, kind: str) -> list[str]:
    """Methods, the one with most right answers over all budgets first."""

    def right(method: str) -> int:
        return sum(sum(scores.right) for (k, m, _), scores in cells.items() if (k, m) == (kind, method))

    return sorted(dict.fromkeys(method for _, method, _ in cells if method != "none"), key=right, reverse=True)


def unpruned(cells: Cells, kind: str) -> tuple[int, Scores]:
    """The unpruned model's number of image tokens, and its counts."""
    return next((budget, scores) for (k, method, budget), scores in cells.items() if (k, method) == (kind, "none"))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, the first column to the left."""
    lines = [" | ".join(heads), "|".join(["---", *["--:"] * (len(heads) - 1)]), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"
