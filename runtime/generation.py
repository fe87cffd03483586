"""How an answer is generated: what a request says, and what the checkpoint's generation_config.json says where it does not.

The file's settings count as in `generate` of transformers, but for three: an answer is greedy unless the request gives a
temperature (whatever `do_sample` and `temperature` say), is as long as the request says (`max_new_tokens`, `max_length`), and
what neither the request nor the file sets does nothing (transformers samples with a top_k of 50 then).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from reprlib import repr as short
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from leanvlm.runtime.errors import BundleError, InputError
from leanvlm.runtime.logits import LOGITS_SETTINGS, NEUTRAL, LogitsConfig, process
from leanvlm.runtime.records import load_json
from leanvlm.runtime.sampling import SamplingConfig, sample

MAX_NEW_TOKENS = 128
# As in OpenAI's interface.
MAX_TOP_LOGPROBS = 20
GENERATION_CONFIG = "generation_config.json"
SAMPLING_SETTINGS = ("top_k", "top_p", "min_p")
"""Settings of the file that sampling uses."""
REQUEST_OPTIONS = ("max_new_tokens", "temperature", "seed", "stop", "ignore_end", "top_logprobs")
"""What only a request says."""


class Scores(Protocol):
    """What the decoder thinks of the next token."""

    def greedy(self) -> int:
        """Return the most probable token; raise BackendError if no score is finite."""
        ...

    def logits(self) -> npt.NDArray[np.float32]:
        """Return the scores of all tokens (V,)."""
        ...

    def wait(self) -> None:
        """Return when they are there; raise BackendError if the run that makes them failed."""
        ...


@dataclass(frozen=True)
class GenerateOptions:
    """How an answer is generated; the checkpoint's own settings are in `GenerationSettings`.

    Attributes:
        max_new_tokens: At least 1.
        sampling: Temperature 0 is greedy.
        stop: Strings that end the answer and are left out of it. They match the text of special tokens too.
        ignore_end: Go on after an end token, for measuring: as if the model had none.
        logits: What is done to the logits before a token is chosen.
        top_logprobs: Of each token its log-probability and those of so many most probable ones; None wants neither.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    logits: LogitsConfig = NEUTRAL
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, Integral) or isinstance(self.max_new_tokens, bool):
            raise InputError(f"max_new_tokens must be a whole number, not {self.max_new_tokens!r}")
        if not all(isinstance(text, str) for text in self.stop):
            raise InputError(f"stop must be a string or several, not {self.stop!r}")
        if not all(self.stop):
            raise InputError("a stop string must not be empty")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens {self.max_new_tokens} is not possible; give at least 1")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise InputError(f"top_logprobs {self.top_logprobs} is not possible; give 0 to {MAX_TOP_LOGPROBS}")


@dataclass(frozen=True)
class GenerationSettings:
    """What a checkpoint's generation_config.json says.

    Attributes:
        end_ids: Tokens that end an answer.
        sampling: For a request with a temperature.
        logits: For every request.
    """

    end_ids: frozenset[int] = frozenset()
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 (frozen)
    logits: LogitsConfig = NEUTRAL

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationSettings:
        """Read the settings out of a generation configuration; a null is a setting that is not there.

        Raises:
            InputError: A value that is not possible.
        """
        end = data.get("eos_token_id")
        ends = [] if end is None else end if isinstance(end, list) else [end]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ends):
            raise InputError(f"eos_token_id must be a token id or a list of them, not {short(end)}")
        given = {name: value for name in SAMPLING_SETTINGS if (value := data.get(name)) is not None}
        logits = NEUTRAL.changed({name: data.get(name) for name in LOGITS_SETTINGS})
        return cls(frozenset(ends), SamplingConfig(**given), logits)

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationSettings:
        """Read the generation_config.json of a bundle.

        Raises:
            BundleError: It cannot be read, or holds a value that is not possible.
        """
        path = folder / GENERATION_CONFIG
        data = load_json(path, BundleError)
        if not isinstance(data, dict):
            raise BundleError(f"{path} is not a JSON object")
        try:
            return cls.from_dict(data)
        except InputError as error:
            raise BundleError(f"{path}: {error}") from error

    def check(self, vocab_size: int) -> None:
        """Refuse settings of another model.

        Raises:
            BundleError: They name tokens that a model of `vocab_size` tokens does not have.
        """
        beyond = max(self.end_ids, default=0)
        if beyond >= vocab_size:
            raise BundleError(f"{GENERATION_CONFIG}: eos_token_id {beyond} is beyond the model's {vocab_size} tokens")
        try:
            self.logits.check_ids(vocab_size)
        except InputError as error:
            raise BundleError(f"{GENERATION_CONFIG}: {error}") from error

    def options(
        self,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_end: bool = False,
        top_logprobs: int | None = None,
        **settings: Any,
    ) -> GenerateOptions:
        """Return the options of a request.

        Args:
            max_new_tokens: Where the answer is cut.
            temperature: 0 is greedy.
            seed: Makes sampling repeatable.
            stop: Strings that end the answer.
            ignore_end: Go on after an end token.
            top_logprobs: Return log-probabilities, and those of so many most probable tokens.
            settings: `top_k`, `top_p`, `min_p` and the fields of `LogitsConfig`; one that is missing or None is the
                checkpoint's.

        Raises:
            InputError: A value that is not possible.
            TypeError: An option that there is not.
        """
        unknown = [name for name in settings if name not in (*SAMPLING_SETTINGS, *LOGITS_SETTINGS)]
        if unknown:
            known = ", ".join((*REQUEST_OPTIONS, *SAMPLING_SETTINGS, *LOGITS_SETTINGS))
            raise TypeError(f"there is no option {unknown[0]!r} for an answer; known: {known}")
        chosen = {name: settings.pop(name) for name in SAMPLING_SETTINGS if name in settings}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        sampling = replace(self.sampling, temperature=temperature, seed=seed, **chosen)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        return GenerateOptions(max_new_tokens, sampling, stops, ignore_end, self.logits.changed(settings), top_logprobs)


class Chooser:
    """Chooses the tokens of one answer in turn; the logits stay on the device if only their highest is wanted."""

    def __init__(self, options: GenerateOptions, prompt: Sequence[int], end_ids: frozenset[int]) -> None:
        """Begin an answer.

        Args:
            options: How to generate.
            prompt: The prompt's tokens, each image all of its placeholders.
            end_ids: Tokens that end an answer.
        """
        self._options = options
        self._ids, self._prompt = list(prompt), len(prompt)
        self._end_ids = frozenset() if options.ignore_end else end_ids
        self._rng = options.sampling.generator()

    @property
    def takes_best(self) -> bool:
        """Whether each token is the one with the highest logit, as it is."""
        return self._options.sampling.temperature == 0 and not self._options.logits.active

    @property
    def ends(self) -> frozenset[int]:
        """Tokens behind which nothing is generated."""
        return self._end_ids

    def choose(self, scores: Scores) -> int:
        """Return the next token."""
        sampling, settings = self._options.sampling, self._options.logits
        if self.takes_best:
            return scores.greedy()
        logits = scores.logits()
        if settings.active:
            logits = process(logits, settings, np.asarray(self._ids, np.int64), self._prompt, self._end_ids)
        token = sample(
            logits,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            rng=self._rng,
        )
        self._ids.append(token)
        return token
