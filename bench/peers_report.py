"""The chapter of RESULTS.md on other programs and ours, given the same questions on the processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from bench.cells import table

OURS = "ours "
# What is promised: how much of another row's time one may take.
FIRST_64, FIRST_64_OWN, FIRST_ALL, SECOND_64, GROWTH = 0.77, 0.5, 1.1, 0.25, 1.2
TODAY = "ours onnxruntime fp32, 64"
HEADS = (
    "ms", "first token", "to the best peer", "second question", "next turn", "turn 5 to turn 2", "a further token", "peak GB",
    "equal tokens",
)  # fmt: skip

Row = Mapping[str, Any]


def peers_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter: conditions, the table, and whether what is promised holds."""
    rows = {name: row for name, row in data["rows"].items() if row["rounds"]}
    best = best_peer(rows)
    lines = [_line(name, row, rows, data["reference"], best) for name, row in rows.items()]
    failed = [f"- {name}: {row['error']}" for name, row in data["rows"].items() if "error" in row]
    notes = [f"- {name}: {row['note']}." for name, row in rows.items() if row["note"]]
    return "\n".join(
        [
            "## Other programs and ours, on the processor\n",
            _conditions(path, data, rows),
            table(HEADS, lines),
            *_words(rows, data["reference"]),
            *_verdicts(rows, best),
            "",
            *notes,
            *(["", "Failed:", "", *failed] if failed else []),
            "",
        ]
    )


def first_ms(row: Row) -> float:
    """Return the median time to the first token of a first question about a picture."""
    return median(asked["first"]["first_ms"] for one in row["rounds"] for asked in one["questions"])


def second_ms(row: Row) -> float:
    """Return the median time to the first token of a second question about the same picture."""
    return median(asked["second"]["first_ms"] for one in row["rounds"] for asked in one["questions"])


def step_ms(row: Row) -> float:
    """Return the median time of a further token."""
    return median(ms for one in row["rounds"] for asked in one["questions"] for ms in asked["first"]["steps_ms"])


def turns_ms(row: Row) -> list[float]:
    """Return the median time to the first token of each turn of the chat."""
    return [median(times) for times in zip(*([turn["first_ms"] for turn in one["chat"]] for one in row["rounds"]), strict=True)]


def equal_tokens(row: Row, other: Row) -> tuple[int, int]:
    """Return how many tokens are equal from the first one of each answer on, and how many there are."""
    equal = count = 0
    for asked, told in zip(row["rounds"][0]["questions"], other["rounds"][0]["questions"], strict=True):
        for which in ("first", "second"):
            ours, theirs = asked[which]["tokens"], told[which]["tokens"]
            count += len(theirs)
            pairs = list(zip(ours, theirs, strict=False))
            equal += next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return equal, count


def best_peer(rows: Mapping[str, Row]) -> str:
    """Return the peer with the lowest time to the first token; all of them read all image tokens."""
    return min((name for name in rows if not name.startswith(OURS)), key=lambda name: first_ms(rows[name]))


def _line(name: str, row: Row, rows: Mapping[str, Row], reference: str, best: str) -> list[str]:
    turns, told = turns_ms(row), reference if row["budget"] is None else TODAY
    equal = "{} of {}".format(*equal_tokens(row, rows[told])) if told in rows else ""
    return [
        name,
        f"{first_ms(row):.0f}",
        f"{first_ms(row) / first_ms(rows[best]):.2f}",
        f"{second_ms(row):.0f}",
        f"{median(turns[1:]):.0f}",
        f"{turns[-1] / turns[1]:.2f}",
        f"{step_ms(row):.1f}",
        f"{max(one['peak_bytes'] for one in row['rounds']) / 1e9:.2f}",
        equal,
    ]


def _conditions(path: Path, data: dict[str, Any], rows: Mapping[str, Row]) -> str:
    versions = {name: number for row in rows.values() for name, number in row["rounds"][0]["versions"].items()}
    tools = ", ".join(f"{name} {number.split(' ')[0]}" for name, number in versions.items())
    settings = ", ".join(f"{name}={value}" for name, value in data["environment"].items())
    flags = ", ".join(data["flags"]) or "none of AVX-512 VNNI, BF16 and AMX"
    return (
        f"{data['model']}; {data['picture']}, another one each time; {data['machine']} ({flags}); {data['threads']} threads, "
        f"{settings}; {tools}. Every row in a process of its own, one after another, in {_rounds(rows)} rounds; after one "
        f"answer that does not count, two questions of about {_prompt_tokens(rows)} tokens (all image tokens) about each of "
        f"{data['repeats']} pictures with answers of {data['tokens']} tokens, and a chat of {len(data['prompts']['turns'])} "
        f"turns about another with {data['chat_tokens']}. Medians; [{path.name}](results/{path.name}), {data['date']}, commit "
        f"{str(data['commit'])[:7]}; `{data['command']}`. {data.get('note', '')}\n"
    )


def _rounds(rows: Mapping[str, Row]) -> str:
    counts = sorted({len(row["rounds"]) for row in rows.values()})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _prompt_tokens(rows: Mapping[str, Row]) -> int:
    row = next(row for row in rows.values() if row["budget"] is None)
    return int(row["rounds"][0]["questions"][0]["first"]["prompt_tokens"])


def _words(rows: Mapping[str, Row], reference: str) -> list[str]:
    return [
        "\n*Next turn*: median of turns 2 to 5. *Equal tokens*: of the answers, until the first other one; rows of all tokens "
        f"are compared with `{reference}`, rows of 64 with `{TODAY}`.\n"
    ]


def _verdicts(rows: Mapping[str, Row], best: str) -> list[str]:
    """Say of each promise whether it holds, by how much, and of which row."""
    pruned = {name: row for name, row in rows.items() if name.startswith(OURS) and row["budget"]}
    whole = {name: row for name, row in rows.items() if name.startswith(OURS) and not row["budget"]}
    if not pruned or not whole:
        return []
    fast, full = (min(of, key=lambda name: first_ms(of[name])) for of in (pruned, whole))
    lowest = min(rows, key=lambda name: first_ms(rows[name]))
    time, peer = first_ms(rows[fast]), first_ms(rows[best])
    place = "the lowest of all rows" if lowest == fast else f"not the lowest, which is `{lowest}`"
    lines = [
        f"- First token at 64 image tokens, `{fast}`: {time:.0f} ms, {place}.",
        _held(f"{time / peer:.2f} of the best peer's with all tokens, `{best}`", time / peer, FIRST_64),
    ]
    if TODAY in rows:
        own = time / first_ms(rows[TODAY])
        lines.append(_held(f"{own:.2f} of our fp32 bundle's on ONNX Runtime", own, FIRST_64_OWN))
    whole_ms = first_ms(rows[full])
    text = f"All image tokens, `{full}`: {whole_ms:.0f} ms, {whole_ms / peer:.2f} of the best peer's"
    lines.append(_held(text, whole_ms / peer, FIRST_ALL))
    for name, row in pruned.items():
        ratio = second_ms(row) / first_ms(row)
        lines.append(_held(f"Second question, `{name}`: {ratio:.2f} of the first", ratio, SECOND_64))
        turns = turns_ms(row)
        grown, most = turns[-1] / turns[1], max(turns[2:])
        text = f"Turn 5, `{name}`: {turns[-1]:.0f} ms, {grown:.2f} of turn 2's (the slowest of turns 3 to 5: {most:.0f})"
        lines.append(_held(text, grown, GROWTH))
    lines += [
        f"- `{name}`: {'all' if equal == count else f'only {equal}'} of {count} tokens equal."
        for name, row in rows.items()
        if row["exact"] and not row["budget"]
        for equal, count in [equal_tokens(row, rows[next(iter(rows))])]
    ]
    return lines


def _held(text: str, ratio: float, bound: float) -> str:
    return f"- {text}; promised: at most {bound}: {'holds' if ratio <= bound else 'does **not** hold'}."
