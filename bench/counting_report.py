"""The chapter on counting: which share of the wrong answers has lost an object, and which is the model's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.cells import table
from bench.counting import ORACLE, Answer

# Kept tokens of the asked object that has fewest, from and to.
STEPS = ((0, 0), (1, 1), (2, 3), (4, 7), (8, 575))
Answers = dict[str, list[Answer]]
# A cluster's centre says little of what was merged into it.
MERGING = ("prumerge", "visionzip")


def counting_section(path: Path, data: dict[str, Any]) -> str:
    """Return the chapter of a counting measurement: conditions, the split for each method, and right answers by tokens left."""
    answers = {row["method"]: [Answer(bool(r), o, least) for r, o, least in row["answers"]] for row in data["results"]}
    run, budget = data["conditions"], data["budget"]
    pruned = sorted((name for name in answers if name != "none"), key=lambda name: -_share(answers[name], "right"))
    ordered = ["none", ORACLE, *(name for name in pruned if name != ORACLE)]
    heads = ["", "right", "wrong, lost", "wrong, the model", "questions with a lost object", "right where none is lost"]
    parts = [
        f"## Counting with {budget} of 576 tokens: what is lost, and what is the model\n",
        _explanation(data, answers),
        _verdict(answers) + "\n",
        f"Raw answers: [results/{path.name}](results/{path.name}). Commit {run['commit']}, {run['date']}; {run['machine']}; "
        f"Python {run['python']}, {', '.join(f'{name} {number}' for name, number in run['versions'].items())}; "
        f"{run['seconds']} s. Command:\n\n    {run['command']}\n",
        "### Of all questions, %\n",
        table(heads, list(_rows(answers, ordered))),
        "### Right answers, % (and how many questions), by the kept tokens of the asked object that has fewest\n",
        "All methods but the oracle and those that merge; questions about at least one object.\n",
        _by_least(answers),
    ]
    return "\n".join(parts)


def _explanation(data: dict[str, Any], answers: Answers) -> str:
    model = data["model"]
    merging = " and ".join(f"`{name}`" for name in MERGING if name in answers)
    return (
        f"Model `{model['id']}` (weights {model['sha256'][:12]}…), the {len(answers['none'])} questions how many there are "
        f"about {data['scenes']} held-out complex scenes, evaluated in torch, fp32. A patch belongs to the object that covers "
        "most of it, at least a fifth. *Lost*: an asked object has none of the kept tokens. *The model*: each has one at "
        "least, and the answer is wrong all the same. The oracle takes patches of all objects in turn, from their centres "
        "outwards, so it loses nothing. "
        + (f"{merging} merge other tokens into the kept ones, which this does not see. " if merging else "")
        + "The last column is of different questions for each method: who loses objects in many of them is left with the easy "
        "ones.\n"
    )


def _share(answers: list[Answer], what: str) -> float:
    """Share of answers that are right, wrong with an object lost, wrong without, or with an object lost."""
    chosen = {
        "right": [a for a in answers if a.right],
        "lost": [a for a in answers if not a.right and a.least == 0],
        "model": [a for a in answers if not a.right and a.least > 0],
        "with_lost": [a for a in answers if a.least == 0],
    }
    return 100 * len(chosen[what]) / max(len(answers), 1)


def _rows(answers: Answers, ordered: list[str]) -> Iterator[list[str]]:
    for name in ordered:
        found = answers[name]
        complete = [answer for answer in found if answer.least > 0]
        shares = [_share(found, what) for what in ("right", "lost", "model", "with_lost")]
        yield [name, *(f"{share:.1f}" for share in (*shares, _share(complete, "right")))]


def _verdict(answers: Answers) -> str:
    agile = answers["agile"]
    wrong, lost, model = 100 - _share(agile, "right"), _share(agile, "lost"), _share(agile, "model")
    best, whole = (100 - _share(answers[name], "right") for name in (ORACLE, "none"))
    return (
        f"`agile` answers {wrong:.1f} % wrongly: in {lost:.1f} points of that ({100 * lost / wrong:.0f} % of the wrong answers)"
        f" an object is lost, {model:.1f} are the model's. With the oracle's tokens {best:.1f} % are wrong, with all 576 "
        f"{whole:.1f} %."
    )


def _by_least(answers: Answers) -> str:
    chosen = [
        answer
        for name, found in answers.items()
        if name not in ("none", ORACLE, *MERGING)
        for answer in found
        if answer.objects > 0
    ]
    heads, cells = [], []
    for low, high in STEPS:
        mine = [answer for answer in chosen if low <= answer.least <= high]
        heads.append(f"{low}" if low == high else f"{low} or more" if high > 500 else f"{low}-{high}")
        cells.append(f"{_share(mine, 'right'):.1f} ({len(mine)})" if mine else "")
    return table(["kept tokens", *heads], [["right", *cells]])
