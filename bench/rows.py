"""What several answers at once take, beside one after another: tokens per second, time between tokens, and equality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench.beside.measure import machine as processor
from bench.latency import TEXT_TOKENS, machine, prompt_of
from leanvlm.runtime.draft import Draft
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.serving.runners import InTurn, Runner, open_runner
from leanvlm.runtime.session import Session, load, user_message

WARM = 8


@dataclass(frozen=True)
class RowsOptions:
    """What is measured.

    Attributes:
        bundle: A bundle for cpu or cuda.
        output: JSON file to write.
        rows: Answers at once, each in turn.
        tokens: Of each answer.
        budget: Image tokens kept; None is the bundle's default.
        rounds: Turns of everything.
        kernels: List the GPU's kernels of a step as well.
        threads: Processor threads.
    """

    bundle: Path
    output: Path
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)
    tokens: int = 64
    budget: int | None = None
    rounds: int = 3
    kernels: bool = False
    threads: int | None = None


def measure_rows(options: RowsOptions) -> dict[str, Any]:
    """Measure, write the JSON file, and return what was written.

    Answers have prompts of different lengths about pictures of their own. A step is one token for each of them, with its text
    made; it counts once all are running. `equal` says how many of the answers have the tokens that they have alone in a row;
    nothing is kept from one to the next, which would read prompts in other parts.
    """
    found: dict[str, dict[str, Any]] = {}
    with load(options.bundle, threads=options.threads, cache_mb=0) as session:
        runners: dict[str, Runner] = {"in turn": InTurn(session)}
        runners |= {str(count): open_runner(session, count) for count in (max(options.rows),) if count > 1}
        together = runners.get(str(max(options.rows)))
        one = together or runners["in turn"]
        alone = [_answer(session, one, options, [number])[0][0] for number in range(max(options.rows))]
        for _ in range(options.rounds):
            _note(found, "in turn", 1, *_answer(session, runners["in turn"], options, [0]), alone)
            for count in options.rows if together is not None else ():
                assert together is not None
                _note(found, str(count), count, *_answer(session, together, options, list(range(count))), alone)
        if options.kernels and together is not None:
            for count in options.rows:
                found[str(count)]["kernels"] = _kernels_of(session, together, options, count)
    rows = {name: _summary(values) for name, values in found.items()}
    where = machine()
    if where["gpu"] == "none":
        where |= {"gpu": None, "model": options.bundle.name} | processor()
    record = {
        "kind": "rows", **where, "command": "python -m bench rows", "bundle": options.bundle.name, "tokens": options.tokens,
        "rounds": options.rounds, "threads": options.threads, "rows": rows,
    }  # fmt: skip
    options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def _draft(session: Session, options: RowsOptions, number: int) -> Draft:
    picture = np.random.default_rng(number).integers(0, 256, (336, 336, 3)).astype(np.uint8)
    message = user_message(prompt_of(session, TEXT_TOKENS + 3 * number), 1)
    return session.draft([message], [picture], GenerateOptions(options.tokens, ignore_end=True), budget=options.budget)


def _answer(
    session: Session, runner: Runner, options: RowsOptions, numbers: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[float]]:
    """Answer questions at once; returns the tokens of each, and the times of the steps in ms."""
    drafts = [_draft(session, options, number) for number in numbers]
    for draft in drafts:
        runner.begin(draft)
        draft.push()
    times = []
    while not drafts[0].done:
        begin = perf_counter()
        failed = runner.step(drafts)
        for draft in drafts:
            draft.push()
        times.append(1e3 * (perf_counter() - begin))
        assert not failed, failed
    for draft in drafts:
        runner.end(draft)
    return [tuple(draft.ids) for draft in drafts], times[WARM:]


def _note(
    found: dict[str, dict[str, Any]],
    name: str,
    count: int,
    tokens: Sequence[tuple[int, ...]],
    times: Sequence[float],
    alone: Sequence[tuple[int, ...]],
) -> None:
    entry = found.setdefault(name, {"count": count, "times": [], "equal": [], "first_difference": []})
    entry["times"] += times
    entry["equal"].append(sum(one == two for one, two in zip(tokens, alone, strict=False)))
    entry["first_difference"] += [
        next(at for at, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1])
        for one, two in zip(tokens, alone, strict=False)
        if one != two
    ]


def _summary(entry: dict[str, Any]) -> dict[str, Any]:
    times = entry.pop("times")
    step = median(times)
    return {
        "step_ms_p50": round(step, 3),
        "step_ms_p99": round(float(np.percentile(times, 99)), 3),
        "tokens_per_second": round(1e3 * entry["count"] / (sum(times) / len(times)), 1),
        **entry,
    }


def _kernels_of(session: Session, runner: Runner, options: RowsOptions, count: int) -> Any:
    from bench.kernels import REPLAYS, kernels_of

    drafts = [_draft(session, options, number) for number in range(count)]
    for draft in drafts:
        runner.begin(draft)
    for _ in range(WARM):
        runner.step(drafts)
    found = kernels_of(lambda: runner.step(drafts))
    for draft in drafts:
        runner.end(draft)
    assert REPLAYS
    return dict(list(found.items())[:24])
