"""LeanVLM: a bundle, run by either of its providers, with pictures and prefixes kept as by default."""

from __future__ import annotations

from bench.beside.worker import Answered
from leanvlm.runtime.session import load


class Peer:
    """A session.

    Args:
        bundle: Its folder.
        provider: As `load` takes it.
        budget: Image tokens kept.
        threads: Processor threads.
        cache_mb: As `load` takes it; 0 keeps nothing.
    """

    def __init__(self, bundle: str, provider: str, budget: int, threads: int, cache_mb: float = 64.0) -> None:
        self._session = load(bundle, provider=provider, threads=threads, cache_mb=cache_mb)
        self._budget = budget

    def answer(self, prompt: str, jpeg: bytes, tokens: int) -> Answered:
        """Answer a raw prompt."""
        answer = self._session.generate(prompt, [jpeg], budget=self._budget, raw=True, max_new_tokens=tokens, ignore_end=True)
        steps = [a + b for a, b in zip(answer.timings.decode, answer.timings.sample[1:], strict=True)]
        return Answered(list(answer.token_ids), answer.timings.time_to_first_token, steps, answer.prompt_tokens)

    def versions(self) -> dict[str, str]:
        """Return the version of what runs the graphs, with its arithmetic."""
        return self._session.backend.versions()
