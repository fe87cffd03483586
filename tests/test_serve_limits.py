"""What a server refuses: requests that cannot be answered as they are, strangers, and clients that take too long."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from served import CHAT, Gated, Served, image_part, served, text_part, until

from leanvlm.runtime import Session, load
from leanvlm.runtime.errors import InputError, LeanVLMWarning, QueueFullError
from leanvlm.runtime.serving import server as serving
from leanvlm.runtime.serving.access import read_key
from leanvlm.runtime.serving.app import CONTENT_POLICY
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.exchange import Hold
from leanvlm.runtime.serving.service import Room, page_files

WHY = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Served]:
    config = ServeConfig(rows=1, max_body_mb=0.1, max_images=2, max_pixels=10_000, max_new_tokens=64, max_prompt_tokens=80)
    with served(session, config) as found:
        yield found


def picture(width: int = 40, height: int = 30) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), (90, 30, 10)).save(file, "PNG")
    return file.getvalue()


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


PART = image_part(picture())
ADDRESS = {"type": "image_url", "image_url": {"url": "https://images.example.org/a.png"}}
FIELD = "messages[0].content[0].image_url"
WRONG: list[tuple[Any, str | None, str]] = [
    ({}, "messages", "messages: Field required"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "Why?"}, "messages", "valid list"),
    ({"messages": [{"role": "tool", "content": "Why?"}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "Field required"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "is empty"),
    ({"messages": [{"role": "user", "content": "Why?", "tool_calls": [{}]}]}, "messages[0].tool_calls", "at most 0 items"),
    (said({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}), FIELD, "valid dictionary"),
    (said({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type", "'text' or 'image_url'"),
    (said({"type": "text"}), "messages[0].content[0]", "a part of type text has the field text"),
    (said(PART, role="assistant"), "messages[0].content", "images go with messages of the user"),
    (said(PART, PART, PART, text_part("Why?")), "messages", "3 images; this server takes 2"),
    (said({"type": "image_url", "image_url": {"url": "/etc/passwd"}}), FIELD, "data:image"),
    (said({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), FIELD, "data:image"),
    (said(ADDRESS), FIELD, "not fetched here"),
    (said(image_part(b"no picture")), "messages", "not an image in a format"),
    (said(image_part(picture(200, 60))), "messages", "more than 0.01 megapixels"),
    (said(text_part("<image>")), None, "image tokens"),
    (said(text_part("word " * 90)), None, "at most 80 are read"),
    (said(text_part("word " * 2000)), "messages", "characters; at most 2560 are read"),
    ({"messages": WHY, "temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"messages": WHY, "temperature": "1"}, "temperature", "valid number"),
    ({"messages": WHY, "top_p": -0.1}, "top_p", "greater than or equal to 0"),
    ({"messages": WHY, "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"messages": WHY, "max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"messages": WHY, "max_tokens": True}, "max_tokens", "valid integer"),
    ({"messages": WHY, "max_completion_tokens": 65}, "max_completion_tokens", "more than this server gives, 64"),
    ({"messages": WHY, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    ({"messages": WHY, "stop": ["a"] * 5}, "stop", "at most 4 items"),
    ({"messages": WHY, "stop": ""}, "stop[0]", "at least 1 character"),
    ({"messages": WHY, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    ({"messages": WHY, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"messages": WHY, "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"messages": WHY, "budget": 7}, "budget", "budget 7 is not in this bundle; it holds 16, 121"),
    ({"messages": WHY, "n": 2}, "n", "n is not supported: leave it out, or give 1"),
    ({"messages": WHY, "tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"messages": WHY, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"messages": WHY, "logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"messages": WHY, "presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"messages": WHY, "audio": {}}, "audio", "leave it out"),
    ({"messages": WHY, "max_token": 5}, "max_token", "'max_token' is not known here"),
    ([], None, "not a JSON object"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_request_names_its_field(server: Served, body: Any, param: str | None, words: str) -> None:
    status, headers, found = server.ask(body=body)
    error = json.loads(found)["error"]
    assert (status, headers["content-type"]) == (400, "application/json")
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize("body", [b"", b"{", b'{"messages": [], "seed": NaN}', b"\xff", b"[" * 50_000, b"1" * 5000])
def test_what_is_no_json(server: Served, body: bytes) -> None:
    status, _, found = server.ask(body=body)
    assert status == 400
    assert json.loads(found)["error"]["code"] == "invalid_json"


def test_what_changes_no_answer_is_passed_over(server: Served) -> None:
    harmless = {
        "user": "me", "store": True, "metadata": {"a": "b"}, "parallel_tool_calls": True, "n": 1, "tools": [], "logit_bias": {},
        "frequency_penalty": 0.0, "response_format": {"type": "text"}, "tool_choice": "none", "seed": None, "stop": None,
        "service_tier": "auto",
    }  # fmt: skip
    message = {"role": "developer", "content": "Be short.", "name": "me"}
    plain = server.ask(body={"messages": [{"role": "system", "content": "Be short."}, *WHY], "max_tokens": 3})
    more = server.ask(body={"messages": [message, *WHY], "max_tokens": 3, "ignore_eos": False, **harmless})
    assert plain[0] == more[0] == 200
    texts = [json.loads(body)["choices"][0]["message"]["content"] for _, _, body in (plain, more)]
    assert texts[0] == texts[1]


def test_errors_have_one_shape(server: Served) -> None:
    for status, path, method, body in (
        (404, "/v2", None, None),
        (404, "/page.py", None, None),
        (404, "/..%2fapp.py", None, None),
        (405, "/v1/models", "PUT", None),
        (404, CHAT, None, {"messages": WHY, "model": "gpt-4o"}),
    ):
        found = server.ask(path, body, method=method)
        assert found[0] == status
        assert set(json.loads(found[2])["error"]) == {"message", "type", "param", "code"}
    assert json.loads(found[2])["error"]["code"] == "model_not_found"
    other = server.ask(CHAT, {"messages": WHY}, {"Content-Type": "text/plain"})
    assert other[0] == 415


def test_a_body_that_is_too_large(server: Served) -> None:
    large = json.dumps({"messages": [{"role": "user", "content": "a" * 200_000}]}).encode()
    status, headers, found = server.ask(body=large)
    assert (status, headers["connection"]) == (413, "close")
    assert json.loads(found)["error"]["code"] == "body_too_large"
    connection = server.connect()
    # In chunks, so that nothing says how long it is.
    pieces = (large[at : at + 1000] for at in range(0, len(large), 1000))
    connection.request("POST", CHAT, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.service.room.held == 0


def test_requests_hold_no_more_than_there_is_room_for() -> None:
    room = Room(3 << 20)
    with Hold(room) as one, Hold(room) as two:
        one.take(2 << 20)
        two.take(1 << 20)
        with pytest.raises(QueueFullError, match="the requests in hand take 3 MB already"):
            two.take(1)
    assert room.held == 0


def test_what_a_request_holds_is_given_back(session: Session) -> None:
    runner = Gated(session)
    with served(session, ServeConfig(rows=1), runner) as server:
        runner.gate.clear()
        connection = server.connect()
        body = json.dumps({**said(PART, text_part("Why?")), "stream": True})
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        until(lambda: server.metric("leanvlm_running") == 1)
        assert server.service.room.held == len(body)
        runner.gate.set()
        connection.getresponse().read()
        connection.close()
        until(lambda: server.service.room.held == 0)


def test_a_key(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret-word\n")
    file.chmod(0o600)
    with served(session, ServeConfig(rows=1, api_key_file=file)) as server:
        for given in (None, "s3cret-word", "Bearer ", "Bearer s3cret-wore", "Bearer s3cret-words", "Basic s3cret-word"):
            for path in ("/v1/models", "/metrics", CHAT, "/nothing"):
                status, headers, body = server.ask(path, headers={"Authorization": given} if given else {})
                assert (status, headers["www-authenticate"]) == (401, "Bearer")
                assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert server.ask("/v1/models", headers={"Authorization": "Bearer s3cret-word"})[0] == 200
        assert server.ask("/health")[0] == server.ask("/health/ready")[0] == 200
        with server.client("s3cret-word") as client:
            assert [model.id for model in client.models.list().data] == [server.service.name]
            assert client.chat.completions.create(model=server.service.name, messages=WHY, max_tokens=2).choices  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"two words", "holds no key"), (b"k" * 5000, "holds no key")],
)
def test_files_that_hold_no_key(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_key(tmp_path / "key")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_key(tmp_path / "none")


def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("word")
    file.chmod(0o644)
    with pytest.warns(LeanVLMWarning, match="can be read by others: chmod 600"):
        assert read_key(file) == b"word"
    file.chmod(0o600)
    assert read_key(file) == b"word"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_a_name_that_is_not_this_machine_s(server: Served, host: str) -> None:
    """A page of another site can let its own name point here."""
    status, _, body = server.ask("/v1/models", headers={"Host": host})
    assert status == 403
    assert json.loads(body)["error"]["code"] == "host_not_allowed"
    port = server.address.rpartition(":")[2]
    assert {server.ask("/health", headers={"Host": name})[0] for name in ("localhost", f"[::1]:{port}", "LOCALHOST:1")} == {200}


def test_the_page_is_from_here_alone(server: Served) -> None:
    files = page_files()
    for path, (content, kind) in files.items():
        status, headers, body = server.ask(path)
        assert (status, headers["content-type"], headers["content-security-policy"]) == (200, kind, CONTENT_POLICY)
        assert (body, headers["x-content-type-options"]) == (content, "nosniff")
    assert not {name.lower() for name in server.ask("/health")[1]} & {"access-control-allow-origin", "server"}
    assert not files or server.ask("/")[0] == 200


def raw(server: Served) -> socket.socket:
    host, _, port = server.address.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def rest(client: socket.socket) -> bytes:
    """Return what still comes until the server closes the connection."""
    found = b""
    with suppress(ConnectionResetError):
        while block := client.recv(1 << 16):
            found += block
    return found


def closed(client: socket.socket) -> bool:
    """Whether the server ends the connection, and says nothing."""
    return rest(client) == b""


def test_a_body_that_trickles(session: Session) -> None:
    with served(session, ServeConfig(rows=1, body_seconds=0.3)) as server, raw(server) as client:
        client.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n".encode()
        )
        begin = time.monotonic()
        found = rest(client)
        assert found.startswith(b"HTTP/1.1 408 ")
        assert b"body_timeout" in found
        assert 0.2 < time.monotonic() - begin < 10


def test_headers_that_trickle(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_SECONDS", 1.0)
    with served(session, ServeConfig(rows=1)) as server:
        with raw(server) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            assert closed(client)
        with raw(server) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            found = b""
            while not found.endswith(b'{"status":"ok"}'):
                piece = client.recv(4096)
                assert piece, found
                found += piece
            # The second one on a connection, too.
            client.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            assert closed(client)


def test_an_answer_that_nobody_reads(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "STALL_SECONDS", 0.3)
    bound = serving.bind("127.0.0.1", 0)
    # Connections inherit it, so that little is enough.
    bound[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    monkeypatch.setattr("served.bind", lambda host, port: bound)
    with served(session, ServeConfig(rows=1)) as server, raw(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked = {"messages": WHY, "stream": True, "ignore_eos": True, "max_tokens": 400, "logprobs": True, "top_logprobs": 20}
        body = json.dumps(asked).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        # All of it may have been generated by then.
        ends = [f'leanvlm_answers_total{{outcome="{outcome}"}}' for outcome in ("cancelled", "length")]
        until(lambda: sum(map(server.metric, ends)) == 1 and server.service.room.held == 0)
        assert b"[DONE]" not in rest(client)


def test_too_many_connections(session: Session) -> None:
    with served(session, ServeConfig(rows=1, max_connections=2)) as server:
        clients = [raw(server) for _ in range(3)]
        assert closed(clients[2])
        clients[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert clients[0].recv(4096).startswith(b"HTTP/1.1 200 ")
        for client in clients:
            client.close()


def test_time_for_a_request(session: Session) -> None:
    runner = Gated(session)
    with served(session, ServeConfig(rows=1, max_seconds=0.2), runner) as server:
        runner.gate.clear()
        connections = [server.connect() for _ in range(2)]
        for stream, connection in zip((True, False), connections, strict=True):
            body = json.dumps({"messages": WHY, "max_tokens": 50, "ignore_eos": True, "stream": stream})
            connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
            until(lambda: server.metric("leanvlm_running") == 1)
        time.sleep(0.3)
        runner.gate.set()
        *_, last, end = connections[0].getresponse().read().decode().split("\n\n")
        # An error in the midst of a stream, and its end.
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "time_limit"
        assert end == ""
        response = connections[1].getresponse()
        assert response.status == 504
        assert json.loads(response.read())["error"]["code"] == "time_limit"
        for connection in connections:
            connection.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"port": 70000}, "port 70000"),
        ({"max_queue": 0}, "max_queue 0"),
        ({"max_seconds": float("nan")}, "max_seconds nan"),
        ({"max_pixels": 10**9}, "max_pixels"),
        ({"max_held_mb": 1}, "less than one request may have"),
        ({"rows": 0}, "rows 0"),
    ],
)
def test_settings_that_are_not_possible(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ServeConfig(**options)


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert ServeConfig(host=host).loopback == loopback


def test_images_as_data_are_decoded_once(server: Served) -> None:
    """In a body over the size from which parsing goes to a thread."""
    file = picture(99, 99) + bytes(60_000)
    assert len(base64.b64encode(file)) < server.service.config.body_bytes
    assert server.ask(body={**said(image_part(file), text_part("Why?")), "max_tokens": 2})[0] == 200
