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
        tails = {way: quantiles(values, n=10)[-1] for way, values in ways.items()}
        cells = [f"{medians[way]:.2f} ({tails[way]:.2f})" for way in ("session", "server")]
        rows.append([KINDS[kind], *cells, f"{added[kind]:+.2f}", "yes" if added[kind] <= data["most_added_ms"] else "**no**"])
    soak = data["soak"]
    before, after = soak["before_bytes"], soak["after_bytes"]
    held = "yes" if after <= data["most"] * before else "**no**"
    outcomes = "; ".join(f"{count} {name}" for name, count in soak["outcomes"].items())
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
            f"\n{data['requests']} requests of {data['clients']} clients in {soak['seconds']:g} s, behind "
            f"{data['warmup']} that fill a cache of {data['cache_mb']:g} MB, a tenth aborted, a tenth malformed, a queue of "
            f"{data['max_queue']}: {outcomes}. Greedy answers other than the session's own: {soak['wrong_answers']}. "
            f"Left at the end: {soak['left_running']:g} running, {soak['left_waiting']:g} waiting; exit status {soak['status']}. Resident "
            f"memory {before / 1e6:.0f} MB before and {after / 1e6:.0f} MB after, {100 * (after / before - 1):+.1f} %; within "
            f"{100 * (data['most'] - 1):.0f} %: {held}.\n",
        ]
    )
