"""The chat: what is typed, what waits, what is forgotten, and what Ctrl-C ends."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from leanvlm.runtime.answer import Generation
from leanvlm.runtime.commands.ask import Request
from leanvlm.runtime.commands.chat import Chat, chat
from leanvlm.runtime.console import one_line_errors
from leanvlm.runtime.errors import BundleError, InputError
from leanvlm.runtime.session import Session, load, user_message
from leanvlm.runtime.text import Message

QUESTION = "What is below the green ring?"
ANSWER = "a yellow hexagon"
CTRL_C = "\x03"
PATIENCE = 60.0

Typed = Callable[..., tuple[str, str]]


class Keyboard(io.StringIO):
    """Standard input at a terminal; a line that is CTRL_C interrupts."""

    def isatty(self) -> bool:
        """Pretend."""
        return True

    def readline(self, *size: Any) -> str:
        """Return a line, or interrupt."""
        line = super().readline(*size)
        if line.strip("\n") == CTRL_C:
            raise KeyboardInterrupt
        return line


@pytest.fixture
def typed(demo_bundle: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A function that types lines into a chat and returns what came on standard output and standard error."""

    def run(*lines: object, images: tuple[Path, ...] = (), **options: Any) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", Keyboard("".join(f"{line}\n" for line in lines)))
        capfd.readouterr()
        with one_line_errors():
            chat(Request(demo_bundle, images, None, False, None, None, None, 1, None, False, {"max_new_tokens": 32, **options}))
        return tuple(capfd.readouterr())  # type: ignore[return-value]

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Message], int]]:
    """The conversations that a chat hands to the model, each with its number of images; "interrupt" ends an answer half-way."""
    noted: list[tuple[list[Message], int]] = []
    respond = Session.respond

    def pieces() -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    def noted_respond(session: Session, messages: Any, features: Any, *rest: Any) -> Generation:
        noted.append((list(messages), len(features)))
        if "interrupt" in str(messages[-1]):
            return Generation(pieces())  # type: ignore[arg-type]
        return respond(session, messages, features, *rest)

    monkeypatch.setattr(Session, "respond", noted_respond)
    return noted


@pytest.fixture
def photo(sample_image: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sample_image, tmp_path / "my photo's.png"))


def test_an_interrupted_answer_is_forgotten_and_its_image_waits_again(
    typed: Typed, asked: list[tuple[list[Message], int]], photo: Path
) -> None:
    out, err = typed("interrupt me", QUESTION, images=(photo,))
    assert out == f"half\n{ANSWER}\n"
    assert "interrupted; this message is forgotten" in err
    assert [(len(messages), images) for messages, images in asked] == [(1, 1), (1, 1)]


def test_ctrl_c_at_the_prompt_ends_only_when_it_comes_twice(typed: Typed, asked: list[tuple[list[Message], int]]) -> None:
    _, err = typed(CTRL_C, "One?", CTRL_C, "Two?", CTRL_C, CTRL_C, "Three?")
    assert [messages[-1]["content"][0]["text"] for messages, _ in asked] == ["One?", "Two?"]
    assert err.count("Ctrl-C again or Ctrl-D ends") == 3


@pytest.mark.parametrize("written", ['"{0}"', "~/{1}", '"~/{0}"'], ids=["quotes", "home", "both"])
def test_an_image_is_named_as_in_a_shell(
    written: str, typed: Typed, asked: list[tuple[list[Message], int]], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo.parent)
    monkeypatch.setenv("HOME", str(photo.parent))
    name = written.format(photo.name, photo.name.replace(" ", "\\ ").replace("'", "\\'"))
    out, err = typed(f"/image {name}", QUESTION)
    assert f"{photo.name} waits for your next message\n" in err
    assert (out, asked[0][1]) == (f"{ANSWER}\n", 1)


def test_several_images_wait_or_none_of_them(
    typed: Typed, asked: list[tuple[list[Message], int]], sample_image: Path, tmp_path: Path
) -> None:
    name = sample_image.name
    lines = (f"/image {sample_image} {tmp_path}/no.png", "/image", "/image it's.png", f"/image {sample_image} {sample_image}")
    _, err = typed(*lines, "How many?", "/reset", "Hm?")
    assert "no.png' does not exist" in err
    assert "/image needs a file, such as /image photo.jpg" in err
    assert "it's.png has a quote without its other half" in err
    assert f"{name}, {name} wait for your next message" in err
    assert "the conversation starts over" in err
    assert [(len(messages), images) for messages, images in asked] == [(1, 2), (1, 0)]


def test_an_image_that_vanished_is_named_and_the_others_stay(
    typed: Typed, asked: list[tuple[list[Message], int]], sample_image: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Session.encode_images

    def vanished(session: Session, *arguments: Any, **options: Any) -> Any:
        photo.unlink(missing_ok=True)
        return encode(session, *arguments, **options)

    monkeypatch.setattr(Session, "encode_images", vanished)
    out, err = typed(QUESTION, QUESTION, images=(photo, sample_image))
    assert out == f"{ANSWER}\n"
    assert sum("does not exist: left out now" in line for line in err.splitlines()) == 1
    assert [images for _, images in asked] == [1]


def test_a_full_context_hints_at_reset(typed: Typed, asked: list[tuple[list[Message], int]]) -> None:
    _, err = typed("word " * 3000)
    assert "the model's context holds" in err
    assert "; /reset starts over" in err
    assert asked == []


def test_help_says_what_the_hint_leaves_out(typed: Typed) -> None:
    _, err = typed("/help")
    assert all(word in err for word in ("/image FILE", "/reset", "/help", "/exit", "Ctrl-C", "Ctrl-D"))
    assert max(map(len, err.splitlines())) <= 80


def test_a_cut_answer_says_so(typed: Typed) -> None:
    assert "cut at 1 token: --max-new-tokens N goes on further\n" in typed(QUESTION, max_new_tokens=1)[1]
    assert "cut at" not in typed(QUESTION)[1]


class Terminal:
    """A chat in a process of its own, at a terminal."""

    def __init__(self, *command: object, home: Path) -> None:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "HOME": str(home), "TERM": "xterm", "INPUTRC": os.devnull}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "leanvlm", *map(str, command)],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self._unread = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def expect(self, text: str) -> None:
        """Read on until a text is there, and past it."""
        end = time.monotonic() + PATIENCE
        while text not in self._unread:
            assert select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0], self._unread
            self._unread += os.read(self._master, 4096).decode()
        self._unread = self._unread.partition(text)[2]

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._master, text.encode())

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until a text is there: readline notices a signal only while it waits, never one that came before."""
        for _ in range(5):
            self.process.send_signal(signal.SIGINT)
            end = time.monotonic() + PATIENCE / 5
            while text not in self._unread and select.select([self._master], [], [], max(0.0, end - time.monotonic()))[0]:
                self._unread += os.read(self._master, 4096).decode()
            if text in self._unread:
                break
        self.expect(text)


def test_a_terminal_has_editing_history_and_interrupts(demo_bundle: Path, photo: Path) -> None:
    pytest.importorskip("readline")
    with Terminal("run", demo_bundle, home=photo.parent) as terminal:
        terminal.expect("> ")
        terminal.type(f'/image "~/{photo.name}"\n')
        terminal.expect(f"{photo.name} waits for your next message")
        terminal.expect("> ")
        terminal.type("at is below the green ring?\x01Wh\n")  # Ctrl-A goes to the beginning of the line.
        terminal.expect(ANSWER)
        terminal.expect("> ")
        terminal.type("\x1b[A")
        terminal.expect(QUESTION)
        terminal.interrupt("Ctrl-C again or Ctrl-D ends")
        terminal.expect("> ")
        terminal.type("/reset\n")
        terminal.expect("the conversation starts over")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE) == 0


# ------------------------------------------------------------------------------------------- tiles


@pytest.fixture(params=["llava_next", "llava_onevision"])
def tiled(request: pytest.FixtureRequest, tile_bundle: Callable[[str], Path]) -> Iterator[Session]:
    with load(tile_bundle(request.param), threads=1) as session:
        yield session


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """A wide picture and a tall one."""
    draw = np.random.default_rng(5)
    for name, size in (("wide", (70, 140)), ("tall", (200, 90))):
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return [tmp_path / "wide.png", tmp_path / "tall.png"]


def conversation(session: Session) -> Chat:
    return Chat(session, session.manifest.default_budget, session.settings.options(max_new_tokens=12, ignore_end=True))


def test_images_of_several_prompts_may_be_encoded_together(tiled: Session, pictures: list[Path]) -> None:
    """As an evaluation does, each is cut as if it were alone."""
    together = tiled.encode_images(pictures, 6, among=1)
    for picture, image in zip(pictures, together, strict=True):
        (alone,) = tiled.encode_images([picture], 6)
        assert image.arrangement == alone.arrangement
        for found, wanted in zip(image.crops, alone.crops, strict=True):
            np.testing.assert_allclose(found.embeddings, wanted.embeddings, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("layout", {"before": "see <image>"}, "the image token '<image>' is empty, or in a text of the layout"),
        ("layout", {"before": "<ima", "before_thumbnail": "ge>"}, "takes 3 image tokens '<image>' from a prompt with 2"),
        ("crops", {"fit": "stretch"}, "takes valid, which crops cut so do not have"),
    ],
)
def test_a_bundle_whose_images_stand_elsewhere_is_refused(
    tile_bundle: Callable[[str], Path], tmp_path: Path, part: str, changes: dict[str, str], words: str
) -> None:
    """An image token in a text would stand for an image that is not there, also where two texts join to one."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tile_bundle("llava_next"), bundle)
    manifest = json.loads((bundle / "leanvlm.json").read_text())
    manifest[part] |= changes
    (bundle / "leanvlm.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=words), load(bundle) as session:
        session.generate("What?", Image.new("RGB", (90, 60)), max_new_tokens=1)


def test_a_second_image_changes_how_the_first_is_cut(
    tiled: Session, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each turn is what a session says that is given all images at once, and an image is encoded again only where it must."""
    encoded: list[int] = []
    encode = tiled.encode_images

    def noted(images: Any, *arguments: Any, **options: Any) -> Any:
        encoded.append(len(images))
        return encode(images, *arguments, **options)

    monkeypatch.setattr(tiled, "encode_images", noted)
    chat, messages, answers = conversation(tiled), [], []
    for turn, new in enumerate((pictures[:1], pictures[1:], [])):
        chat.add(new)
        answers.append(chat.say(f"What is {turn}?"))
        messages.append(user_message(f"What is {turn}?", len(new)))
        count = len(encoded)
        fresh = tiled.generate(messages, pictures[: turn + 1], max_new_tokens=12, ignore_end=True)
        del encoded[count:]
        assert answers[-1].token_ids == fresh.token_ids
        messages.append({"role": "assistant", "content": [{"type": "text", "text": fresh.text}]})
    square = tiled.manifest.crops.several == "square"
    assert encoded == ([1, 2, 0] if square else [1, 1, 0])
    crops = [[image.crops for image in answer.images] for answer in answers]
    assert crops == [[3], *([[1, 1]] * 2 if square else [[3, 4]] * 2)]


def test_an_image_that_goes_with_no_other_waits_no_more(
    tile_bundle: Callable[[str], Path], pictures: list[Path], tmp_path: Path
) -> None:
    """A line of pixels can be cut into tiles, and cannot be padded to a square."""
    narrow, wide = tmp_path / "narrow.png", pictures[0]
    Image.new("RGB", (8200, 4)).save(narrow)
    with load(tile_bundle("llava_onevision"), threads=1) as session:
        chat = conversation(session)
        for first, second in ((narrow, wide), (wide, narrow)):
            chat.add([first])
            chat.say("What?")
            with pytest.raises(InputError, match="too narrow"):
                chat.add([second])
            assert chat.waiting == []
            chat.reset()
        chat.add([narrow])
        chat.add([wide])
        with pytest.raises(InputError, match=r"too narrow.*: left out now"):
            chat.say("What?")
        assert chat.waiting == [wide]
        assert len(chat.say("What?").images) == 1
