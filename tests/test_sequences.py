"""Answers in the making are independent: threads that ask at once, streams read in turn, streams that are abandoned."""

from __future__ import annotations

import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from fake_tensorrt import FakeDevice, add_engines, pretend
from PIL import Image

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime import Generation, Session, load
from leanvlm.runtime.backends import cuda_cache
from leanvlm.runtime.backends.ort_memory import UNCAPTURED, DeviceMemory
from leanvlm.runtime.backends.sequences import Decoder, DecoderSequence
from leanvlm.runtime.backends.thread import OneThread
from leanvlm.runtime.bundle import read_manifest, write_manifest
from leanvlm.runtime.errors import BackendError, ContextOverflowError, InputError, SessionClosedError
from leanvlm.runtime.session import GenerateOptions, user_message

THREADS, QUESTIONS = 8, 20
SM = 87
END = object()

Tokens = tuple[int, ...]
pytestmark = pytest.mark.filterwarnings("ignore:a bundle for .* runs on cpu")


def question(number: int) -> dict[str, Any]:
    """Prompts of several lengths, with an image or two or none, some of them sampled."""
    scenes = [Image.open(SAMPLES_DIR / name).convert("RGB") for name in ("complex-9003.png", "simple-9001.png")]
    images = [scenes[(number + at) % 2].rotate(90 * number) for at in range((1, 1, 2, 0)[number % 4])]
    sampling = {"temperature": 2.0, "seed": number} if number % 5 == 4 else {}
    text = "Describe the image" + ", please" * (number % 3) + f" ({number})." * (number > 1)
    return {"prompt": text, "images": images, "max_new_tokens": 6 + number % 7, "ignore_end": True, **sampling}


def ask(session: Session, number: int) -> Tokens:
    return session.generate(**question(number)).token_ids


def ask_at_once(session: Session, questions: int) -> list[list[Tokens]]:
    """Ask all questions from every thread, each in an order of its own, and return the answers by thread and question."""
    together = threading.Barrier(THREADS)

    def work(thread: int) -> list[Tokens]:
        together.wait()
        order = np.random.default_rng(thread).permutation(questions)
        answers = {int(number): ask(session, int(number)) for number in order}
        return [answers[number] for number in range(questions)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, range(THREADS)))


@pytest.fixture
def tiny(tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def engines(tensorrt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with engines of the stand-in."""
    copy = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(tensorrt_bundle, copy)
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, engines=add_engines(copy, manifest, SM)))
    return copy


@pytest.fixture(params=["cuda", "captured", "tensorrt", "portable"])
def session(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """The built-in model on every other backend; `captured` does on the processor all that capturing on a GPU would."""
    if request.param == "captured":
        monkeypatch.setattr(DeviceMemory, "captures", True)
    if request.param == "tensorrt":
        pretend(monkeypatch, FakeDevice(), SM)
        opened = load(request.getfixturevalue("engines"))
    else:
        name = "tensorrt_bundle" if request.param == "portable" else "cuda_bundle"
        opened = load(request.getfixturevalue(name), device="cpu", threads=1)
    with opened as session:
        yield session


def test_eight_threads_get_the_answers_that_each_gets_alone(tiny: Session) -> None:
    alone = [ask(tiny, number) for number in range(QUESTIONS)]
    assert len(set(alone)) == QUESTIONS
    assert ask_at_once(tiny, QUESTIONS) == [alone] * THREADS


def test_eight_threads_on_the_other_backends(session: Session) -> None:
    alone = [ask(session, number) for number in range(4)]
    assert len({answer[:6] for answer in alone}) > 1
    assert ask_at_once(session, 4) == [alone] * THREADS


def read_in_turn(generations: list[Generation]) -> list[Tokens]:
    iterators: list[Iterator[object]] = [iter(generation) for generation in generations]
    while any([next(iterator, END) is not END for iterator in iterators]):
        pass
    return [generation.answer.token_ids for generation in generations]


def test_streams_read_in_turn_get_the_answers_that_each_gets_alone(tiny: Session) -> None:
    numbers = range(5)
    alone = [ask(tiny, number) for number in numbers]
    assert read_in_turn([tiny.stream(**question(number)) for number in numbers]) == alone


def test_streams_read_in_turn_on_the_other_backends(session: Session) -> None:
    """Both images are encoded before either is read, so the second run moves the first one's features."""
    alone = [ask(session, number) for number in (0, 1, 5)]
    assert alone[0][:6] != alone[1][:6]
    assert read_in_turn([session.stream(**question(number)) for number in (0, 1, 5)]) == alone


def test_features_hold_while_others_encode(session: Session) -> None:
    """Images are encoded again and again by one thread, while another reads its own and answers from them."""
    picture, other = (question(number)["images"] for number in (0, 1))
    options = GenerateOptions(max_new_tokens=4, ignore_end=True)
    features = session.encode_images(picture, 64)
    rows = np.array(features[0].crops[0].embeddings)
    wanted = session.respond([user_message("What?", 1)], features, options).answer.token_ids
    done = threading.Event()

    def encode() -> None:
        while not done.is_set():
            session.encode_images(other, 64)

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(encode)
        try:
            for _ in range(3):
                features = session.encode_images(picture, 64)
                np.testing.assert_array_equal(np.array(features[0].crops[0].embeddings), rows)
                assert session.respond([user_message("What?", 1)], features, options).answer.token_ids == wanted
        finally:
            done.set()
        busy.result()


def test_captured_runs_are_one_thread_s_and_do_not_pile_up(cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime captures it keeps: by thread, and by id. So both stay few, however many ask."""
    runs: set[tuple[str, str]] = set()
    run = onnxruntime.InferenceSession.run_with_iobinding

    def recorded(self: Any, binding: Any, options: Any = None) -> None:
        if options is not None:
            runs.add((threading.current_thread().name, options.get_run_config_entry("gpu_graph_id")))
        run(self, binding, options)

    monkeypatch.setattr(DeviceMemory, "captures", True)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", recorded)
    with load(cuda_bundle, device="cpu", threads=1, cache_mb=0) as session:
        for number in (2, 1, 0):  # The largest first, so that one cache serves all.
            ask(session, number)
        assert {thread for thread, _ in runs} == {"leanvlm-device"}
        alone = {graph for _, graph in runs}
        assert str(UNCAPTURED) not in alone
        ask_at_once(session, 3)
        assert {graph for _, graph in runs} == {*alone, str(UNCAPTURED)}
        assert {thread for thread, _ in runs} == {"leanvlm-device"}


def test_captures_of_prompts_come_to_an_end(cuda_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reused of a prompt leaves rests of any length; the step, the first that is captured, stays so."""
    graphs: list[str] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def recorded(self: Any, binding: Any, options: Any = None) -> None:
        if options is not None:
            graphs.append(options.get_run_config_entry("gpu_graph_id"))
        run(self, binding, options)

    monkeypatch.setattr(cuda_cache, "MAX_CAPTURES", 3)
    monkeypatch.setattr(cuda_cache, "PROMPT_SLOTS", 1)
    monkeypatch.setattr(DeviceMemory, "captures", True)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", recorded)
    with load(cuda_bundle, device="cpu", threads=1) as session:
        for extra in range(9):
            session.generate("What?" + " Now." * 9 * (2 - extra % 3), max_new_tokens=3, ignore_end=True)
    assert {int(graph) for graph in graphs} == {UNCAPTURED, 1, 2, 3}
    assert graphs[-1] == "2"


def test_graphs_open_once_whoever_comes_first(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def slowly(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            opened.append(name)
            time.sleep(0.05)
            return function(*arguments)

        return call

    for name in ("graph", "decoder"):
        monkeypatch.setattr(tiny.backend, name, slowly(name, getattr(tiny.backend, name)))
    ask_at_once(tiny, 2)
    assert sorted(opened) == ["decoder", "graph"]


def made(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the capacity of every cache from now on."""
    capacities: list[int] = []
    decoder = session.decoder()
    make = decoder._make

    def counted(capacity: int, kept: bool) -> Any:
        capacities.append(capacity)
        return make(capacity, kept)

    monkeypatch.setattr(decoder, "_make", counted)
    return capacities


def drop(generation: Iterator[str]) -> None:
    for _ in generation:
        break


def fail(generation: Iterator[str]) -> None:
    def consume(pieces: Iterator[str]) -> None:
        for _ in pieces:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume(generation)


def close(generation: Any) -> None:
    next(generation)
    generation.close()


def never(generation: Iterator[str]) -> None:
    pass


@pytest.mark.parametrize("abandon", [drop, fail, close, never])
def test_an_abandoned_stream_leaves_its_cache_and_the_session(
    tiny: Session, abandon: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [ask(tiny, number) for number in range(4)]
    caches = made(tiny, monkeypatch)
    for number in range(4):
        abandon(tiny.stream(**question(number)))
        assert ask(tiny, number) == alone[number]
    assert not caches, "an answer after another needs no cache of its own"


def test_a_failed_step_gives_its_cache_back(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps the error keeps the frames that it went through, and so the sequence, but not its cache."""
    alone, caches = ask(tiny, 0), made(tiny, monkeypatch)

    def broken(*arguments: Any) -> Any:
        raise BackendError("the decoder failed: broken")

    with monkeypatch.context() as patch:
        patch.setattr(DecoderSequence, "step", broken)
        with pytest.raises(BackendError, match="broken") as error:
            ask(tiny, 0)
    assert ask(tiny, 0) == alone
    assert not caches
    assert error.value.__traceback__ is not None


def test_a_stream_that_waits_costs_the_others_a_cache_while_they_answer(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [ask(tiny, number) for number in range(3)]
    caches = made(tiny, monkeypatch)
    waiting = tiny.stream(**question(0))
    next(iter(waiting))
    assert [ask(tiny, number) for number in (1, 2)] == alone[1:]
    assert len(caches) == 2
    assert waiting.answer.token_ids == alone[0]
    assert [ask(tiny, number) for number in range(3)] == alone
    assert len(caches) == 2


class Stub:
    """A cache that does nothing."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity


def test_one_cache_is_kept() -> None:
    living: weakref.WeakSet[Stub] = weakref.WeakSet()
    found: list[tuple[int, bool, int]] = []

    def make(capacity: int, kept: bool) -> Any:
        found.append((capacity, kept, len(living)))
        stub = Stub(capacity)
        living.add(stub)
        return stub

    decoder = Decoder(make)
    first = decoder.sequence(64)
    first.close()
    second = decoder.sequence(32)
    beside = decoder.sequence(16)
    assert first.closed
    assert second.cache is not beside.cache
    assert found == [(64, True, 0), (16, False, 1)]
    beside.close()
    assert len(living) == 1
    del second  # Nobody closed it.
    larger = decoder.sequence(128)
    assert found[2:] == [(128, True, 0)], "the old one goes first"
    larger.close()
    larger.close()
    with pytest.raises(AssertionError):
        larger.prefill()
    again = decoder.sequence(128)
    assert len(found) == 3
    assert not again.closed
    assert [stub.capacity for stub in living] == [128]


def test_an_answer_can_be_asked_for_twice_and_read_on(tiny: Session) -> None:
    whole = tiny.generate(**question(0))
    generation = tiny.stream(**question(0))
    begun = next(iter(generation))
    rest = list(generation)
    assert begun + "".join(rest) == whole.text
    assert list(generation) == []
    assert generation.answer is generation.answer
    assert generation.answer.token_ids == whole.token_ids
    generation.close()
    assert generation.answer.token_ids == whole.token_ids


def test_an_abandoned_answer_says_so(tiny: Session) -> None:
    generation = tiny.stream(**question(0))
    close(generation)
    assert list(generation) == []
    for _ in range(2):
        with pytest.raises(InputError, match="given up before its end; ask again"):
            _ = generation.answer


def test_threads_may_share_one_stream(tiny: Session) -> None:
    options = {**question(0), "max_new_tokens": 200}
    whole = tiny.generate(**options)
    generation = tiny.stream(**options)
    with ThreadPoolExecutor(THREADS) as pool:
        pieces = list(pool.map(lambda thread: list(generation), range(THREADS)))
    assert sorted(chain(*pieces)) == sorted(tiny.stream(**options))
    assert generation.answer.text == whole.text


def test_closing_a_session_ends_its_streams_by_name(tiny: Session) -> None:
    generation = tiny.stream(**question(0))
    next(iter(generation))
    tiny.close()
    for asked in (lambda: next(iter(generation)), lambda: ask(tiny, 1), lambda: ask(tiny, 3)):
        with pytest.raises(SessionClosedError, match="closed; load the bundle again") as error:
            asked()
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="given up"):
        _ = generation.answer
    tiny.close()


def test_closing_a_session_while_others_answer(tiny: Session) -> None:
    def work(number: int) -> str:
        try:
            while True:
                ask(tiny, number)
        except SessionClosedError:
            return "told"

    with ThreadPoolExecutor(THREADS) as pool:
        asking = [pool.submit(work, number) for number in range(THREADS)]
        time.sleep(0.3)
        tiny.close()
        assert [answer.result() for answer in asking] == ["told"] * THREADS


def test_an_overflow_is_found_before_any_image_is_looked_at(tiny: Session) -> None:
    images = [Path("nowhere.png")] * 60
    with pytest.raises(ContextOverflowError, match=r"the prompt takes (\d+) positions and the answer up to 9.* 1024") as error:
        tiny.stream("What?", images, max_new_tokens=9)
    pictures = question(2)["images"] * 30
    plan = tiny.prompt(tiny.prompt_ids([user_message("What?", 60)], 60), tiny.encode_images(pictures, 16))
    assert f"takes {plan.next_position} positions" in str(error.value)


def test_one_thread_does_the_work_and_goes_with_its_owner() -> None:
    runner, seen = OneThread(), []
    for _ in range(3):
        runner.run(lambda: seen.append(threading.current_thread()))
    assert len(set(seen)) == 1
    assert seen[0] is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        runner.run(lambda: 1 / 0)
    runner.run(lambda: None)
    del runner
    seen[0].join(timeout=10)
    assert not seen[0].is_alive()


def test_an_interrupt_waits_for_the_work() -> None:
    done = []

    def work() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        done.append(True)

    runner = OneThread()
    with pytest.raises(KeyboardInterrupt):
        runner.run(work)
    assert done
    runner.run(lambda: done.clear())
    assert not done
