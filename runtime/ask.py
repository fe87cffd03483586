"""`leanvlm run`: one question, or a chat at the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvlm.runtime.answer import Answer, Pruning
from leanvlm.runtime.console import is_utf8, stderr_console
from leanvlm.runtime.errors import InputError, LeanVLMError
from leanvlm.runtime.generation import GenerateOptions
from leanvlm.runtime.overlay import check_picture_path, save_overlay
from leanvlm.runtime.preprocess import load_image
from leanvlm.runtime.session import Session, load, user_message
from leanvlm.runtime.splice import ImageFeatures
from leanvlm.runtime.text import Message

HELP = "/image FILE adds an image to your next message, /reset starts over, /exit ends (so does Ctrl-D)."


@dataclass(frozen=True)
class Request:
    """What `leanvlm run` was asked; `options` are those of `Session.stream`."""

    bundle: Path
    images: tuple[Path, ...]
    prompt: str | None
    raw: bool
    budget: int | None
    device: str | None
    provider: str | None
    threads: int | None
    overlay: Path | None
    as_json: bool
    options: Mapping[str, Any]


def ask(request: Request) -> None:
    """Print the answer as it comes, or one JSON object; a summary goes to standard error."""
    assert request.prompt is not None
    if request.overlay is not None:
        check_picture_path(request.overlay, request.images)
        if len(request.images) != 1:
            raise InputError("--overlay draws one image; give exactly one --image")
    with load(request.bundle, device=request.device, provider=request.provider, threads=request.threads) as session:
        asked = {"budget": request.budget, "raw": request.raw, **request.options}
        generation = session.stream(request.prompt, request.images, **asked)
        if not request.as_json:
            for piece in generation:
                print(piece, end="", flush=True)
            print()
        answer = generation.answer
        if request.as_json:
            print(json.dumps(answer_json(session, answer), ensure_ascii=not is_utf8(sys.stdout)))
        if request.overlay is not None:
            save_overlay(request.overlay, load_image(request.images[0]), answer.pruning[0], session.manifest)
        _summarise(answer)


def answer_json(session: Session, answer: Answer) -> dict[str, Any]:
    """Return an answer as the JSON object of `run --json`.

    With one image `pruning` holds its values; with several it holds the sums of kept and total, and `images` one entry each.
    """
    return {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "finish_reason": answer.finish_reason,
        "timings_ms": answer.timings.to_dict(),
        "pruning": _pruning_json(session.manifest.pruner.name, answer.pruning, session.manifest.tokens_per_crop),
    }


def _pruning_json(pruner: str, images: Sequence[Pruning], total: int) -> dict[str, Any] | None:
    if not images:
        return None
    name = "none" if images[0].kept == total else pruner
    if len(images) == 1:
        return {"pruner": name, **images[0].to_dict()}
    counts = {"kept": sum(i.kept for i in images), "total": sum(i.total for i in images)}
    return {"pruner": name, **counts, "images": [i.to_dict() for i in images]}


def _summarise(answer: Answer) -> None:
    kept = ", ".join(f"{image.kept} of {image.total} image tokens" for image in answer.pruning) or "no image"
    first = answer.timings.time_to_first_token
    stderr_console().print(f"[dim]{kept}; {len(answer.token_ids)} tokens, the first after {first:.0f} ms (with loading)[/dim]")


class Chat:
    """A conversation that remembers its messages and its images' embeddings, so each image is encoded once."""

    def __init__(self, session: Session, budget: int, options: GenerateOptions) -> None:
        self._session = session
        self._budget = budget
        self._options = options
        self._messages: list[Message] = []
        self._features: list[ImageFeatures] = []

    def say(self, text: str, images: Sequence[Path]) -> Answer:
        """Print the answer to a message as it comes; a failed turn leaves the conversation as it was."""
        messages = [*self._messages, user_message(text, len(images))]
        ids = self._session.prompt_ids(messages, len(self._features) + len(images))
        self._session.check_context(ids, self._budget, self._options.max_new_tokens)
        features = self._features + self._session.encode_images(images, self._budget)
        generation = self._session.respond(messages, features, self._options)
        for piece in generation:
            print(piece, end="", flush=True)
        print()
        reply: Message = {"role": "assistant", "content": [{"type": "text", "text": generation.answer.text}]}
        self._messages, self._features = [*messages, reply], features
        return generation.answer

    def reset(self) -> None:
        """Forget everything said."""
        self._messages, self._features = [], []


def chat(request: Request) -> None:
    """Read messages from standard input until its end; images given with --image go with the first one."""
    console = stderr_console()
    with load(request.bundle, device=request.device, provider=request.provider, threads=request.threads) as session:
        options = session.settings.options(**request.options)
        conversation = Chat(session, session.manifest.budget(request.budget), options)
        waiting = list(request.images)
        for path in waiting:
            load_image(path)
        console.print(HELP)
        while (line := _read_line()) is not None:
            try:
                waiting = _turn(conversation, line, waiting)
            except LeanVLMError as error:
                console.print(f"leanvlm: {error}", markup=False)
            except EOFError:
                return


def _turn(conversation: Chat, line: str, waiting: list[Path]) -> list[Path]:
    """Carry out one line and return the images that wait for the next message."""
    command, _, rest = line.partition(" ")
    if command == "/exit":
        raise EOFError
    if command == "/reset":
        conversation.reset()
        return []
    if command == "/image":
        path = Path(rest.strip())
        load_image(path)
        return [*waiting, path]
    if line.startswith("/"):
        raise InputError(f"{command} is not known; {HELP}")
    if line:
        conversation.say(line, waiting)
        return []
    return waiting


def _read_line() -> str | None:
    """Return one line of input, or None at its end."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
