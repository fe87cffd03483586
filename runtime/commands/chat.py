"""`leanvlm run` without a prompt: a chat, at the terminal or with a message on each line of standard input."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from leanvlm.runtime.answer import Answer
from leanvlm.runtime.commands.ask import Request, warn_if_cut
from leanvlm.runtime.console import stderr_console
from leanvlm.runtime.crops import crop
from leanvlm.runtime.errors import ContextOverflowError, InputError, LeanVLMError
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.layout import ImageFeatures
from leanvlm.runtime.preprocess import ImageSource
from leanvlm.runtime.session import Session, load, user_message
from leanvlm.runtime.signals import heeded
from leanvlm.runtime.text import Message

HINT = "/image FILE adds an image to your next message; /help says more."
HELP = """\
/image FILE ...  adds images to your next message; quote a name with spaces
/reset           forgets the conversation and the images that wait
/help            prints this
/exit            ends, as do Ctrl-D and, at the prompt, Ctrl-C twice
Ctrl-C           ends an answer: it and its message are forgotten, and the
                 images of the message wait again"""
PROMPT = "> "


class Chat:
    """A conversation that remembers its messages and its images' embeddings, so each image is encoded once.

    Where a model cuts the images of a prompt otherwise when there are several, the first one is encoded again with the second.

    A turn that fails or is interrupted leaves everything as it was, except that an image that cannot be used waits no more.

    Attributes:
        waiting: Images that go with the next message.
    """

    def __init__(self, session: Session, budget: int, options: GenerateOptions) -> None:
        self.waiting: list[Path] = []
        self._session = session
        self._budget = budget
        self._options = options
        self._messages: list[Message] = []
        self._features: list[ImageFeatures] = []
        self._pictures: list[ImageSource] = []

    def add(self, images: Sequence[Path]) -> None:
        """Let images wait for the next message, all or none of them."""
        among = len(self._features) + len(self.waiting) + len(images)
        for path in images:
            self._check(path, among)
        self.waiting += images

    def say(self, text: str) -> Answer:
        """Print the answer to a message, with the images that wait, as it comes."""
        messages = [*self._messages, user_message(text, len(self.waiting))]
        features, pictures = self._encode(messages)
        with closing(self._session.respond(messages, features, self._options)) as generation:
            try:
                for piece in generation:
                    print(piece, end="", flush=True)
            finally:
                print(flush=True)
            answer = generation.answer
        reply: Message = {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}
        self._messages, self._features, self._pictures, self.waiting = [*messages, reply], features, pictures, []
        return answer

    def reset(self) -> None:
        """Forget everything said, and the images that wait."""
        self._messages, self._features, self._pictures, self.waiting = [], [], [], []

    def _encode(self, messages: Sequence[Message]) -> tuple[list[ImageFeatures], list[ImageSource]]:
        """Encode what is new among a conversation's images, and return all of them: embeddings, and what must be kept of them.

        Those that changed or vanished meanwhile are named, and the others stay.
        """
        session, among = self._session, len(self._features) + len(self.waiting)
        try:
            alike = session.manifest.crops.several == "alike"
            known = self._features if alike or among < 2 or len(self._features) > 1 else []
            new = [*self._pictures, *self.waiting] if len(known) < len(self._features) else self.waiting
            opened, arrangements = session.arrange(new, among)
            arrangements = [*(image.arrangement for image in known), *arrangements]
            ids = session.prompt_ids(messages, arrangements)
            session.check_context(ids, arrangements, self._budget, self._options.max_new_tokens)
            features = [*known, *session.encode_images(opened, self._budget, among=among)]
            return features, [] if alike or among > 1 else [*self._pictures, *opened]
        except ContextOverflowError:
            raise
        except InputError:
            usable, reasons = [], []
            for path in self.waiting:
                try:
                    self._check(path, among)
                    usable.append(path)
                except InputError as error:
                    reasons.append(str(error))
            if not reasons:
                raise
            self.waiting = usable
            raise InputError(f"{'; '.join(reasons)}: left out now; send the message again, or /image another first") from None

    def _check(self, path: Path, among: int) -> None:
        """Raise InputError if an image cannot be used, or the conversation's first image not beside it."""
        manifest = self._session.manifest
        crop([*self._pictures, path], manifest.image, manifest.crops, among)


def chat(request: Request) -> None:
    """Read messages from standard input until its end; images given with --image go with the first one."""
    with load(request.bundle, device=request.device, provider=request.provider, threads=request.threads) as session:
        options = session.settings.options(**request.options)
        conversation = Chat(session, session.manifest.budget(request.budget), options)
        conversation.add(request.images)
        _say(HINT)
        if sys.stdin.isatty():
            _at_terminal(conversation)
        else:
            _from_lines(conversation)


def _from_lines(conversation: Chat) -> None:
    """Take messages that are not typed: a file's lines, another program's output."""
    empty = True
    for line in sys.stdin:
        empty = False
        if not _turn(conversation, line.strip()):
            return
    if empty:
        raise InputError("standard input has no message; ask with --prompt, or write one message a line")


def _at_terminal(conversation: Chat) -> None:
    """Take messages that are typed. Ctrl-C ends an answer or clears the line; twice in a row at the prompt it ends the chat."""
    cleared = False
    while True:
        try:
            line = _read_line()
        except EOFError:
            return _say("")
        except KeyboardInterrupt:
            if cleared:
                return _say("")
            heeded()
            cleared = True
            _say("\nCtrl-C again or Ctrl-D ends")
            continue
        cleared = False
        try:
            if not _turn(conversation, line.strip()):
                return None
        except KeyboardInterrupt:
            heeded()
            _say("interrupted; this message is forgotten")


def _read_line() -> str:
    """Return a line from the terminal; editing and history need that standard output is one too.

    Raises:
        EOFError: Ctrl-D.
    """
    if sys.stdout.isatty():
        with suppress(ImportError):  # Some builds of Python lack it.
            import readline  # noqa: F401 (`input` uses it)
        return input(PROMPT)
    print(PROMPT, end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line


def _turn(conversation: Chat, line: str) -> bool:
    """Carry out one line, a mistake included; False is the wish to end."""
    if line == "/exit":
        return False
    try:
        if line.startswith("/"):
            _say(_command(conversation, line))
        elif line:
            warn_if_cut(conversation.say(line))
    except ContextOverflowError as error:
        _say(f"leanvlm: {error}; /reset starts over")
    except LeanVLMError as error:
        _say(f"leanvlm: {error}")
    return True


def _command(conversation: Chat, line: str) -> str:
    """Carry out a command and return what to say about it."""
    command, _, rest = line.partition(" ")
    if command == "/help":
        return HELP
    if command == "/reset":
        conversation.reset()
        return "the conversation starts over; no image waits"
    if command == "/image":
        conversation.add(_paths(rest))
        names = ", ".join(path.name for path in conversation.waiting)
        return f"{names} {'waits' if len(conversation.waiting) == 1 else 'wait'} for your next message"
    raise InputError(f"{command} is not known; {HINT}")


def _paths(text: str) -> list[Path]:
    """Read file names as a shell does: quotes, backslashes and ~."""
    try:
        names = shlex.split(text)
    except ValueError:
        raise InputError(f"{text.strip()} has a quote without its other half; write \\' for an apostrophe in a name") from None
    if not names:
        raise InputError("/image needs a file, such as /image photo.jpg")
    return [Path(os.path.expanduser(name)) for name in names]


def _say(text: str) -> None:
    """Write to standard error, beside the answers."""
    stderr_console().print(text, markup=False)
