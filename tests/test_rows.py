"""Several sequences in one buffer: each answer is what it is alone, whoever shares its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime import Session, load
from leanvlm.runtime.backends.ort_memory import DeviceMemory
from leanvlm.runtime.backends.rows import block, seen_by, takes_rows
from leanvlm.runtime.draft import Draft, Room
from leanvlm.runtime.errors import BackendError, ContextOverflowError, InputError
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.sampling import SamplingConfig
from leanvlm.runtime.serving.runners import InTurn, Together, open_runner, usual_rows
from leanvlm.runtime.session import user_message

pytestmark = pytest.mark.filterwarnings("ignore:a bundle for .* runs on cpu")
BUNDLES = ("tiny_bundle", "cuda_bundle")
CAPACITY = 512


@pytest.fixture(params=BUNDLES)
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    with load(request.getfixturevalue(request.param), device="cpu", threads=1) as opened:
        yield opened


def questions() -> list[tuple[str, list[Image.Image], int]]:
    """Prompts of several lengths, with a picture or none, and how long their answers are."""
    scenes = [Image.open(SAMPLES_DIR / name).convert("RGB") for name in ("complex-9003.png", "simple-9001.png")]
    texts = [
        "Describe the image",
        "What is below the green ring, please?",
        "Say something long" + " about it" * 20,
        "How are you today, and why?",
    ]
    return [(text, scenes[at % 2 : at % 2 + 1] * (at != 3), 5 + 3 * at) for at, text in enumerate(texts)]


def draft(session: Session, text: str, images: Sequence[Image.Image], new: int, **options: Any) -> Draft:
    given = GenerateOptions(new, ignore_end=True, **options)
    return session.draft([user_message(text, len(images))], images, given, room=Room(CAPACITY))


def opened(session: Session, rows: int, capacity: int = CAPACITY) -> Together:
    runner = open_runner(session, rows, capacity)
    assert isinstance(runner, Together)
    return runner


def alone(session: Session) -> list[tuple[int, ...]]:
    """What a session that keeps nothing answers, one question at a time."""
    with load(session.folder, device="cpu", threads=1, cache_mb=0) as fresh:
        asked = questions()
        return [fresh.generate(text, images, max_new_tokens=new, ignore_end=True).token_ids for text, images, new in asked]


def together(runner: Together, drafts: Sequence[Draft], join: Callable[[int], int]) -> list[tuple[int, ...]]:
    """Answer all, of which number n joins after `join(n)` steps, and leaves when it has its tokens."""
    waiting, step = list(enumerate(drafts)), 0
    going: list[Draft] = []
    while waiting or going:
        for number, one in [(n, one) for n, one in waiting if join(n) <= step]:
            runner.begin(one)
            waiting.remove((number, one))
            going.append(one)
        for one in [one for one in going if one.done]:
            runner.end(one)
            going.remove(one)
        if going:
            assert runner.step(going) == {}
        step += 1
    return [tuple(one.ids) for one in drafts]


@pytest.mark.parametrize(
    ("rows", "among", "expected"),
    [
        ([0], 8, (0, 1)),
        ([5], 8, (5, 1)),
        ([2, 3], 8, (2, 2)),
        ([1, 2], 8, (0, 4)),
        ([0, 5], 8, (0, 8)),
        ([4, 5], 6, (4, 2)),
        ([3, 5], 6, (0, 6)),
    ],
)
def test_a_block_is_the_smallest_that_holds_its_rows(rows: list[int], among: int, expected: tuple[int, int]) -> None:
    assert block(rows, among) == expected


@pytest.mark.parametrize("captures", [False, True])
@pytest.mark.parametrize("apart", [0, 2])
def test_rows_answer_as_each_alone(session: Session, monkeypatch: pytest.MonkeyPatch, apart: int, captures: bool) -> None:
    if captures:
        # As on a GPU: prompts are padded, and the next step begins while texts are made.
        monkeypatch.setattr(DeviceMemory, "captures", True)
    expected = alone(session)
    runner = opened(session, 4)
    asked = questions()
    for _ in range(2):  # Once more in rows that hold something.
        assert together(runner, [draft(session, *one) for one in asked], lambda n: apart * n) == expected


@pytest.mark.gpu
def test_rows_on_a_gpu_answer_as_each_alone(cuda_bundle: Path) -> None:
    """With real captures, replays and steps ahead; the built-in model has no close calls."""
    with load(cuda_bundle) as session:
        asked, runner = questions(), opened(session, 4)
        expected = [
            session.generate(text, images, max_new_tokens=new, ignore_end=True).token_ids for text, images, new in asked
        ]
        for apart in (0, 2):
            assert together(runner, [draft(session, *one) for one in asked], lambda n, apart=apart: apart * n) == expected


def test_a_row_goes_on_from_what_it_holds(session: Session) -> None:
    runner = opened(session, 3)
    asked = questions()
    expected = alone(session)
    together(runner, [draft(session, *one) for one in asked[:2]], lambda n: 0)
    # The row that was used longest ago is taken, and the other rows of a block run along with two of them.
    together(runner, [draft(session, *asked[3])], lambda n: 0)
    for number in (1, 0):
        again = draft(session, *asked[number])
        assert together(runner, [again], lambda n: 0) == [expected[number]]
        assert again.timings.reused_positions == len(again.prompt) - 1


def test_rows_that_run_along_are_not_touched(session: Session) -> None:
    """With a cache full to its last position there is no place behind: it is never asked for."""
    runner = opened(session, 2, 64)
    text = "Hm"
    length = len(draft(session, text, [], 1).prompt)
    full = draft(session, text, [], 64 - length)
    other = draft(session, text + ", you?", [], 20)
    short = together(runner, [full, other], lambda n: 3 * n)
    with load(session.folder, device="cpu", threads=1, cache_mb=0) as fresh:
        for (prompt, new), found in zip([(text, 64 - length), (text + ", you?", 20)], short, strict=True):
            assert fresh.generate(prompt, max_new_tokens=new, ignore_end=True).token_ids == found


def test_sampling_and_log_probabilities_are_those_alone(session: Session) -> None:
    text, images, _ = questions()[0]
    options: list[dict[str, Any]] = [{"top_logprobs": 3}, {"sampling": SamplingConfig(temperature=1.5, seed=7)}, {}]
    runner = opened(session, 4)
    found = [draft(session, text, images, 9, **one) for one in options]
    together(runner, found, lambda n: 0)
    for one, given in zip(found, options, strict=True):
        wanted = draft(session, text, images, 9, **given)
        for _ in session.tokens(wanted):
            pass
        assert one.ids == wanted.ids
        for ours, theirs in zip(one.chances, wanted.chances, strict=True):
            assert (ours.token, [token for token, _ in ours.top]) == (theirs.token, [token for token, _ in theirs.top])
            np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-5)
    logprobs = found[0].chances[0]
    assert len(logprobs.top) == 3
    assert logprobs.top[0] == (logprobs.token, logprobs.logprob)
    assert found[2].chances == []


def test_a_prompt_that_does_not_fit_a_row_is_refused(session: Session) -> None:
    text, images, _ = questions()[2]
    with pytest.raises(ContextOverflowError, match="here 512 fit"):
        draft(session, text, images, 500)


def test_a_run_that_fails_is_every_rows(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened(session, 2)
    one = draft(session, *questions()[0])
    runner.begin(one)
    monkeypatch.setattr(runner._pool.rows, "step", fails)
    with pytest.raises(BackendError, match="broken"):
        runner.step([one])


def fails(*_: Any) -> None:
    raise BackendError("broken")


def test_sizes_that_are_not_possible(session: Session) -> None:
    assert takes_rows(session.manifest.decoder)
    assert isinstance(open_runner(session, 1), InTurn)
    for rows, context in ((0, None), (65, None), (2, 0), (2, 10**9)):
        with pytest.raises(InputError, match="not possible"):
            open_runner(session, rows, context)


def test_a_decoder_that_cannot_share_a_run_answers_in_turn(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = session.manifest.decoder
    roles = {name: "last_seen" if role == "mask" else role for name, role in spec.roles.items()}
    monkeypatch.setattr(session, "manifest", replace(session.manifest, decoder=replace(spec, roles=roles)))
    assert isinstance(open_runner(session), InTurn)
    with pytest.raises(InputError, match="leave --rows out"):
        open_runner(session, 2)


def test_fewer_rows_where_memory_is_short(session: Session) -> None:
    spec = session.manifest.decoder
    row = 2 * spec.layers * spec.kv_heads * spec.head_dim * 256 * (2 if spec.kv_dtype == "float16" else 4)
    found = [usual_rows(spec, "cuda", 256, free) for free in (None, 16 * row, 16 * row - 1, 4 * row, 0, -1)]
    assert found == [8, 8, 4, 2, 1, 1]
    assert (usual_rows(spec, "cpu", 256, None), usual_rows(spec, "another", 256, None)) == (4, 1)


def test_what_a_row_sees() -> None:
    class Filled:
        def __init__(self, length: int) -> None:
            self.length, self.capacity = length, 8

    caches: Any = [Filled(0), Filled(5), Filled(8)]
    assert seen_by(caches) == [1, 6, 8]
