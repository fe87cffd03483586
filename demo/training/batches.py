"""Training batches: scenes, their questions as tokens, and what the auxiliary heads learn. numpy only.

A batch depends on the seed and its step alone, however many processes draw it, so a run can be repeated and resumed.
The questions of an image stand side by side behind it: eight slots of 18 tokens, then the caption's slot of 64. In a slot
are a prompt's end, the answer and `</s>`; the target of a position is the token that follows it, where that is of the answer.
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from leanvlm.demo import MODEL_DIR
from leanvlm.demo.layout import COLORS, SHAPES, Scene
from leanvlm.demo.mixture import Mixture, draw_scenes
from leanvlm.demo.packing import Packed, pack
from leanvlm.demo.scenes import FAMILIES, held_out_questions

__all__ = [
    "CAPTION_TOKENS",
    "CONTENTS",
    "IGNORED",
    "NO_DIGIT",
    "QUESTIONS",
    "QUESTION_TOKENS",
    "Batch",
    "Script",
    "draw_batch",
    "drawn",
    "make_batch",
]

QUESTIONS = 8
QUESTION_TOKENS = 18
CAPTION_TOKENS = 64
_CAPTION_AT = QUESTIONS * QUESTION_TOKENS
_TOKENS = _CAPTION_AT + CAPTION_TOKENS
IGNORED = -1
# One for each colour and shape, and one for the sign.
CONTENTS = len(COLORS) * len(SHAPES) + 1
_SIGN_DIGITS = 4
NO_DIGIT = 10
# Batches that a process may be ahead.
_AHEAD = 3
_TOKENIZER = MODEL_DIR / "tokenizer.json"


@dataclass(frozen=True)
class Batch:
    """B scenes and what is asked about them.

    Attributes:
        scenes: What to draw.
        ids: (B, 208) tokens of all slots, 0 where nothing stands.
        targets: (B, 208) tokens that should follow, `IGNORED` elsewhere.
        families: (B, 9) which of `FAMILIES` each slot's question is of, -1 for an empty slot.
        contents: (B, 65) 1 for each colour and shape that is there, and for a sign.
        digits: (B, 4) the sign's digits from the left, 10 where there is none.
    """

    scenes: Packed
    ids: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    families: npt.NDArray[np.int64]
    contents: npt.NDArray[np.float32]
    digits: npt.NDArray[np.int64]


class Script:
    """Turns questions and answers into tokens.

    Attributes:
        head: Tokens of the prompt before the image.
    """

    def __init__(self, tokenizer: Path = _TOKENIZER) -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._end: int = self._tokenizer.encode("</s>", add_special_tokens=False).ids[0]
        self.head: list[int] = self._tokenizer.encode("USER: ").ids
        # Short questions and answers are few.
        self._short = functools.lru_cache(maxsize=None)(self._tokens)

    def prompt(self, question: str) -> Sequence[int]:
        """Tokens of the prompt behind the image."""
        return self._short(f"\n{question} ASSISTANT:")

    def answer(self, text: str, short: bool = True) -> list[int]:
        """Tokens of an answer, its end included."""
        return [*(self._short if short else self._tokens)(f" {text}"), self._end]

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


def make_batch(scenes: Sequence[Scene], script: Script) -> Batch:
    """Ask the questions of some scenes; those with photographed ground come first.

    Raises:
        ValueError: A question and its answer are longer than their slot.
    """
    count = len(scenes)
    batch = Batch(
        scenes=pack(scenes),
        ids=np.zeros((count, _TOKENS), np.int64),
        targets=np.full((count, _TOKENS), IGNORED, np.int64),
        families=np.full((count, QUESTIONS + 1), -1, np.int64),
        contents=np.zeros((count, CONTENTS), np.float32),
        digits=np.full((count, _SIGN_DIGITS), NO_DIGIT, np.int64),
    )
    for row, scene in enumerate(scenes):
        _ask(batch, row, scene, script)
        for item in scene.objects:
            batch.contents[row, COLORS.index(item.color) * len(SHAPES) + SHAPES.index(item.shape)] = 1
        if scene.sign is not None:
            batch.contents[row, -1] = 1
            batch.digits[row, : len(scene.sign.text)] = [int(digit) for digit in scene.sign.text]
    return batch


def _ask(batch: Batch, row: int, scene: Scene, script: Script) -> None:
    *short, caption = held_out_questions(scene, QUESTIONS)
    for slot, question in [*enumerate(short), (QUESTIONS, caption)]:
        start, room = slot * QUESTION_TOKENS, QUESTION_TOKENS if slot < QUESTIONS else CAPTION_TOKENS
        prompt = script.prompt(question.text)
        answer = script.answer(question.answer, short=slot < QUESTIONS)
        length = len(prompt) + len(answer)
        if length > room:
            raise ValueError(f"{question.text!r} and its answer have {length} tokens; there is room for {room}")
        batch.ids[row, start : start + length] = [*prompt, *answer]
        batch.targets[row, start + len(prompt) - 1 : start + length - 1] = answer
        batch.families[row, slot] = FAMILIES.index(question.kind)


def draw_batch(mixture: Mixture, seed: int, step: int, script: Script) -> Batch:
    """Draw the batch of one step of training."""
    return make_batch(draw_scenes(mixture, seed, step), script)


def drawn(mixture: Mixture, seed: int, steps: range, workers: int) -> Generator[Batch, None, None]:
    """Yield the batches of some steps in order.

    Args:
        mixture: What to draw.
        seed: Seed of the run.
        steps: The steps.
        workers: Processes that draw ahead; 0 draws here, when a batch is asked for.
    """
    if workers == 0:
        script = Script()
        yield from (draw_batch(mixture, seed, step, script) for step in steps)
        return
    # Not forked: the training process may already use a GPU and threads.
    context: Any = multiprocessing.get_context("spawn")
    queues = [context.Queue(_AHEAD) for _ in range(workers)]
    processes: list[BaseProcess] = [
        context.Process(target=_draw_into, args=(queues[i], mixture, seed, steps[i::workers]), daemon=True)
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        for index in range(len(steps)):
            yield _next(queues[index % workers], processes[index % workers])
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _draw_into(out: Any, mixture: Mixture, seed: int, steps: range) -> None:
    # Ctrl-C also reaches this process; the training process ends it when it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    script, parent = Script(), multiprocessing.parent_process()
    for step in steps:
        batch = draw_batch(mixture, seed, step, script)
        while True:
            try:
                out.put(batch, timeout=10)
                break
            except queue.Full:
                if parent is None or not parent.is_alive():
                    out.cancel_join_thread()
                    return


def _next(source: Any, process: BaseProcess) -> Batch:
    while True:
        try:
            batch: Batch = source.get(timeout=10)
        except queue.Empty:
            if not process.is_alive():
                raise RuntimeError(f"a process that draws batches ended with status {process.exitcode}") from None
        else:
            return batch
