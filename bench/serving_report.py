"""The chapter of RESULTS.md on `leanvlm serve`: what it adds to the first token, and thousands of requests at once."""

from __future__ import annotations

from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.cells import table

KINDS = {"known": "asked before: picture and prompt are known", "new": "new"}


def serving_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions, both ways to the first token, what became of the requests, and memory."""
    rows, added = [], {}
    for kind, ways in data["first_token_ms"].items():
        medians = {way: median(values) for way, values in ways.items()}
        added[kind] = medians["server"] - medians["session"]
        tails = {way: quantiles(values, n=10, method="inclusive")[-1] for way, values in ways.items()}
        cells = [f"{medians[way]:.2f} ({tails[way]:.2f})" for way in ("session", "server")]
        rows.append([KINDS[kind], *cells, f"{added[kind]:+.2f}", "yes" if added[kind] <= data["most_added_ms"] else "**no**"])
    versions = ", ".join(f"{tool} {number}" for tool, number in data["versions"].items())
    return "\n".join(
        [
            "## Serving\n",
            f"The built-in model, {data['machine']}, {versions}; [{path.name}](results/{path.name}), {data['date']}; "
            f"`{data['command']}`.\n",
            "From the request to the first piece of text, a JPEG file of 1280 x 960, medians (p90) of "
            f"{data['rounds']}, one session asked itself and through a server in the same process, turn by turn. "
            f"Promised: {data['most_added_ms']:g} ms more at most.\n",
            table(("the picture is", "session, ms", "server, ms", "added, ms", "holds"), rows),
            _soak(data),
        ]
    )


def _soak(data: dict[str, Any]) -> str:
    soak, most = data["soak"], data["most"]
    before, after = soak["before_bytes"], soak["after_bytes"]
    grown = 100 * (after / before - 1)
    outcomes = "; ".join(f"{count} {name}" for name, count in soak["outcomes"].items())
    held = "yes" if after <= most * before else "**no**"
    rows = [
        ["requests, clients, seconds", f"{data['requests']}, {data['clients']}, {soak['seconds']:g}"],
        ["what became of them", outcomes],
        ["greedy answers that are not the session's own", str(soak["wrong_answers"])],
        ["left running, left waiting, exit status", f"{soak['left_running']:g}, {soak['left_waiting']:g}, {soak['status']}"],
        [
            "resident memory before and after, MB",
            f"{before / 1e6:.0f}, {after / 1e6:.0f} ({grown:+.1f} %)",
        ],
        [f"within {100 * (most - 1):.0f} %", held],
    ]
    return (
        f"Many requests at once, a tenth of them aborted and a tenth malformed, behind {data['warmup']} that fill a cache of "
        f"{data['cache_mb']:g} MB, with a queue of {data['max_queue']}; whoever gets 503 asks again:\n\n"
        + table(("", "soak"), rows)
    )
