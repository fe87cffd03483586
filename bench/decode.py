"""What a further token takes on a GPU, beside llama.cpp's own bench, turn by turn in one run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench.latency import TEXT_TOKENS, machine, prompt_of
from leanvlm.runtime.backends.attention import XQA
from leanvlm.runtime.session import Session, load, user_message

Samples = dict[str, list[float]]
# Of llama-quantize, in place of fp16.
QUANTISED = ("Q4_0", "Q4_K_M")


@dataclass(frozen=True)
class DecodeOptions:
    """What is measured.

    Attributes:
        bundles: For cuda, by precision.
        llama: Folder of llama.cpp's programs `llama-bench` and `llama-quantize`, built for the GPU.
        gguf: The same decoder in fp16, as `bench.beside.gguf_files` writes it.
        output: JSON file to write.
        rounds: Turns of everything.
        tokens: Of an answer.
        budgets: Image tokens kept; with the text they are how long the context is.
    """

    bundles: dict[str, Path]
    llama: Path
    gguf: Path
    output: Path
    rounds: int = 3
    tokens: int = 96
    budgets: tuple[int, ...] = (64, 576)


@dataclass
class Measured:
    """Samples by name, in ms, and what llama.cpp says it is."""

    samples: Samples = field(default_factory=dict)
    build: str = ""

    def add(self, name: str, values: list[float]) -> None:
        """Add samples."""
        self.samples.setdefault(name, []).extend(values)


def measure_decode(options: DecodeOptions) -> dict[str, Any]:
    """Measure, write the JSON file, and return what was written.

    A row is `OURS|llama_PRECISION_STAGE_CONTEXT`: the stage is `prefill` of that many tokens or `token`, one behind them.
    Of ours, a token is what an answer takes from its first token to its last, text included, divided by their number.
    """
    measured, files = Measured(), {"F16": options.gguf}
    for kind in QUANTISED:
        files[kind] = options.gguf.with_name(f"decoder-{kind}.gguf")
        if not files[kind].exists():
            command = [options.llama / "llama-quantize", options.gguf, files[kind], kind]
            subprocess.run([*map(str, command)], check=True, capture_output=True)
    for _ in range(options.rounds):
        for precision, bundle in options.bundles.items():
            for name, variable in (("ours", None), ("ours-xqa", "1")):
                _ours(options, f"{name}_{precision}", bundle, variable, measured)
            for asked, times in _again(bundle).items():
                measured.add(f"ours_{precision}_{asked}", times)
        for kind, file in files.items():
            _llama(options, kind, file, measured)
    medians = {name: round(median(values), 3) for name, values in measured.samples.items()}
    record = {
        "kind": "decode", **machine(), "llama.cpp": measured.build, "command": "python -m bench decode",
        "rounds": options.rounds, "tokens": options.tokens, "median_ms": medians, "samples_ms": measured.samples,
    }  # fmt: skip
    options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def _ours(options: DecodeOptions, name: str, bundle: Path, variable: str | None, measured: Measured) -> None:
    if variable is not None:
        os.environ[XQA] = variable
    try:
        with load(bundle, cache_mb=0) as session:
            for budget in options.budgets:
                for stage, context, values in _times(session, budget, options.tokens):
                    measured.add(f"{name}_{stage}_{context}", values)
    finally:
        os.environ.pop(XQA, None)


def _again(bundle: Path) -> Samples:
    """Return the times to the first token of a new picture's question, a second one about it, and a conversation's turns."""
    rng = np.random.default_rng(1)
    found: Samples = {"new picture": [], "second question": [], "next turn": []}
    with load(bundle) as session:
        for _ in range(8):
            picture = rng.integers(0, 256, (960, 1280, 3)).astype(np.uint8)
            said: list[Any] = []
            for name, text in zip(found, ("What is there?", "What is there, on the left?", "And on the right?"), strict=True):
                if name != "next turn":
                    said = []
                said.append(user_message(text, not said))
                answer = session.generate(said, [picture], max_new_tokens=16, ignore_end=True)
                said.append({"role": "assistant", "content": [{"type": "text", "text": answer.text}]})
                found[name].append(answer.timings.time_to_first_token)
    return {name: times[2:] for name, times in found.items()}


def _times(session: Session, budget: int, tokens: int) -> Iterator[tuple[str, int, list[float]]]:
    picture = np.random.default_rng(0).integers(0, 256, (336, 336, 3)).astype(np.uint8)
    prompt = prompt_of(session, TEXT_TOKENS)
    prefills, further = [], []
    for turn in range(6):
        begin = perf_counter()
        answer = session.generate(prompt, [picture], budget=budget, max_new_tokens=tokens, ignore_end=True)
        spent = 1e3 * (perf_counter() - begin) - answer.timings.time_to_first_token
        if turn > 0:
            prefills.append(answer.timings.prefill)
            further.append(spent / (tokens - 1))
    yield "prefill", answer.prompt_tokens, prefills
    yield "token", answer.prompt_tokens, further


def _llama(options: DecodeOptions, kind: str, file: Path, measured: Measured) -> None:
    contexts = ",".join(str(TEXT_TOKENS + budget) for budget in options.budgets)
    common = [str(options.llama / "llama-bench"), "-m", str(file), "-ngl", "99", "-fa", "1", "-r", "5", "-o", "json"]
    for stage in (["-p", contexts, "-n", "0"], ["-p", "0", "-n", str(options.tokens), "-d", contexts]):
        done = subprocess.run([*common, *stage], check=True, capture_output=True, text=True)
        for row in json.loads(done.stdout):
            measured.build = f"{row['build_number']} ({row['build_commit']})"
            is_step = row["n_gen"] > 0
            context = row["n_depth"] if is_step else row["n_prompt"]
            times = [value / 1e6 / max(row["n_gen"], 1) for value in row["samples_ns"]]
            measured.add(f"llama_{kind}_{'token' if is_step else 'prefill'}_{context}", times)
