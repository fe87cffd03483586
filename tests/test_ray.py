"""Serving on a cluster: arguments, the router before replicas that die, and, where Ray is installed, all of it under load."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from leanvlm.demo import SAMPLES_DIR
from leanvlm.runtime.errors import InputError, MissingExtraError
from leanvlm.runtime.ray import Model, RayConfig, Router, build, read_config, run
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.continued import ContinuedStream, DiffersError

QUESTION = "What is below the green ring?"
SCENE = SAMPLES_DIR / "complex-9003.png"
PHOTOGRAPHS = sorted(SAMPLES_DIR.with_name("photographs").glob("*.jpg"))


def chat(stream: bool = False, image: Path = SCENE, **more: Any) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}], "stream": stream, **more}


def scope_of(path: str, method: str = "POST") -> dict[str, Any]:
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    return {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}


# --- Arguments ----------------------------------------------------------------------------------------------------------


def test_arguments_of_the_command_line_and_of_yaml() -> None:
    texts = {
        "bundle": "b", "replicas": "2", "gpus": "0.5", "max_replicas": "4", "threads": "3", "max_queue": "7", "host": "0.0.0.0",
        "api_key_file": "k", "allow_remote_images": "a,b", "device": "cuda",
    }  # fmt: skip
    values = {
        **texts,
        "replicas": 2,
        "gpus": 0.5,
        "max_replicas": 4,
        "threads": 3,
        "max_queue": 7,
        "allow_remote_images": ["a", "b"],
    }
    serve = ServeConfig(host="0.0.0.0", api_key_file=Path("k"), max_queue=7, allow_remote_images=("a", "b"))
    expected = RayConfig(Path("b"), replicas=2, max_replicas=4, gpus=0.5, device="cuda", threads=3, serve=serve)
    assert read_config(texts) == read_config(values) == expected


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "bundle is missing"),
        ({"bundle": "b", "replica": 2}, "replica is no argument of this application"),
        ({"bundle": "b", "serve": {}}, "serve is no argument"),
        ({"bundle": "b", "replicas": "two"}, "replicas 'two' is no int"),
        ({"bundle": "b", "replicas": 0}, "replicas 0 is not possible"),
        ({"bundle": "b", "replicas": 3, "max_replicas": 2}, "max_replicas 2 is less than replicas, 3"),
        ({"bundle": "b", "max_queue": 0}, "max_queue 0 is not possible"),
    ],
)
def test_wrong_arguments(args: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build(args)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'leanvlm\[scale\]'"):
        build({"bundle": "b"})


# --- A stream that another goes on with ---------------------------------------------------------------------------------------


def chunk(text: str, name: str = "a", **more: Any) -> bytes:
    event = {"id": name, "created": 1, "choices": [{"delta": {"content": text}}], **more}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def test_what_was_sent_is_left_out() -> None:
    stream = ContinuedStream()
    first = chunk("", leanvlm={"timings_ms": 1}) + chunk("one")
    assert stream.take(first) == first
    assert stream.take(chunk(" two")) == chunk(" two")
    stream.restart()
    again = [chunk("", "b", leanvlm={"timings_ms": 2}), chunk("one", "b") + chunk(" two", "b") + chunk(" three", "b"), DONE]
    # Under the name that it had.
    assert [stream.take(message) for message in again] == [b"", chunk(" three"), DONE]


@pytest.mark.parametrize("other", [chunk("One", "b"), chunk("one", "b", usage=None), b'data: {"error":{}}\n\n', DONE])
def test_another_answer_is_not_gone_on_with(other: bytes) -> None:
    stream = ContinuedStream()
    stream.take(chunk("one"))
    stream.restart()
    with pytest.raises(DiffersError):
        stream.take(other)


class ActorDied(Exception):
    """As Ray's RayActorError."""


class BackPressure(Exception):
    """As Ray's BackPressureError."""


@pytest.fixture
def ray_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for what the router needs of Ray."""
    modules = {"ray": {}, "ray.exceptions": {"RayActorError": ActorDied}, "ray.serve": {},
               "ray.serve.exceptions": {"BackPressureError": BackPressure}}  # fmt: skip
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)


class Replicas:
    """Ray's handle: each request is answered by the next script, of messages and of exceptions."""

    def __init__(self, *scripts: Sequence[Any]) -> None:
        self.scripts = list(scripts)
        self.asked: list[tuple[dict[str, Any], bytes]] = []

    def options(self, **options: Any) -> Replicas:
        """Take how the handle is used."""
        assert options == {"method_name": "answer", "stream": True}
        return self

    def remote(self, scope: dict[str, Any], body: bytes) -> Answering:
        """Ask."""
        self.asked.append((scope, body))
        return Answering(self.scripts.pop(0))


class Answering:
    """Ray's generator of one answer."""

    def __init__(self, script: Sequence[Any]) -> None:
        self._script = iter(script)

    def __aiter__(self) -> Answering:
        return self

    async def __anext__(self) -> Any:
        one = next(self._script, None)
        if one is None:
            raise StopAsyncIteration
        if isinstance(one, Exception):
            raise one
        return one

    def cancel(self) -> None:
        """Give it up."""


def start(status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"x-a", b"b")]}


def piece(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def asked(replicas: Replicas, body: bytes = b"{}", **config: Any) -> tuple[int, bytes]:
    """Send a request through the router; return status and body."""
    from starlette.requests import Request

    sent: list[dict[str, Any]] = []

    async def exchange() -> None:
        parts = iter(
            [{"type": "http.request", "body": body[:1], "more_body": True}, {"type": "http.request", "body": body[1:]}]
        )

        async def receive() -> dict[str, Any]:
            part = next(parts, None)
            if part is None:
                await asyncio.sleep(60)
            assert part is not None
            return part

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {**scope_of("/v1/models"), "app": object(), "state": {}}
        router = Router(replicas, RayConfig(Path("b"), **config))
        response = await router(Request(scope, receive))
        await response(scope, receive, send)
        assert router._room.held == 0

    asyncio.run(exchange())
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def test_a_request_is_handed_on_whole(ray_errors: None) -> None:
    replicas = Replicas([start(), piece(b"answer", more=False)])
    assert asked(replicas, b'{"a": 1}') == (200, b"answer")
    # What cannot be sent to another process is left out.
    assert replicas.asked == [(scope_of("/v1/models"), b'{"a": 1}')]


def test_another_replica_answers_where_one_dies(ray_errors: None) -> None:
    whole = [start(), piece(b"answer", more=False)]
    assert asked(Replicas([ActorDied()], [start(), ActorDied()], whole)) == (200, b"answer")
    status, body = asked(Replicas([ActorDied()], [ActorDied()], whole), attempts=2)
    assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")


def test_a_stream_goes_on_where_a_replica_dies(ray_errors: None) -> None:
    died = [start(), piece(chunk("one")), piece(chunk(" two")), ActorDied()]
    again = [start(), piece(chunk("one", "b") + chunk(" two", "b")), piece(chunk(" three", "b")), piece(DONE, more=False)]
    expected = chunk("one") + chunk(" two") + chunk(" three") + DONE
    assert asked(Replicas(died, again)) == (200, expected)
    assert asked(Replicas(died, [ActorDied()], again)) == (200, expected)
    assert asked(Replicas(died, [*again[:3], ActorDied()], again)) == (200, expected)


@pytest.mark.parametrize(
    "then", [[start(), piece(chunk("other", "b"))], [start(503), piece(b"{}", more=False)], [BackPressure()], [ActorDied()]]
)
def test_a_stream_that_cannot_go_on_says_so(ray_errors: None, then: list[Any]) -> None:
    status, body = asked(Replicas([start(), piece(chunk("one")), ActorDied()], then, [ActorDied()]))
    assert status == 200
    assert body.startswith(chunk("one") + b'data: {"error":{"message":"')
    assert body.count(b"data: ") == 2


def test_who_may_not_ask_is_refused_before_the_body_is_read(ray_errors: None, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret", encoding="utf-8")
    (tmp_path / "key").chmod(0o600)
    replicas = Replicas()
    status, body = asked(replicas, b"x" * 40_000_000, serve=ServeConfig(api_key_file=tmp_path / "key"))
    assert (status, json.loads(body)["error"]["code"], replicas.asked) == (401, "invalid_api_key", [])


def test_the_router_refuses_by_itself(ray_errors: None) -> None:
    status, body = asked(Replicas([BackPressure()]))
    assert (status, json.loads(body)["error"]["code"]) == (503, "queue_full")
    replicas = Replicas()
    status, body = asked(replicas, b"x" * 2_000_000, serve=ServeConfig(max_body_mb=1))
    assert (status, json.loads(body)["error"]["code"], replicas.asked) == (413, "body_too_large", [])


# --- A replica, without Ray -----------------------------------------------------------------------------------------------


def test_a_replica_answers_as_the_server_does(demo_bundle: Path) -> None:
    async def ask() -> None:
        model = Model.__new__(Model)
        await model.__init__(RayConfig(demo_bundle))  # type: ignore[misc]
        model.check_health()
        body = json.dumps(chat()).encode()
        told = [message async for message in model.answer(scope_of("/v1/chat/completions"), body)]
        assert [message["type"] for message in told] == ["http.response.start", "http.response.body"]
        assert json.loads(told[1]["body"])["choices"][0]["message"]["content"] == "a yellow hexagon"
        told = [message async for message in model.answer(scope_of("/nowhere", "GET"), b"")]
        assert told[0]["status"] == 404
        # One that nobody waits for any more.
        endless = json.dumps(chat(stream=True, max_tokens=1000, ignore_eos=True)).encode()
        answer = model.answer(scope_of("/v1/chat/completions"), endless)
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]
        engine = model._service.engine
        for _ in range(500):
            if not engine.running:
                break
            await asyncio.sleep(0.01)
        assert not engine.running
        model.__del__()
        with pytest.raises(RuntimeError, match="the engine has ended"):
            model.check_health()

    asyncio.run(ask())


# --- A cluster of two replicas --------------------------------------------------------------------------------------------

PORT = 8765
BASE = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    """A Ray of two processors, without a dashboard and reports."""
    from leanvlm.runtime.optional import without_telemetry

    without_telemetry()
    ray = pytest.importorskip("ray")
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20, "log_to_driver": False}
    ray.init(**options, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(ray_cluster: Any, demo_bundle: Path) -> Iterator[str]:
    """The application with two replicas; yields its address."""
    serve = pytest.importorskip("ray.serve")
    run({"bundle": str(demo_bundle), "replicas": "2", "threads": "1", "port": str(PORT)}, blocking=False)
    yield BASE
    serve.shutdown()


def processes(title: str) -> list[int]:
    """Return the processes of Ray with such a title."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title.encode()):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def client() -> Any:
    """A client that does not ask again by itself."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_cluster_answers(cluster: str) -> None:
    openai = pytest.importorskip("openai")
    with client() as asking:
        (model,) = asking.models.list().data
        whole = asking.chat.completions.create(model=model.id, **chat())
        assert whole.choices[0].message.content == "a yellow hexagon"
        pieces = asking.chat.completions.create(model=model.id, **chat(stream=True))
        assert "".join(one.choices[0].delta.content or "" for one in pieces) == "a yellow hexagon"
        with pytest.raises(openai.NotFoundError):
            asking.chat.completions.create(model="another", **chat())
        with pytest.raises(openai.BadRequestError):
            asking.chat.completions.create(model=model.id, messages=[{"role": "user", "content": []}])


class Load:
    """Eight clients, half of whose requests stream; counts what became of each request."""

    def __init__(self, model: str, expected: dict[Path, str]) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._model = model
        self._expected = expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(8)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, number: int) -> None:
        with client() as asking:
            while not self._stop.is_set():
                number += 1
                image, stream = list(self._expected)[number % len(self._expected)], number % 2 == 0
                request = chat(stream, image, max_tokens=64, extra_body={"ignore_eos": True})
                try:
                    reply = asking.chat.completions.create(model=self._model, **request)
                    text = (
                        "".join(one.choices[0].delta.content or "" for one in reply)
                        if stream
                        else reply.choices[0].message.content
                    )
                    outcome = "right" if text == self._expected[image] else "wrong"
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error}"
                self.outcomes["stream" if stream else "whole", outcome] += 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_request_is_lost_with_a_replica(cluster: str, demo_bundle: Path) -> None:
    """`kill -9` of one replica after the other under load: every answer comes, streams included, and is right."""
    from leanvlm.runtime.session import load

    with load(demo_bundle) as session:
        expected = {
            image: session.generate(QUESTION, [image], max_new_tokens=64, ignore_end=True).text
            for image in (SCENE, *PHOTOGRAPHS[:3])
        }
    title = "ray::ServeReplica:leanvlm:Model"
    with Load(demo_bundle.name, expected) as load_:
        for _ in range(3):
            until(lambda: len(processes(title)) == 2)
            time.sleep(3)
            os.kill(processes(title)[0], signal.SIGKILL)
        until(lambda: len(processes(title)) == 2)
        time.sleep(2)
    print(load_.outcomes)
    assert {*load_.outcomes} == {("whole", "right"), ("stream", "right")}
    assert sum(load_.outcomes.values()) > 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_batch_loses_no_row_with_an_actor(ray_cluster: Any, demo_bundle: Path, tmp_path: Path) -> None:
    """`kill -9` of an actor midway; then the rows are those of the local engine."""
    pq = pytest.importorskip("pyarrow.parquet")
    from leanvlm.runtime.batch.run import BatchConfig, run_batch
    from leanvlm.runtime.errors import BackendError

    ray_cluster.init(ignore_reinit_error=True)
    pytest.importorskip("ray.serve").shutdown()
    source = tmp_path / "in.jsonl"
    count = 120
    records = [{"image": str(PHOTOGRAPHS[number % len(PHOTOGRAPHS)]), "number": number} for number in range(count)]
    source.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"image": "missing.png", "number": count}]))
    killed: list[int] = []

    def kill(rows: int, done: int, errors: int) -> None:
        if done >= 20 and not killed:
            killed.append(processes("ray::MapWorker")[0])
            os.kill(killed[0], signal.SIGKILL)

    asked = {"prompt": QUESTION, "part_rows": 4}
    ray_batch = BatchConfig(source, demo_bundle, tmp_path / "ray.parquet", engine="ray", workers=2, threads=1, **asked)
    assert run_batch(ray_batch, kill).errors == 1
    assert killed
    run_batch(BatchConfig(source, demo_bundle, tmp_path / "local.parquet", **asked))
    rows, alone = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("ray", "local"))
    assert [row["number"] for row in rows] == [*range(count + 1)]
    assert [(row["text"], row["error"]) for row in rows] == [(row["text"], row["error"]) for row in alone]
    with pytest.raises(BackendError, match="abacus"):
        run_batch(BatchConfig(source, demo_bundle, tmp_path / "none.parquet", engine="ray", device="abacus", prompt="?"))
    assert not list(tmp_path.glob("none*"))
