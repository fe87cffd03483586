"""An answer while its tokens come: the choice of each, its text, and when it has ended.

Whoever runs the decoder hands the scores over: a session one answer's after another's, a server those of several at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from leanvlm.runtime.answer import Answer, Timings, TokenChance
from leanvlm.runtime.embeddings import TokenTable
from leanvlm.runtime.generation import Chooser, GenerateOptions, Scores
from leanvlm.runtime.layout import ImageFeatures, Layout, image_tokens
from leanvlm.runtime.prompt import Prompt
from leanvlm.runtime.sampling import chances
from leanvlm.runtime.streaming import AnswerText
from leanvlm.runtime.text import TextTokenizer


@dataclass(frozen=True)
class Vocabulary:
    """What a model's tokens are: their texts, their embeddings, and those that end an answer."""

    tokenizer: TextTokenizer
    table: TokenTable
    end_ids: frozenset[int]


@dataclass(frozen=True)
class Room:
    """Positions that there are for one answer, where that is less than the model's context.

    Attributes:
        whole: For prompt and answer together; None is the context.
        prompt: For the prompt, kept image tokens included; None is what the whole leaves.
    """

    whole: int | None = None
    prompt: int | None = None


class Draft:
    """One answer in the making.

    Args:
        vocabulary: Of the model.
        prompt: What is answered.
        features: Of the prompt's images.
        layout: Of the bundle.
        options: How to generate.
        timings: Times so far; the answer's own.
        start: `perf_counter()` when the request came, for the time to the first token.

    Attributes:
        ids: Tokens so far.
        chances: Of each its log-probability, if the options ask for them.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Prompt,
        features: Sequence[ImageFeatures],
        layout: Layout,
        options: GenerateOptions,
        timings: Timings,
        start: float,
    ) -> None:
        self.prompt = prompt
        self.options = options
        self.timings = timings
        self.ids: list[int] = []
        self.chances: list[TokenChance] = []
        self._vocabulary = vocabulary
        self._chooser = Chooser(options, prompt.ids, vocabulary.end_ids)
        self._text = AnswerText(vocabulary.tokenizer, options.stop)
        self._start = start
        self._ended = False
        pruning = tuple(crop.pruning for image in features for crop in image.crops)
        images = tuple(image_tokens(image, layout) for image in features)
        # Without its text: what is known of the answer before it comes.
        self.known = Answer("", (), len(prompt), "length", timings, pruning, images)

    @property
    def room(self) -> int:
        """Positions that prompt and answer take at most."""
        return len(self.prompt) + self.options.max_new_tokens

    @property
    def next_position(self) -> int:
        """Where the newest token goes."""
        return self.prompt.next_position + len(self.ids) - 1

    @property
    def reads_best(self) -> bool:
        """Whether nobody wants the logits of a token, but which one is best."""
        return self._chooser.takes_best and self.options.top_logprobs is None

    @property
    def goes_on(self) -> bool:
        """Whether there may be another token behind the one that is chosen next."""
        return len(self.ids) + 1 < self.options.max_new_tokens

    @property
    def ends(self) -> frozenset[int]:
        """Tokens behind which nothing is generated."""
        return self._chooser.ends

    @property
    def done(self) -> bool:
        """Whether it has all its tokens; an end token and stop strings are known once their text was asked for."""
        return self._ended or len(self.ids) >= self.options.max_new_tokens

    def choose(self, scores: Scores) -> None:
        """Take the next token from scores, which wait until they are there."""
        begin = perf_counter()
        token = self._chooser.choose(scores)
        if self.options.top_logprobs is not None:
            self.chances.append(chances(scores.logits(), token, self.options.top_logprobs))
        end = perf_counter()
        self.timings.sample.append(1e3 * (end - begin))
        if not self.ids:
            self.timings.time_to_first_token = 1e3 * (end - self._start)
        self.ids.append(token)

    def push(self) -> str:
        """Return the text that the newest token completes, possibly none."""
        token = self.ids[-1]
        ended = token in self._vocabulary.end_ids and not self.options.ignore_end
        piece = self._text.push(token, end=ended)
        self._ended = ended or self._text.stopped
        return piece

    def flush(self) -> str:
        """Return the text that was held back, at the end."""
        return self._text.flush()

    @property
    def answer(self) -> Answer:
        """The answer as far as it is there."""
        reason = "stop" if self._ended else "length"
        return replace(
            self.known, text=self._text.text, token_ids=tuple(self.ids), finish_reason=reason, chances=tuple(self.chances)
        )
