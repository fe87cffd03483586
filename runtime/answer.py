"""What a run returns: the text, its tokens, the time of each stage, and what pruning did to each image; or it in the making."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.crops import CropShape
from leanvlm.runtime.errors import InputError

STAGES = ("preprocess", "vision", "project", "prune", "splice", "prefill", "sample", "decode")


@dataclass(frozen=True)
class Pruning:
    """What pruning kept of one crop of an image, and why.

    Attributes:
        kept: K, image tokens of the crop handed to the decoder.
        effective_rank: Of the image's features, a measure of its variety; None where the pruner's gate does not want it.
        num_selected: Tokens kept on merit; the other `kept - num_selected` were filled up by attention.
        converged: Whether the selection reached its fixed point, which makes it exact.
        indices: (K,) which of the crop's N tokens are kept, ascending: raster order behind any prefix.
        attention: (N,) what the tokens were ranked by: the class token's attention, or that received.
        shape: Of the crop.
    """

    kept: int
    effective_rank: float | None
    num_selected: int
    converged: bool
    indices: npt.NDArray[np.int64]
    attention: npt.NDArray[np.float32]
    shape: CropShape

    @property
    def total(self) -> int:
        """N, the crop's image tokens before pruning."""
        return self.shape.tokens

    @property
    def attention_entropy(self) -> float:
        """Entropy of the class token's attention over the patches, in nats; high when no part stands out."""
        share = self.attention.astype(np.float64)
        share = share[share > 0] / share.sum()
        return float(-(share * np.log(share)).sum())

    def to_dict(self) -> dict[str, Any]:
        """The scalar values, for JSON."""
        names = ("kept", "total", "effective_rank", "attention_entropy", "num_selected", "converged")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ImageTokens:
    """How many tokens an image has in a prompt.

    Attributes:
        kept: Of the image itself; padding, the ends of lines and the text around its crops are not counted.
        total: The same unpruned.
        crops: How many crops it was cut into.
        tiles: Rows and columns of its tiles; (0, 0) if it is one crop.
    """

    kept: int
    total: int
    crops: int = 1
    tiles: tuple[int, int] = (0, 0)


@dataclass
class Timings:
    """Wall times of one answer, in ms.

    `vision` is the whole vision graph (vision, project and prune); `sample` and `decode` have one entry a token, the first
    of `sample` belongs to the prefill. `time_to_first_token` runs from the image's bytes to the first token id; waiting while
    other answers have the device counts there only.

    Attributes:
        reused_images: Images of the prompt that were encoded before.
        reused_positions: Positions of the prompt that the cache still held, and that were not read again.
    """

    preprocess: float = 0.0
    vision: float = 0.0
    splice: float = 0.0
    prefill: float = 0.0
    sample: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    time_to_first_token: float = 0.0
    reused_images: int = 0
    reused_positions: int = 0

    def to_dict(self) -> dict[str, float]:
        """One number a stage: `sample` and `decode` summed over the answer."""
        return {
            "preprocess": self.preprocess,
            "vision_graph": self.vision,
            "splice": self.splice,
            "prefill": self.prefill,
            "sample": sum(self.sample),
            "decode": sum(self.decode),
            "time_to_first_token": self.time_to_first_token,
        }


@dataclass(frozen=True)
class TokenChance:
    """How probable the model thought a token, whatever sampling made of it.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of its probability, of the logits as the decoder gave them.
        top: The most probable tokens and theirs, highest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: Without special tokens and without the stop string that ended it.
        token_ids: All generated ids, an end token included.
        prompt_tokens: Positions that the prompt took, kept image tokens included.
        finish_reason: `stop` (end token or stop string) or `length`.
        timings: Wall times.
        pruning: One entry a crop, in order; an image that is taken whole is one crop.
        images: One entry an image, in order.
        chances: One entry a token, if they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    timings: Timings
    pruning: tuple[Pruning, ...]
    images: tuple[ImageTokens, ...] = ()
    chances: tuple[TokenChance, ...] = ()


class Generation:
    """An answer in the making: iterate over its pieces of text; `answer` is there when they end.

    Nothing is decoded before a piece is asked for. It is one stream: a second loop goes on where the first one stopped, and
    threads that share it share its pieces out. Whoever stops early may go on later, or call `close`; an object that is
    dropped closes itself. Nothing else waits for it: it has a cache of its own.
    """

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces = pieces
        self._turn = threading.RLock()
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self._turn:
            try:
                return next(self._pieces)
            except StopIteration as end:
                # A generator says what it returned once; later it only says that it has ended.
                self._answer = end.value or self._answer
                raise StopIteration from None

    def close(self) -> None:
        """Give the answer up, with its cache; one that has ended stays as it is."""
        with self._turn:
            self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The finished answer; runs the generation to its end if that was not done.

        Raises:
            InputError: It was closed, or failed, before its end.
        """
        for _ in self:
            pass
        if self._answer is None:
            raise InputError("this answer was given up before its end; ask again")
        return self._answer
