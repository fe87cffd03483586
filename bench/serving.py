"""`python -m bench serving`: what `leanvlm serve` adds to the first token, and thousands of requests, good and bad, at once.

The first part asks one warm session itself and through a server in the same process, turn by turn. The second starts the
command and lets clients ask, go away midway and send what is malformed; each good answer is compared with the session's own.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
from PIL import Image

from bench.beside.measure import machine
from leanvlm.runtime.errors import LeanVLMError
from leanvlm.runtime.session import Session, load

CHAT, JSON = "/v1/chat/completions", {"Content-Type": "application/json"}
QUESTIONS = ("What is in the image?", "How many things are there?", "Which things are red?", "What is below the green ring?")
MOST = 1.05
"""Resident memory after, to that before, at most."""
ADDED_MS = 10.0
"""What serving may add to the first token."""


@dataclass(frozen=True)
class ServingOptions:
    """What is done.

    Attributes:
        bundle: For the processor.
        output: JSON file to write, or None.
        requests: That count.
        warmup: Requests before, which fill the cache of pictures.
        clients: At once.
        rounds: Of the first part.
        max_queue: Requests that may wait: fewer than there are clients, so that some are refused.
        cache_mb: As small as these pictures fill.
    """

    bundle: Path
    output: Path | None = None
    requests: int = 2000
    warmup: int = 300
    clients: int = 16
    rounds: int = 60
    max_queue: int = 8
    cache_mb: float = 2.0


@dataclass(frozen=True)
class Case:
    """A good request and what the session answers to it."""

    body: dict[str, Any]
    text: str


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        outcomes: How many requests ended how.
        wrong: Answers that are not the session's.
        lock: For both.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: str) -> None:
        """Count an outcome."""
        with self.lock:
            self.outcomes[outcome] += 1


def measure_serving(options: ServingOptions) -> dict[str, Any]:
    """Measure, write the JSON file if one is asked for, and return its content."""
    record: dict[str, Any] = {
        "kind": "serving", **machine(), "command": "python -m bench serving", "bundle": options.bundle.name,
        "requests": options.requests, "warmup": options.warmup, "clients": options.clients, "rounds": options.rounds,
        "max_queue": options.max_queue, "cache_mb": options.cache_mb, "most": MOST, "most_added_ms": ADDED_MS,
    }  # fmt: skip
    with load(options.bundle) as session:
        record["versions"] = session.backend.versions()
        record["first_token_ms"] = _first_tokens(session, options.rounds)
        cases = _cases(session)
    record["soak"] = _soak(options, cases)
    if options.output is not None:
        options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return record


def _first_tokens(session: Session, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Time the first piece of text of the session alone and through a server, turn by turn.

    Returns:
        Of a picture that is known and one that is new, the times of each, in ms.
    """
    times: dict[str, dict[str, list[float]]] = {}
    with _here(session) as port:
        for kind in ("known", "new"):
            found = times.setdefault(kind, {"session": [], "server": []})
            for count in range(-3, rounds):
                for number, way in enumerate(("session", "server")):
                    file = _photograph(2 * count + number if kind == "new" else 0)
                    took = _alone(session, file) if way == "session" else _asked(port, file)
                    if count >= 0:
                        found[way].append(took)
    return times


@contextmanager
def _here(session: Session) -> Iterator[int]:
    """Serve a session from a thread of this process; gives the port."""
    from leanvlm.runtime.serving.app import create_app
    from leanvlm.runtime.serving.config import ServeConfig
    from leanvlm.runtime.serving.server import bind, make_server

    sockets = bind("127.0.0.1", 0)
    # The session's own way to answer, which its answers alone take too.
    server = make_server(create_app(session, ServeConfig(rows=1)))
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    while not (server.started and server.service.ready):
        sleep(0.01)
    try:
        yield sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def _photograph(seed: int) -> bytes:
    """Return a JPEG file of 1280 x 960."""
    coarse = np.random.default_rng(seed + 1000).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((1280, 960), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _alone(session: Session, file: bytes) -> float:
    begin = perf_counter()
    generation = session.stream(QUESTIONS[0], [file], max_new_tokens=4)
    next(iter(generation))
    took = 1e3 * (perf_counter() - begin)
    generation.close()
    return took


def _asked(port: int, file: bytes) -> float:
    body = json.dumps({"messages": [_user(QUESTIONS[0], file)], "max_tokens": 4, "stream": True})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    # A client has its connection already.
    connection.connect()
    begin = perf_counter()
    connection.request("POST", CHAT, body, JSON)
    response = connection.getresponse()
    while b'"content":"' not in (line := response.readline()) or b'"content":""' in line:
        if not line:
            raise LeanVLMError("the server ended an answer before its first token")
    took = 1e3 * (perf_counter() - begin)
    response.read()
    connection.close()
    return took


def _user(text: str, *files: bytes) -> dict[str, Any]:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(file).decode()}" for file in files]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def _cases(session: Session) -> list[Case]:
    """Return good requests: one picture and two, none, other budgets, several turns; with the session's answers."""
    found = []
    rng = random.Random(0)
    for number in range(64):
        files = [_small(10 * number + which) for which in range((1, 1, 1, 2, 0)[number % 5])]
        messages = [_user(QUESTIONS[number % 4], *files)]
        if number % 4 == 1:
            messages += [{"role": "assistant", "content": "nothing"}, _user(QUESTIONS[0])]
        options: dict[str, Any] = {"max_tokens": rng.randint(1, 48)}
        if number % 3 == 0:
            options["ignore_eos"] = True
        if number % 8 == 2:
            options["budget"] = 576
        own = [{**one, "content": _parts(one["content"])} for one in messages]
        answer = session.generate(
            own, files, max_new_tokens=options["max_tokens"], ignore_end="ignore_eos" in options, budget=options.get("budget")
        )
        found.append(Case({"messages": messages, "temperature": 0, **options}, answer.text))
    return found


def _parts(content: Any) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{"type": "image"} if part["type"] == "image_url" else part for part in parts]


def _small(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def _malformed(case: Case, rng: random.Random) -> tuple[str, bytes]:
    """Return what is wrong with a request, and its body."""
    good = json.dumps(case.body)
    picture = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,////"}}
    broken: dict[str, Any] = {
        "no JSON": good[: len(good) // 2],
        "no messages": {},
        "a bare address": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png,"}]}]},
        "no picture": {"messages": [{"role": "user", "content": [picture]}]},
        "too many images": {"messages": [{"role": "user", "content": [picture] * 9}]},
        "a cut picture": good.replace('"}}', 'AA"}}') if '"}}' in good else "[]",
        "another budget": {**case.body, "budget": 5},
        "two answers": {**case.body, "n": 2},
        "too long": {**case.body, "max_tokens": 100_000},
    }
    name = rng.choice(sorted(broken))
    return name, (broken[name] if isinstance(broken[name], str) else json.dumps(broken[name])).encode()


def _soak(options: ServingOptions, cases: Sequence[Case]) -> dict[str, Any]:
    command = [sys.executable, "-m", "leanvlm", "serve", str(options.bundle), "--port", "0"]
    command += ["--max-queue", str(options.max_queue), "--cache-mb", str(options.cache_mb)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    try:
        address = re.search(r"http://127\.0\.0\.1:(\d+) ", running.stderr.readline())
        if address is None:
            raise LeanVLMError(f"the server did not start: {running.stderr.read()}")
        port = int(address[1])
        _ask_all(port, cases, options.warmup, options.clients, 1, Seen())
        before, seen, begin = _resident(running.pid), Seen(), perf_counter()
        _ask_all(port, cases, options.requests, options.clients, 2, seen)
        took = perf_counter() - begin
        metrics = _settled(port)
        after = _resident(running.pid)
    finally:
        running.terminate()
        said = running.stderr.read()
        status = running.wait()
    return {
        "outcomes": dict(sorted(seen.outcomes.items())), "wrong": seen.wrong[:10], "wrong_answers": len(seen.wrong),
        "before_bytes": before, "after_bytes": after, "seconds": round(took, 1), "left_running": metrics["leanvlm_running"],
        "left_waiting": metrics["leanvlm_waiting"], "status": status, "said": said.strip().splitlines()[-3:],
    }  # fmt: skip


def _ask_all(port: int, cases: Sequence[Case], count: int, clients: int, seed: int, seen: Seen) -> None:
    """Let clients send requests, each in turn, until there are so many."""
    numbers = iter(range(count))
    lock = threading.Lock()

    def client(which: int) -> None:
        rng = random.Random(1000 * seed + which)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                KINDS.get(number % 10, _good)(port, rng.choice(cases), rng, seen)
            except Exception as error:
                seen.note(f"error: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=client, args=(which,)) for which in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send(port: int, body: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", CHAT, body, JSON)
    return connection, connection.getresponse()


def _good(port: int, case: Case, rng: random.Random, seen: Seen) -> None:
    """Ask until there is a place, and compare the answer."""
    stream = rng.random() < 0.5
    body = json.dumps({**case.body, "stream": stream}).encode()
    while True:
        connection, response = _send(port, body)
        data = response.read().decode()
        connection.close()
        if response.status != 503:
            break
        seen.note(f"503, Retry-After {response.getheader('retry-after')}")
        sleep(0.2)
    if response.status != 200:
        seen.note(f"a good request got {response.status}: {data[:200]}")
        return
    text = _streamed(data) if stream else json.loads(data)["choices"][0]["message"]["content"]
    seen.note("streamed" if stream else "whole")
    if text != case.text:
        with seen.lock:
            seen.wrong.append(f"{text!r} where the session says {case.text!r}")


def _streamed(data: str) -> str:
    """Return the text of a stream; its end is said once, in the last chunk."""
    *events, done, _ = data.split("\n\n")
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    ends = [choice["finish_reason"] for choice in choices]
    if done != "data: [DONE]" or not ends[-1] or any(ends[:-1]):
        raise LeanVLMError(f"a stream ends with {ends[-3:]} and {done!r}")
    return "".join(choice["delta"].get("content", "") for choice in choices)


def _aborted(port: int, case: Case, rng: random.Random, seen: Seen) -> None:
    """Go away: before the answer begins, or behind some of its chunks."""
    body = json.dumps({**case.body, "stream": True, "ignore_eos": True, "max_tokens": 512}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", CHAT, body, JSON)
    if rng.random() < 0.7:
        response = connection.getresponse()
        for _ in range(rng.randint(1, 12)):
            response.readline()
        response.close()
    connection.close()
    seen.note("aborted")


def _bad(port: int, case: Case, rng: random.Random, seen: Seen) -> None:
    """Send what cannot be answered; a 400 with OpenAI's error is right."""
    name, body = _malformed(case, rng)
    connection, response = _send(port, body)
    data = response.read()
    connection.close()
    right = response.status == 400 and set(json.loads(data)["error"]) == {"message", "type", "param", "code"}
    full = response.status == 503
    seen.note("malformed, refused" if right else "malformed, queue full" if full else f"malformed ({name}): {response.status}")


KINDS: dict[int, Callable[[int, Case, random.Random, Seen], None]] = {3: _aborted, 7: _bad}
"""What the requests are whose numbers end so; the others are good."""


def _settled(port: int) -> dict[str, float]:
    """Return the metrics once nothing runs, or after 30 s."""
    found: dict[str, float] = {}
    for _ in range(300):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        found = {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}
        if not found["leanvlm_running"] and not found["leanvlm_waiting"]:
            break
        sleep(0.1)
    return found


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LeanVLMError("the soak reads resident memory from /proc, which this system does not have")


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Return the few figures that a terminal shows."""
    times = {
        kind: {way: round(median(values), 2) for way, values in ways.items()} for kind, ways in record["first_token_ms"].items()
    }
    soak = record["soak"]
    grown = round(100 * (soak["after_bytes"] / soak["before_bytes"] - 1), 2)
    return {"first_token_ms_p50": times, "memory_grown_percent": grown, **{k: v for k, v in soak.items() if k != "said"}}
