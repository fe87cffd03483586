"""The chapter of RESULTS.md on memory over hundreds of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import table


def soak_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions, memory before and after, and whether it stayed within what is promised."""
    rows = []
    for name, one in data["providers"].items():
        before, after = one["before_bytes"], one["after_bytes"]
        held = after <= data["most"] * before and one["cached_bytes"] <= one["bound_bytes"]
        memory = [f"{value / 1e6:.0f}" for value in (before, after, one["most_bytes"])]
        cached = f"{one['cached_bytes'] / 1e6:.2f} of {one['bound_bytes'] / 1e6:.2f}"
        version = ", ".join(f"{tool} {number}" for tool, number in one["versions"].items())
        rows.append(
            [f"{name} ({version})", *memory, f"{100 * (after / before - 1):+.1f} %", cached, "yes" if held else "**no**"]
        )
    return "\n".join(
        [
            "## Memory over hundreds of answers\n",
            f"{data['answers']} answers of one session, after {data['warmup']} that fill its cache of pictures; pictures of "
            "sizes of their own, every seventh question about the picture before, every fourth with a second turn. The "
            f"built-in model at its default budget; {data['machine']}, {data['threads']} threads; "
            f"[{path.name}](results/{path.name}), {data['date']}; `{data['command']}`. "
            f"Promised: at most {100 * (data['most'] - 1):.0f} % more, and the cache within its bound.\n",
            table(("MB resident", "before", "after", "most between", "after, to before", "kept pictures, MB", "holds"), rows),
        ]
    )
