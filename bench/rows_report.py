"""The chapters of RESULTS.md on several answers at once, and on a server under load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import table


def rows_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter on one file of `python -m bench rows`."""
    rows = [
        [
            name,
            f"{row['step_ms_p50']:.2f}",
            f"{row['step_ms_p99']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / data['rows']['in turn']['tokens_per_second']:.2f}",
            f"{sum(row['equal'])} of {row['count'] * len(row['equal'])}",
        ]
        for name, row in data["rows"].items()
    ]
    note = f" {data['note'].capitalize()}." if "note" in data else ""
    return "\n".join(
        [
            f"## Several answers at once: {path.stem}\n",
            f"{_conditions(path, data)}; answers of {data['tokens']} tokens about pictures of their own, with prompts of "
            f"different lengths; {data['rounds']} rounds in turn.{note} A step is a token for each answer, text included. "
            "Equal is how many answers have the tokens that each has alone; random weights have close calls at every token.\n",
            table(("answers at once", "step, ms p50", "p99", "tokens/s", "of one's", "equal"), rows),
        ]
    )


def load_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter on one file of `python -m bench load`."""
    rows = [
        [
            name,
            f"{row['tokens_per_second']:.0f}",
            *(_number(row[f"{key}_ms_{part}"]) for key, part in COLUMNS),
        ]
        for name, row in data["clients"].items()
    ]
    note = f" {data['note'].capitalize()}." if "note" in data else ""
    return "\n".join(
        [
            f"## A server under load: {path.stem}\n",
            f"{_conditions(path, data)}; each client asks {data['requests']} times for {data['tokens']} tokens about a new "
            f"picture of 336 x 336, streaming; {data['rounds']} rounds in turn.{note} Tokens per second count from the first "
            "request to the last answer, pictures and prompts included.\n",
            table(("clients", "tokens/s", *(f"{key.replace('_', ' ')}, ms {part}" for key, part in COLUMNS)), rows),
        ]
    )


COLUMNS = (("between_tokens", "p50"), ("gap", "p50"), ("gap", "p99"), ("first_token", "p50"), ("first_token", "p99"))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _conditions(path: Path, data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    where = data.get("gpu") or f"{data['machine']}, {data['threads']} threads"
    return f"{data['model']} on {where} ([{path.name}](results/{path.name}), {data['date']}; {versions}; `{data['command']}`)"
