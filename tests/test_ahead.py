"""Steps that are begun before they are asked for: the answers are those of steps that are not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime import Session, load
from leanvlm.runtime.backends.attention import XQA, step_kernels
from leanvlm.runtime.backends.cuda_cache import CudaCache
from leanvlm.runtime.backends.sequences import DecoderSequence
from leanvlm.runtime.backends.thread import OneThread
from leanvlm.runtime.errors import BackendError, BundleError
from leanvlm.runtime.machine.gpu import Gpu
from leanvlm.runtime.session import user_message

PICTURE = SAMPLES_DIR / "complex-9003.png"
ASKED = [("What is below the green ring?", [PICTURE]), ("Describe the image", [PICTURE]), ("What?", [])]
pytestmark = pytest.mark.filterwarnings("ignore:a bundle for cuda runs on cpu")


@pytest.fixture
def session(cuda_bundle: Path) -> Iterator[Session]:
    with load(cuda_bundle, device="cpu", threads=1, cache_mb=0) as opened:
        yield opened


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the position of every step."""
    made: list[int] = []
    step = CudaCache._step

    def counted(self: CudaCache, slot: Any, embedding: Any, position: int, *rest: Any) -> None:
        made.append(position)
        step(self, slot, embedding, position, *rest)

    monkeypatch.setattr(CudaCache, "_step", counted)
    return made


def answers(session: Session, **options: Any) -> list[tuple[int, ...]]:
    return [session.generate(prompt, images, **options).token_ids for prompt, images in ASKED]


def test_answers_are_those_of_steps_one_by_one(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DecoderSequence, "ahead", lambda *_: None)
        wanted = [answers(session), answers(session, max_new_tokens=9, ignore_end=True)]
    assert [answers(session), answers(session, max_new_tokens=9, ignore_end=True)] == wanted


def test_no_step_is_made_behind_an_end(session: Session, steps: list[int]) -> None:
    for options in ({}, {"max_new_tokens": 4}, {"max_new_tokens": 1}):
        for prompt, images in ASKED:
            steps.clear()
            answer = session.generate(prompt, images, **options)
            assert len(steps) == len(answer.token_ids) - 1 == len(answer.timings.decode)
            assert steps == sorted(steps)


def test_a_stop_string_wastes_one_step_at_most(session: Session, steps: list[int]) -> None:
    whole = session.generate(*ASKED[0])
    steps.clear()
    answer = session.generate(*ASKED[0], stop=whole.text.split()[1])
    assert len(answer.token_ids) <= len(steps) + 1 <= len(answer.token_ids) + 1
    assert answers(session)[0] == whole.token_ids


def test_streams_in_turn_and_dropped(session: Session) -> None:
    wanted = answers(session)
    streams = [iter(session.stream(prompt, images)) for prompt, images in ASKED]
    for pieces in streams:
        next(pieces)
    del streams, pieces
    first, second = (session.stream(*ASKED[at]) for at in (0, 1))
    ended = object()
    while any(next(stream, ended) is not ended for stream in (first, second)):
        pass
    assert [first.answer.token_ids, second.answer.token_ids] == wanted[:2]


def test_a_step_for_another_token_is_made_anew(session: Session) -> None:
    """And nothing of the one that was begun is left: the logits are those of a sequence that never began it."""
    prompt = session.prompt(session.prompt_ids([user_message("What is it?", 0)], 0), [])
    rows, position = session.table.rows, prompt.next_position

    def logits(begun: bool) -> list[np.ndarray[Any, Any]]:
        sequence, found = session.decoder().sequence(len(prompt) + 8), []
        sequence.load(prompt)
        sequence.prefill()
        for step, token in enumerate((5, 9, 11)):
            scores = sequence.step(rows([token])[0], position + step, token)
            found.append(scores.logits())
            if begun:
                sequence.ahead(session.table.row, position + step + 1, ())
                assert scores.greedy() == found[-1].argmax() != (5, 9, 11, 0)[step + 1]
        sequence.close()
        return found

    for wanted, found in zip(logits(False), logits(True), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_step_that_fails_says_so_once_and_nothing_else_does(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, step, made = answers(session), CudaCache._step, []

    def broken(*arguments: Any) -> None:
        made.append(arguments)
        if len(made) == 7:
            raise BackendError("the decoder failed: no memory")
        step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CudaCache, "_step", broken)
        with pytest.raises(BackendError, match="no memory"):
            session.generate(*ASKED[1], ignore_end=True, max_new_tokens=20)
    assert len(made) == 7
    assert answers(session) == wanted


def test_a_row_that_is_not_finite_is_refused_though_its_step_was_begun(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step takes the row as it is; who asks for the step looks at it."""
    whole = session.generate(*ASKED[1]).token_ids
    spoiled = np.array(session.table._rows)
    spoiled[whole[4]] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(session.table, "_rows", spoiled)
        with pytest.raises(BundleError, match=f"a value for token {whole[4]} that is not finite"):
            session.generate(*ASKED[1])
    assert session.generate(*ASKED[1]).token_ids == whole


def test_a_step_elsewhere_is_made_anew(session: Session) -> None:
    prompt = session.prompt(session.prompt_ids([user_message("What is it?", 0)], 0), [])
    rows, position = session.table.rows, prompt.next_position
    sequence = session.decoder().sequence(len(prompt) + 8)
    sequence.load(prompt)
    token = sequence.prefill().greedy()
    token = sequence.step(rows([token])[0], position, token).greedy()
    sequence.ahead(session.table.row, position + 1, ())
    cache: Any = sequence._cache
    flight = cache._flight
    assert sequence.step(rows([token])[0], position + 2, token)._job is not flight.job  # type: ignore[attr-defined]
    sequence.close()


def test_the_interpreter_ends_behind_a_step_that_nobody_asked_for(cuda_bundle: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from leanvlm.runtime import load\n"
        "from leanvlm.runtime.backends.cuda_cache import CudaCache\n"
        "step = CudaCache._step\n"
        "def slow(*arguments):\n"
        "    step(*arguments); time.sleep(0.5); os.write(1, b'made\\n')\n"
        "CudaCache._step = slow\n"
        "session = load(sys.argv[1], device='cpu', threads=1)\n"
        "stream = session.stream('Describe the image', max_new_tokens=50, ignore_end=True)\n"
        "pieces = iter(stream)\n"
        "for _ in range(2): next(pieces)\n"
        "begun = session.decoder()._kept._flight is not None\n"
        "session.close(); os.write(1, b'begun %d\\n' % begun)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(cuda_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "begun 1" in lines
    assert lines[-1] == "made", "the interpreter did not wait"


@pytest.mark.parametrize(
    ("sm", "heads", "asked", "found"),
    [(90, 32, None, "0"), (90, 8, None, None), (86, 32, None, None), (None, 32, None, None), (90, 32, "1", "1")],
)
def test_which_kernels_a_step_takes(
    sm: int | None, heads: int, asked: str | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(XQA, raising=False)
    if asked is not None:
        monkeypatch.setenv(XQA, asked)
    gpu = None if sm is None else Gpu("a GPU", 80_000_000_000, divmod(sm, 10))
    spec: Any = SimpleNamespace(kv_heads=heads, head_dim=128, hidden_size=4096)
    seen = []

    def open_session() -> None:
        with step_kernels(spec, gpu):
            seen.append(os.environ.get(XQA))
            raise BackendError("a session that does not open")

    with pytest.raises(BackendError, match="does not open"):
        open_session()
    assert seen == [found]
    assert os.environ.get(XQA) == asked


def test_a_job_that_failed_is_never_taken_for_one_that_did_not() -> None:
    job = OneThread().start(lambda: 1 / 0)
    job.join()
    with pytest.raises(ZeroDivisionError):
        job.wait()
    with pytest.raises(BackendError, match="the run that this one needs failed"):
        job.wait()
