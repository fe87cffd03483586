"""Clients of a running `leanvlm serve`: tokens per second, the time between tokens, and the first token under load."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from bench.latency import machine

QUESTION = "What is in the image? Say which things are where"


@dataclass(frozen=True)
class LoadOptions:
    """What is asked.

    Attributes:
        url: Of the server, such as http://127.0.0.1:8000.
        output: JSON file to write.
        clients: Clients at once, each in turn.
        requests: Of each client.
        tokens: Of each answer.
        side: Of the pictures, each another.
        rounds: Turns of everything.
    """

    url: str
    output: Path
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    requests: int = 3
    tokens: int = 128
    side: int = 336
    rounds: int = 2


@dataclass
class Seen:
    """What a client saw of its answers.

    Attributes:
        first: Times to the first token, ms.
        between: Of each answer the mean time between its tokens, ms.
        gaps: Times between two pieces of text, ms.
        tokens: Of each answer.
        begin: When the first was asked, s.
        end: When the last was there, s.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    begin: float = 0.0
    end: float = 0.0


def measure_load(options: LoadOptions) -> dict[str, Any]:
    """Measure, write the JSON file, and return what was written.

    Tokens per second are those of all clients, from the first request to the last answer: pictures and prompts included.
    """
    seen: dict[int, list[Seen]] = {count: [] for count in options.clients}
    _ask(options, 0, 0, Seen())
    for number in range(options.rounds):
        for count in options.clients:
            seen[count].append(_together(options, count, number))
    rows = {str(count): _summary(found) for count, found in seen.items()}
    record = {
        "kind": "load", **machine(), "command": "python -m bench load", "requests": options.requests, "tokens": options.tokens,
        "rounds": options.rounds, "clients": rows,
    }  # fmt: skip
    options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def _together(options: LoadOptions, count: int, number: int) -> Seen:
    start, seen = threading.Barrier(count), Seen()

    def client(which: int) -> None:
        start.wait()
        for request in range(options.requests):
            _ask(options, which, 1000 * number + 100 * count + request, seen)

    threads = [threading.Thread(target=client, args=(which,)) for which in range(count)]
    seen.begin = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.end = perf_counter()
    return seen


def _ask(options: LoadOptions, client: int, seed: int, seen: Seen) -> None:
    """Ask once, streaming, and note what was seen."""
    place = urlsplit(options.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=300)
    begin = perf_counter()
    connection.request("POST", "/v1/chat/completions", _body(options, client, seed), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"the server says {response.status}: {response.read(300)!r}")
    times, tokens = [], 0
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[len(b"data: ") :])
        # The last one ends the answer, with text or without.
        if any(choice["delta"].get("content") or choice["finish_reason"] for choice in chunk["choices"]):
            times.append(perf_counter())
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    connection.close()
    seen.first.append(1e3 * (times[0] - begin))
    seen.between.append(1e3 * (times[-1] - times[0]) / (tokens - 1))
    seen.gaps += [1e3 * (two - one) for one, two in pairwise(times)]
    seen.tokens.append(tokens)


def _body(options: LoadOptions, client: int, seed: int) -> bytes:
    levels = np.random.default_rng([client, seed]).integers(0, 256, (options.side, options.side, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    asked = {
        "messages": [{"role": "user", "content": content}], "max_tokens": options.tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0,
    }  # fmt: skip
    return json.dumps(asked).encode()


def _summary(found: list[Seen]) -> dict[str, Any]:
    rates = [sum(seen.tokens) / (seen.end - seen.begin) for seen in found]
    first, between, gaps = ([value for seen in found for value in getattr(seen, name)] for name in ("first", "between", "gaps"))
    return {
        "tokens_per_second": round(median(rates), 1),
        "between_tokens_ms_p50": round(median(between), 3),
        # An answer whose tokens are no text has one piece.
        "gap_ms_p50": round(median(gaps), 3) if gaps else None,
        "gap_ms_p99": round(float(np.percentile(gaps, 99)), 3) if gaps else None,
        "first_token_ms_p50": round(median(first), 2),
        "first_token_ms_p99": round(float(np.percentile(first, 99)), 2),
        "answers": len(first),
    }
