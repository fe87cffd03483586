"""The chapter of RESULTS.md on a further token beside llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cells import table

ROWS = {
    "ours_fp16": "ours, fp16",
    "ours-xqa_fp16": "ours, fp16, XQA",
    "llama_F16": "llama.cpp, F16",
    "ours_int4": "ours, int4",
    "ours-xqa_int4": "ours, int4, XQA",
    "llama_Q4_0": "llama.cpp, Q4_0",
    "llama_Q4_K_M": "llama.cpp, Q4_K_M",
}

AGAIN = ("new picture", "second question", "next turn")


def decode_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions and medians."""
    medians = data["median_ms"]
    stages = {tuple(name.rsplit("_", 2)[1:]) for name in medians if name.rsplit("_", 1)[1].isdecimal()}
    columns = sorted(stages, key=lambda column: (column[0], int(column[1])))
    heads = [f"{stage} {'of' if stage == 'prefill' else 'behind'} {context}" for stage, context in columns]
    rows = [
        [
            title,
            *(f"{medians[key]:.2f}" if (key := f"{name}_{stage}_{context}") in medians else "" for stage, context in columns),
        ]
        for name, title in ROWS.items()
    ]
    again = [
        [ROWS[name], *(f"{medians[f'{name}_{asked}']:.2f}" for asked in AGAIN)]
        for name in ROWS
        if f"{name}_{AGAIN[0]}" in medians
    ]
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    return "\n".join(
        [
            "## A further token beside llama.cpp\n",
            f"{data['model']} on {data['gpu']} ([{path.name}](results/{path.name}), {data['date']}; llama.cpp "
            f"{data['llama.cpp']} with flash attention, {versions}; medians of {data['rounds']} rounds in turn, "
            f"`{data['command']}`). Ours is the time of an answer of {data['tokens']} tokens from its first to its last, text "
            "included; llama.cpp's is its own bench's, without choosing tokens.\n",
            table(("ms", *heads), rows),
            "\nThe first token of ours, from decoded pixels of 1280 x 960 at 64 tokens; the session keeps what it has read:\n",
            table(("ms", *AGAIN), again),
        ]
    )
