"""A session's behaviour: streaming, end and stop, sampling, limits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from prompts import text_prompt

from leanvlm.runtime import Session, load
from leanvlm.runtime.errors import BackendError, ContextOverflowError, InputError, LeanVLMWarning

QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def session(demo_bundle: Path) -> Iterator[Session]:
    with load(demo_bundle, threads=1) as session:
        yield session


def test_streamed_pieces_join_to_the_answer(session: Session, sample_image: Path) -> None:
    generation = session.stream(QUESTION, sample_image)
    pieces = list(generation)
    assert len(pieces) > 5
    assert "".join(pieces) == generation.answer.text
    assert generation.answer.text == session.generate(QUESTION, [sample_image]).text
    assert not generation.answer.text.startswith(" ")


def test_end_token_ends_the_answer(session: Session, sample_image: Path) -> None:
    answer = session.generate("How many shapes are there?", [sample_image])
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] in session.end_ids
    assert answer.text == "12"


def test_length_ends_the_answer(session: Session, sample_image: Path) -> None:
    answer = session.generate(QUESTION, [sample_image], max_new_tokens=3)
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 3)
    assert (len(answer.timings.decode), len(answer.timings.sample)) == (2, 3)


def test_stop_string_ends_the_answer_and_is_left_out(session: Session, sample_image: Path) -> None:
    whole = session.generate(QUESTION, [sample_image]).text
    answer = session.generate(QUESTION, [sample_image], stop="ring")
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index("ring")]


def test_sampling_repeats_with_its_seed(session: Session, sample_image: Path) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        answer = session.generate(QUESTION, [sample_image], temperature=3.0, top_p=0.99, seed=seed, max_new_tokens=12)
        return answer.token_ids

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_images_come_as_paths_bytes_and_pictures(session: Session, sample_image: Path) -> None:
    data = sample_image.read_bytes()
    sources = [
        sample_image,
        str(sample_image),
        data,
        bytearray(data),
        memoryview(data),
        BytesIO(data),
        Image.open(sample_image),
    ]
    found = {session.generate(QUESTION, source).text for source in sources}
    assert len(found | {session.generate(QUESTION, sources).text for sources in ([sample_image], [bytearray(data)])}) == 1


def test_context_overflow_says_the_numbers(session: Session, sample_image: Path) -> None:
    with pytest.raises(ContextOverflowError, match=r"2000.*2048"):
        session.generate(QUESTION, [sample_image], max_new_tokens=2000)


def test_longest_fitting_answer_is_not_refused(session: Session, sample_image: Path) -> None:
    prompt = session.generate(QUESTION, [sample_image], max_new_tokens=1).prompt_tokens
    answer = session.generate(QUESTION, [sample_image], max_new_tokens=2048 - prompt)
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "images", "options"),
    [
        ("  ", 1, {}),
        (QUESTION, 1, {"max_new_tokens": 0}),
        (QUESTION, 1, {"budget": 63}),
        (QUESTION, 1, {"temperature": -1.0}),
        (QUESTION, 1, {"top_p": 0.0}),
        ("<image> twice?", 1, {}),
        (QUESTION, 1, {"stop": ""}),
    ],
)
def test_wrong_requests_are_refused(
    session: Session, sample_image: Path, prompt: str, images: int, options: dict[str, float]
) -> None:
    with pytest.raises(InputError):
        session.generate(prompt, [sample_image] * images, **options)


def test_cache_larger_than_its_prompt_changes_nothing(session: Session, sample_image: Path) -> None:
    """A small answer before a long one makes the cache grow; the text must not depend on it."""
    alone = session.generate(QUESTION, [sample_image], max_new_tokens=100).text
    session.generate(QUESTION, [sample_image], max_new_tokens=1500)
    assert session.generate(QUESTION, [sample_image], max_new_tokens=100).text == alone


def test_decoder_refuses_more_than_its_cache(session: Session) -> None:
    sequence = session.backend.decoder().sequence(4)
    sequence.load(text_prompt(session.table.rows([1, 2, 3, 4, 5])))
    with pytest.raises(BackendError, match="5 positions do not fit a cache of 4"):
        sequence.prefill()


def test_no_more_threads_than_processors(demo_bundle: Path) -> None:
    most = len(os.sched_getaffinity(0))
    with pytest.warns(LeanVLMWarning, match=rf"^1000 threads for {most} processors .*; {most} are used$"):
        session = load(demo_bundle, threads=1000)
    with session, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(session.backend, "threads") == most  # noqa: B009 (of this backend, not of all)
        with load(demo_bundle, threads=most):
            pass
    with pytest.raises(InputError, match="threads 0 is not possible"):
        load(demo_bundle, threads=0)


def test_budgets_open_when_first_used(demo_bundle: Path, sample_image: Path) -> None:
    with load(demo_bundle) as session:
        session.generate(QUESTION, [sample_image], max_new_tokens=1)
        assert set(session.encoder._graphs) == {"vision_64.onnx"}
        session.generate(QUESTION, [sample_image], max_new_tokens=1, budget=576)
        assert set(session.encoder._graphs) == {"vision_64.onnx", "vision_576.onnx"}
