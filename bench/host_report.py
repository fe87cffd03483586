"""The chapter of RESULTS.md on pictures resized by the processor and by the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import table


def host_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions and medians."""
    width, height = data["image"]["size"]
    size = data["image"]["bytes"] // 1000
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    rows = [[name, f"{value:.1f}"] for name, value in data["median_ms"].items()]
    return "\n".join(
        [
            "## A picture resized by the processor and by the device\n",
            f"A JPEG file of {width} x {height} pixels and {size} kB, the built-in model at its default "
            f"budget ([{path.name}](results/{path.name}), {data['date']}; {data['gpu']}; Pillow {data['pillow']}, {versions}; "
            f"medians of {data['runs']}, turn by turn in one process; `{data['command']}`). What is left for the processor, "
            f"decoding and looking up weights, is {data['host_part']:.0%} of decoding, resizing and cropping in Pillow.\n",
            table(("ms", "median"), rows),
        ]
    )
