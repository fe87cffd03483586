"""`python -m bench soak`: hundreds of answers about ever new pictures in one session; does its memory stay where it was?

Pictures, questions and lengths of answers change; every seventh question is about the picture before, and every fourth goes
on as a chat. Memory is counted once the cache of pictures has been filled, which is the most that it may take.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.beside.measure import machine
from leanvlm.runtime.errors import LeanVLMError
from leanvlm.runtime.reuse import MEGABYTE
from leanvlm.runtime.session import Session, load, user_message

QUESTIONS = ("What is in the image?", "How many things are there?", "Which things are red, and where are they?")
MOST = 1.05
"""Resident memory after, to that before, at most."""
EVERY = 10


@dataclass(frozen=True)
class SoakOptions:
    """What is done.

    Attributes:
        bundle: For the processor.
        output: JSON file to write, or None.
        providers: Each in a process of its own.
        answers: That count.
        warmup: Answers before, which fill the cache of pictures.
        cache_mb: Its size: as small as these fill.
        threads: Processor threads.
    """

    bundle: Path
    output: Path | None = None
    providers: tuple[str, ...] = ("onnxruntime", "openvino")
    answers: int = 300
    warmup: int = 60
    cache_mb: float = 2.0
    threads: int = 2


def measure_soak(options: SoakOptions) -> dict[str, Any]:
    """Soak each provider, write the JSON file if one is asked for, and return its content.

    Raises:
        LeanVLMError: A process failed.
    """
    record: dict[str, Any] = {
        "kind": "soak",
        **machine(),
        "command": "python -m bench soak",
        "bundle": options.bundle.name,
        "answers": options.answers,
        "warmup": options.warmup,
        "cache_mb": options.cache_mb,
        "threads": options.threads,
        "most": MOST,
        "providers": {},
    }
    for provider in options.providers:
        job = {"bundle": str(options.bundle), "provider": provider, "answers": options.answers, "warmup": options.warmup}
        job |= {"cache_mb": options.cache_mb, "threads": options.threads}
        command = [sys.executable, "-m", "bench.soak", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise LeanVLMError(f"soaking {provider} failed: {done.stderr.strip().splitlines()[-1]}")
        record["providers"][provider] = json.loads(done.stdout.splitlines()[-1])
    if options.output is not None:
        options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def soak(session: Session, answers: int, warmup: int) -> dict[str, Any]:
    """Ask, and return resident memory before and after in bytes, on the way, and the most that the cache of pictures held."""
    rng = np.random.default_rng(0)
    resident, cached = [], 0
    picture = _picture(rng)
    for count in range(-warmup, answers):
        if count == 0:
            resident.append(resident_bytes())
        if count % 7:
            picture = _picture(rng)
        question = QUESTIONS[count % len(QUESTIONS)]
        tokens = int(rng.integers(1, 24))
        answer = session.generate(question, [picture], max_new_tokens=tokens, ignore_end=True)
        if count % 4 == 0:
            said = {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}
            turns = [user_message(question, 1), said, user_message(QUESTIONS[0], 0)]
            session.generate(turns, [picture], max_new_tokens=tokens, ignore_end=True)
        cached = max(cached, session._pictures.cache.bytes)
        if count >= 0 and count % EVERY == EVERY - 1:
            resident.append(resident_bytes())
    return {
        "before_bytes": resident[0],
        "after_bytes": resident[-1],
        "most_bytes": max(resident),
        "resident_bytes": resident,
        "cached_bytes": cached,
        "versions": session.backend.versions(),
    }


def _picture(rng: np.random.Generator) -> Any:
    """Return new levels (H, W, 3) of a size of their own."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    width, height = (int(side) for side in rng.integers(100, 1200, 2))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def resident_bytes() -> int:
    """Return this process's resident memory now."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LeanVLMError("the soak reads resident memory from /proc, which this system does not have")


def main() -> None:
    """Soak what the first argument says, and print the record."""
    job = json.loads(sys.argv[1])
    with load(job["bundle"], provider=job["provider"], threads=job["threads"], cache_mb=job["cache_mb"]) as session:
        found = soak(session, job["answers"], job["warmup"])
    print(json.dumps({**found, "bound_bytes": int(job["cache_mb"] * MEGABYTE)}))


if __name__ == "__main__":
    main()
