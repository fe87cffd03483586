"""Nothing twice: pictures that were encoded before, and what of a prompt a cache still holds. Answers are a fresh session's."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as checkpoints
import tiny_sizes
from fake_tensorrt import FakeDevice, add_engines, pretend
from PIL import Image

from leanvlm.demo import SAMPLES_DIR
from leanvlm.exporter import ExportConfig, export
from leanvlm.runtime import Answer, Session, load
from leanvlm.runtime.answer import Pruning
from leanvlm.runtime.backends import sequences
from leanvlm.runtime.backends.ort_memory import DeviceMemory
from leanvlm.runtime.backends.sequences import Decoder
from leanvlm.runtime.bundle import read_manifest, write_manifest
from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.errors import InputError
from leanvlm.runtime.layout import CropFeatures, ImageFeatures
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.reuse import Held, ImageCache, content_key
from leanvlm.runtime.session import CACHE_STEP

pytestmark = pytest.mark.filterwarnings("ignore:a bundle for .* runs on cpu", "ignore:the bundle's context is")
SM = 87
NEW = 8
FIRST, SECOND, OTHER = "What is there?", "What is there, on the left?", "How many are there?"
SCENES = [Image.open(SAMPLES_DIR / name).convert("RGB") for name in ("complex-9003.png", "simple-9001.png")]

Ask = Callable[..., Answer]


def ask(session: Session, prompt: Any, *images: Any, **options: Any) -> Answer:
    return session.generate(prompt, images, max_new_tokens=NEW, ignore_end=True, **options)


@pytest.fixture(params=["cpu", "cuda", "captured", "portable", "tensorrt", "openvino:f32"])
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, demo_bundle: Path
) -> tuple[str, Callable[..., Session]]:
    """The built-in model on every backend, and what opens a session; `captured` does all that capturing on a GPU would."""
    if request.param == "captured":
        monkeypatch.setattr(DeviceMemory, "captures", True)
    bundle, options = demo_bundle, {}
    if request.param in ("cuda", "captured"):
        bundle, options = request.getfixturevalue("cuda_bundle"), {"device": "cpu"}
    if request.param in ("portable", "tensorrt"):
        bundle, options = request.getfixturevalue("tensorrt_bundle"), {"device": "cpu"}
    if request.param == "tensorrt":
        import shutil

        bundle, options = Path(shutil.copytree(bundle, tmp_path / "bundle")), {}
        manifest = read_manifest(bundle)
        write_manifest(bundle, replace(manifest, engines=add_engines(bundle, manifest, SM)))
        pretend(monkeypatch, FakeDevice(), SM)
    if ":" in request.param:
        pytest.importorskip("openvino")
        options = {"provider": request.param}
    return request.param, lambda **more: load(bundle, **{**options, **more})


def test_answers_are_a_fresh_session_s(opened: tuple[str, Callable[..., Session]]) -> None:
    """A second question about a picture, another picture behind the same text, no picture, the first question again."""
    name, open_session = opened
    questions: list[tuple[str, list[Any]]] = [
        (FIRST, SCENES[:1]), (SECOND, SCENES[:1]), (SECOND, SCENES[1:]), (OTHER, []), (FIRST, SCENES), (OTHER, SCENES),
        (FIRST, SCENES[:1]),
    ]  # fmt: skip
    with open_session(cache_mb=0) as fresh:
        wanted = [ask(fresh, prompt, *images) for prompt, images in questions]
    assert all((one.timings.reused_images, one.timings.reused_positions) == (0, 0) for one in wanted)
    with open_session() as session:
        found = [ask(session, prompt, *images) for prompt, images in questions]
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert len({one.token_ids for one in found}) > 3
    assert [one.timings.reused_images for one in found] == [0, 1, 0, 0, 2, 2, 1]
    read = [one.timings.reused_positions for one in found]
    if name == "tensorrt":
        assert read == [0] * len(questions)
        return
    # The text before the picture, the picture, and the words that the questions share.
    image = found[0].pruning[0].kept
    assert read[1] > image
    if name == "openvino:f32":
        assert read[2] == 0, "OpenVINO goes on behind half a prompt at least"
    else:
        assert 0 < read[2] < found[2].prompt_tokens - image
    assert 2 * image < read[5] < found[5].prompt_tokens
    assert image < read[6] < found[6].prompt_tokens


SHAPES = ["llava", "llava_next", "smolvlm", "gemma3", "paligemma", "mistral3", "qwen2_5_vl", "qwen3_5"]
QUICK = ("mistral3", "qwen3_5", "gemma3")


@pytest.mark.parametrize("shape", [pytest.param(shape, marks=[pytest.mark.slow] * (shape not in QUICK)) for shape in SHAPES])
def test_answers_of_every_family_are_a_fresh_session_s(shape: str, tmp_path: Path) -> None:
    folder = checkpoints.EVERY[shape](tmp_path / "checkpoint")
    sizes = {"image_sizes": tiny_sizes.sizes(folder)[:1]} if shape in tiny_sizes.TINY else {}
    export(ExportConfig(str(folder), (6,), tmp_path / "bundle", **sizes))
    raw: dict[str, Any] = {}
    questions = [(FIRST, SCENES[:1]), (SECOND, SCENES[:1]), (SECOND, SCENES[1:]), (SECOND, SCENES[1:])]
    with load(tmp_path / "bundle", cache_mb=0) as fresh:
        wanted = [ask(fresh, prompt, *images, **raw) for prompt, images in questions]
    with load(tmp_path / "bundle") as session:
        found = [ask(session, prompt, *images, **raw) for prompt, images in questions]
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    assert [one.timings.reused_images for one in found] == [0, 1, 0, 1]
    read, kept = found[1].timings.reused_positions, sum(crop.kept for crop in found[1].pruning)
    if shape in ("paligemma", "qwen3_5"):
        # All of a prompt sees all of it; or states are of all that was read.
        assert read == 0
    else:
        assert kept < read < found[1].prompt_tokens


def conversation(turns: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for turn in range(turns):
        content = [{"type": "text", "text": (FIRST, OTHER, SECOND)[turn % 3]}]
        messages.append({"role": "user", "content": [{"type": "image"}, *content] if turn == 0 else content})
    return messages


def chat(session: Session, turns: int) -> list[Answer]:
    """Say one message after another; each answer goes into the prompt of the next."""
    said: list[dict[str, Any]] = []
    answers = []
    for message in conversation(turns):
        said.append(message)
        answers.append(session.generate(said, SCENES[:1], max_new_tokens=24))
        said.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1].text}]})
    return answers


def test_a_chat_s_turn_reads_what_is_new(opened: tuple[str, Callable[..., Session]]) -> None:
    name, open_session = opened
    with open_session(cache_mb=0) as fresh:
        wanted = chat(fresh, 5)
    with open_session() as session:
        found = chat(session, 5)
    assert [one.token_ids for one in found] == [one.token_ids for one in wanted]
    if name in ("cpu", "portable", "openvino:f32"):
        fresh_rows = [one.prompt_tokens - one.timings.reused_positions for one in found[1:]]
        assert max(fresh_rows) < 40, "more than a message is read again"


def test_openvino_goes_back_without_reading_its_state(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that are not gone on from stay in the state, seen by nothing, until they are more than half of what is."""
    pytest.importorskip("openvino")
    from leanvlm.runtime.backends.openvino import OpenVinoCache

    read: list[int] = []
    saved = OpenVinoCache.saved

    def counted(self: OpenVinoCache, count: int) -> Any:
        read.append(count)
        return saved(self, count)

    monkeypatch.setattr(OpenVinoCache, "saved", counted)
    text = "Describe the image" + ", please" * 30
    options = {"provider": "openvino:f32"}
    with load(demo_bundle, **options) as session, load(demo_bundle, cache_mb=0, **options) as fresh:
        # The first answer makes the cache as large as it gets.
        for new, reads in ((60, 0), (8, 0), (8, 1), (8, 1)):
            asked = {"max_new_tokens": new, "ignore_end": True}
            found, wanted = (one.generate(text, SCENES[:1], **asked) for one in (session, fresh))
            assert found.token_ids == wanted.token_ids
            assert (found.timings.reused_positions > 100) == (new != 60), "nothing was gone back to"
            assert len(read) == reads, (new, read)


def test_a_state_that_goes_on_is_a_fresh_session_s(tmp_path: Path) -> None:
    """A decoder with states goes on where a conversation does, and nowhere else."""
    folder = checkpoints.EVERY["qwen3_5"](tmp_path / "checkpoint")
    export(ExportConfig(str(folder), (6,), tmp_path / "bundle", image_sizes=tiny_sizes.sizes(folder)[:1]))
    with load(tmp_path / "bundle", cache_mb=0) as fresh, load(tmp_path / "bundle") as session:
        (image,) = session.encode_images(SCENES[:1], 6)
        options = session.settings.options(max_new_tokens=NEW, ignore_end=True)
        text = f"{session.image_token} tell"
        first = session.respond(text, [image], options).answer
        # What it said, as ids would be read again, is the last conversation's end.
        more = text + session.tokenizer.decode(first.token_ids[:-1]) + " and so on"
        second = session.respond(more, [image], options).answer
        assert second.token_ids == fresh.respond(more, [image], options).answer.token_ids
        assert session.respond(text, [image], options).answer.token_ids == first.token_ids


def test_a_first_cache_has_room_for_some_turns(tiny_bundle: Path) -> None:
    with load(tiny_bundle) as session, load(tiny_bundle, cache_mb=0) as fresh:
        for opened, spare in ((session, sequences.SPARE), (fresh, 0)):
            answer = ask(opened, "Hm", SCENES[0])
            kept, needed = opened.decoder()._kept, answer.prompt_tokens + NEW
            assert kept is not None
            assert needed + spare <= kept.capacity < needed + spare + CACHE_STEP


def test_a_conversation_that_outgrows_its_cache_takes_its_rows_along(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "SPARE", 0)
    with load(tiny_bundle, cache_mb=0) as fresh, load(tiny_bundle) as session:
        said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a" * 20}]}]
        longer = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a" * 20 + "b" * 150}]}]
        ask(session, said, SCENES[0])
        decoder = session.decoder()
        assert decoder._kept is not None
        before = decoder._kept.capacity
        found = ask(session, longer, SCENES[0])
        assert decoder._kept.capacity > before
        assert found.timings.reused_positions > 20
        assert found.token_ids == ask(fresh, longer, SCENES[0]).token_ids


def test_an_answer_that_was_given_up_and_one_beside_it(tiny_bundle: Path) -> None:
    with load(tiny_bundle, cache_mb=0) as fresh, load(tiny_bundle) as session:
        wanted = [ask(fresh, prompt, SCENES[0]).token_ids for prompt in (FIRST, SECOND)]
        stream = session.stream(FIRST, SCENES[:1], max_new_tokens=NEW, ignore_end=True)
        next(stream)
        beside = ask(session, SECOND, SCENES[0])
        assert beside.token_ids == wanted[1]
        assert beside.timings.reused_positions == 0
        stream.close()
        again = ask(session, SECOND, SCENES[0])
        assert (again.token_ids, again.timings.reused_positions > 0) == (wanted[1], True)
        assert ask(session, FIRST, SCENES[0]).token_ids == wanted[0]


def test_whoever_has_the_cache_itself_may_fill_it(tiny_bundle: Path) -> None:
    with load(tiny_bundle, cache_mb=0) as fresh, load(tiny_bundle) as session:
        wanted = ask(fresh, FIRST, SCENES[0]).token_ids
        ask(session, FIRST, SCENES[0])
        sequence = session.decoder().sequence(64)
        sequence.cache.load(session.prompt([1, 2, 4], []))
        sequence.cache.prefill()
        sequence.close()
        again = ask(session, FIRST, SCENES[0])
        assert (again.token_ids, again.timings.reused_positions) == (wanted, 0)


def test_a_picture_is_known_by_its_content(tiny_bundle: Path, tmp_path: Path) -> None:
    """As a file, its bytes, a Pillow picture or levels; and a file that changes is another picture."""
    path = tmp_path / "picture.png"
    SCENES[0].save(path)
    data = path.read_bytes()
    assert content_key(path) == content_key(str(path)) == content_key(data) == content_key(memoryview(data))
    assert content_key(SCENES[0]) == content_key(np.asarray(SCENES[0])) == content_key(SCENES[0].convert("RGBA"))
    assert content_key(SCENES[0]) != content_key(SCENES[0].rotate(180))
    assert content_key(np.zeros((4, 6, 3), np.uint8)) != content_key(np.zeros((6, 4, 3), np.uint8))
    assert content_key(io.BytesIO(data)) is content_key(tmp_path / "absent.png") is content_key(tmp_path) is None
    assert content_key(np.zeros((4, 6), np.uint8)) is None
    with load(tiny_bundle) as session:
        first = ask(session, FIRST, path)
        SCENES[1].save(path)
        other = ask(session, FIRST, path)
        assert other.timings.reused_images == 0
        assert other.token_ids != first.token_ids
        assert ask(session, FIRST, io.BytesIO(data)).token_ids == first.token_ids


def encoded(kept: int) -> ImageFeatures:
    shape = CropShape((2, kept), (28, 14 * kept))
    pruning = Pruning(kept, None, kept, True, np.arange(kept), np.zeros(2 * kept, np.float32), shape)
    return ImageFeatures((CropFeatures(np.zeros((kept, 16), np.float32), pruning),))


def test_pictures_are_kept_within_their_bound() -> None:
    one = encoded(8)
    size = 8 * 16 * 4 + 8 * 8 + 16 * 4
    cache = ImageCache(3 * size)
    for key in "abc":
        cache.put(key, encoded(8))
    assert (len(cache), cache.bytes) == (3, 3 * size)
    assert cache.get("a") is not None
    cache.put("d", one)
    assert cache.get("b") is None
    assert cache.get("d") is one
    assert cache.get("a") is not None
    cache.put("whole", encoded(100))
    assert (len(cache), cache.bytes) == (3, 3 * size)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)
    ImageCache(0).put("a", one)


@pytest.mark.parametrize("size", [-1, float("nan"), 2.0**30])
def test_a_bound_that_is_not_possible(tiny_bundle: Path, size: float) -> None:
    with pytest.raises(InputError, match=r"cache_mb .* is not possible; give 0 to"):
        load(tiny_bundle, cache_mb=size)


def planned(ids: list[int], last_seen: list[int] | None = None, start: int = 0) -> Prompt:
    count = len(ids)
    seen = np.arange(count) if last_seen is None else np.array(last_seen)
    positions, rows = start + np.arange(count)[None], tuple(ids)
    return Prompt(np.zeros((count, 4), np.float32), (), np.arange(count), positions, count, seen, rows, rows)


def held(prompt: Prompt) -> Held:
    made = Held()
    made.add(prompt.keys(), prompt.positions, prompt.last_seen.tolist())
    return made


def test_what_a_prompt_shares_with_a_cache() -> None:
    assert held(planned([1, 2, 3])).shared(planned([1, 2, 3, 4])) == 3
    assert held(planned([1, 2, 3])).shared(planned([1, 2, 3])) == 2, "the last is read again, for its scores"
    assert held(planned([1, 2, 3])).shared(planned([1, 9, 3])) == 1
    assert held(planned([1, 2, 3])).shared(planned([9, 2, 3])) == 0
    assert held(planned([1, 2, 3])).shared(planned([1, 2, 3, 4], start=1)) == 0, "at other positions"
    assert Held().shared(planned([1])) == 0
    # A block whose rows see each other counts as a whole or not at all.
    block = [0, 3, 3, 3, 4, 5]
    assert held(planned([1, 2, 3, 4, 5, 6], block)).shared(planned([1, 2, 3, 4, 5, 7], block)) == 5
    assert held(planned([1, 2, 3, 4, 5, 6], block)).shared(planned([1, 2, 3, 9, 5, 6], block)) == 1
    assert held(planned([1, 2, 3], [2, 2, 2])).shared(planned([1, 2, 3, 4], [3, 3, 3, 3])) == 0


def test_the_rest_of_a_prompt_is_what_it_would_be(tiny_bundle: Path) -> None:
    with load(tiny_bundle) as session:
        images = session.encode_images(SCENES, 16)
        ids = session.prompt_ids(f"ab{session.image_token}cd{session.image_token}ef", 2)
        prompt = session.prompt(ids, images)
        whole = prompt.embeddings()
        for start in range(len(prompt)):
            rest = prompt.tail(start)
            np.testing.assert_array_equal(rest.embeddings(), whole[start:])
            assert rest.keys() == prompt.keys()[start:]
            assert (rest.positions == prompt.positions[:, start:]).all()
            assert (rest.last_seen == prompt.last_seen[start:]).all()
        assert len(prompt.tail(len(prompt) - 1).crops) == 0


def test_a_decoder_goes_on_as_it_says() -> None:
    class Stub:
        def __init__(self, capacity: int) -> None:
            self.capacity, self.length = capacity, 0

        def load(self, prompt: Prompt, past: int = 0) -> None:
            self.length = past + len(prompt)

        def prefill(self) -> Any:
            return None

    made: Any = lambda capacity, kept: Stub(capacity)  # noqa: E731
    cases = (("nothing", 0.0, [0, 0, 0]), ("any", 0.0, [0, 3, 2]), ("any", 0.75, [0, 3, 0]), ("end", 0.0, [0, 3, 0]))
    for reuse, least, wanted in cases:
        decoder: Any = Decoder(made, reuse, least)
        past = []
        for ids in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 9]):
            sequence = decoder.sequence(8, planned(ids))
            past.append(sequence.past)
            sequence.load(planned(ids))
            sequence.prefill()
            sequence.close()
        assert past == wanted
