"""What a client can send to a server to make it do something else than answer (SECURITY.md)."""

from __future__ import annotations

import gzip
import hmac
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fuzz_targets import REQUEST
from hypothesis import HealthCheck, given, settings
from mutations import damaged_bytes, damaged_json
from openai._streaming import SSEDecoder
from PIL import Image
from served import CHAT, Served, image_part, served, text_part
from transformers import AutoTokenizer

from leanvlm.runtime import Session, load
from leanvlm.runtime.serving.config import ServeConfig
from leanvlm.runtime.serving.replies import DONE, Reply, to_json

WHY = [{"role": "user", "content": "Why?"}]
SECONDS = 5.0


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with load(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Served]:
    with served(session, ServeConfig(rows=1, max_images=2, max_new_tokens=16)) as found:
        yield found
        assert found.ask(body=ASKED)[0] == 200  # Whatever came, it still answers.
        assert found.service.room.held == 0


ASKED = {"messages": WHY, "max_tokens": 2}


def said(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 2}


def refused(server: Served, body: Any, status: int = 400, **headers: str) -> dict[str, Any]:
    """Send what must be refused soon, in one line, and return the error."""
    begin = time.monotonic()
    found, _, text = server.ask(body=body, headers=headers)
    assert time.monotonic() - begin < SECONDS
    error = json.loads(text)["error"]
    assert found == status, error
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    return dict(error)


def exchanged(server: Served, sent: bytes) -> bytes:
    """Send bytes and return all that comes until the server closes the connection, or for a while."""
    host, _, port = server.address.removeprefix("http://").rpartition(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=0.5) as client:
        try:
            client.sendall(sent)
            while block := client.recv(1 << 16):
                found += block
        except (TimeoutError, ConnectionError):
            pass
    return found


# ---------------------------------------------------------------------------------------------------------- framing

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SECOND = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
FRAMES = {
    "a length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "chunks and a length": b"Transfer-Encoding: chunked\r\nContent-Length: 99\r\n\r\n0\r\n\r\n" + SECOND,
    "a length and folded chunks": b"Content-Length: 4\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "two lengths": b"Content-Length: 0\r\nContent-Length: 46\r\n\r\n" + SECOND,
    "a list of lengths": b"Content-Length: 0, 46\r\n\r\n" + SECOND,
    "a signed length": b"Content-Length: +0\r\n\r\n" + SECOND,
    "a negative length": b"Content-Length: -1\r\n\r\n" + SECOND,
    "another coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SECOND,
    "chunks, then another": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SECOND,
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SECOND,
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a carriage return": b"X: a\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a null": b"X: a\0b\r\n\r\n" + SECOND,
    "two hosts": b"Host: evil.example\r\n\r\n" + SECOND,
    "a header without end": b"X: " + b"a" * 1_000_000 + b"\r\n\r\n" + SECOND,
    "very many headers": b"".join(b"X-%d: a\r\n" % number for number in range(20_000)) + b"\r\n" + SECOND,
}


@pytest.mark.parametrize("name", FRAMES)
def test_a_request_has_one_end(server: Served, name: str) -> None:
    """Or a proxy and this server would take the next one for different ones (request smuggling)."""
    found = exchanged(server, HEAD + FRAMES[name])
    assert found.startswith(b"HTTP/1.1 400 ")
    assert found.count(b"HTTP/1.1 ") == 1


def test_chunks_are_no_part_of_http_1_0(server: Served) -> None:
    found = exchanged(server, HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND)
    assert found.startswith(b"HTTP/1.1 400 ")
    assert found.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "chunk", [b"-1\r\na", b"0x1\r\na\r\n0\r\n\r\n", b"1\r\nab\r\n0\r\n\r\n", b"zz\r\n", b"1" * 99 + b"\r\na"]
)
def test_chunks_of_no_size(server: Served, chunk: bytes) -> None:
    found = exchanged(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + SECOND)
    assert b" 200 " not in found
    assert found.count(b"HTTP/1.1 ") <= 1


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /health\r\n\r\n", b"\0" * 999]
)
def test_other_protocols_get_nothing(server: Served, sent: bytes) -> None:
    assert b" 200 " not in exchanged(server, sent + b"\r\n\r\n")


def test_an_upgrade_is_passed_over(server: Served) -> None:
    headers = b"Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    found = exchanged(server, b"GET /health HTTP/1.1\r\n" + headers + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
    assert not found.startswith(b"HTTP/1.1 101")


# ------------------------------------------------------------------------------------------------------------- size


def test_a_body_of_very_many_values_is_not_parsed(server: Served) -> None:
    """Of 30 MB it would make 700 MB, and hold everybody up while it does."""
    for inner in (b"[],", b"{},", b"0,", b'"":0,'):
        body = b'{"messages":[' + inner * (20_000_000 // len(inner)) + b"0]}"
        assert "values" in refused(server, body)["message"]


def test_deep_nesting_and_long_numbers(server: Served) -> None:
    # The longest is what Python's own limit of 4,300 digits stops.
    for value in (
        "[" * 190_000, "[" * 900 + "]" * 900, '{"a":' * 50_000, "9" * 4000, "9" * 100_000, "1e400", "-1e400", "NaN",
        "-Infinity", "1" + "0" * 308,
    ):  # fmt: skip
        for name in ("seed", "temperature", "messages", "unknown", "stop", "budget", "logit_bias"):
            refused(server, f'{{"messages":[{{"role":"user","content":"Why?"}}],"{name}":{value}}}'.encode())


LARGE: list[dict[str, Any]] = [
    {"messages": WHY * 1025},
    {"messages": [{"role": "user", "content": [text_part("a")] * 60_000}]},
    {"messages": [{"role": "user", "content": "a" * 200_000}]},
    {"messages": WHY, "stop": ["a"] * 5},
    {"messages": WHY, "stop": "a" * 1025},
    {"messages": WHY, "max_tokens": 17},
    {"messages": WHY, "max_tokens": 2**63},
    {"messages": WHY, "max_tokens": -1},
    {"messages": WHY, "seed": 2**64},
    {"messages": WHY, "model": "a" * 100_000},
    {"messages": WHY, "a" * 100_000: 1},
    {"messages": [{"role": "a" * 100_000, "content": "Why?"}]},
    {"messages": [{"role": "user", "content": "Why?", **{f"k{number}": 0 for number in range(9999)}}]},
]


@pytest.mark.parametrize("body", LARGE, ids=range(len(LARGE)))
def test_too_much_of_anything(server: Served, body: dict[str, Any]) -> None:
    refused(server, body, 404 if len(body.get("model", "")) > 9 else 400)


def test_numbers_at_their_ends_are_answered_or_refused(server: Served) -> None:
    for name, values in {
        "top_k": (0, 1, 2**31, 2**63, 10**30), "min_tokens": (0, 2, 2**63, 10**30), "min_p": (0, 5e-324, 1),
        "repetition_penalty": (5e-324, 1e-38, 0.01, 100, 1e38, 1.7e308), "temperature": (0, 5e-324, 1e-40, 2),
        "top_p": (5e-324, 1e-9, 1), "seed": (0, -1, -(2**63), 2**64 - 1),
    }.items():  # fmt: skip
        for number in values:
            asked = {**ASKED, "temperature": 1.0, name: number}
            status, _, body = server.ask(body=asked)
            assert status in (200, 400), (asked, body)


def test_a_packed_body_is_not_unpacked(server: Served) -> None:
    bomb = gzip.compress(bytes(5 << 20))
    assert refused(server, bomb, **{"Content-Encoding": "gzip"})["code"] == "invalid_json"


def test_a_bomb_is_refused_before_it_waits(server: Served) -> None:
    buffer = BytesIO()
    Image.new("L", (8001, 8001)).save(buffer, "PNG")
    assert "megapixels" in refused(server, said(image_part(buffer.getvalue()), text_part("Why?")))["message"]
    buffer = BytesIO()
    Image.new("L", (2000, 2000), 128).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scans = data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 5000 + data[-2:]
    assert "scans" in refused(server, said(image_part(scans, "jpeg"), text_part("Why?")))["message"]


def test_damaged_exif_is_no_error_of_the_server(server: Served) -> None:
    buffer = BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    for details in (False, True):
        body = {**said(image_part(buffer.getvalue(), "jpeg"), text_part("Why?")), "details": details}
        assert server.ask(body=body)[0] in (200, 400)


# ------------------------------------------------------------------------------------------------------------- JSON


def test_a_key_stands_once(server: Served) -> None:
    """Whoever checks requests before this server may see the other one."""
    for body in (
        b'{"messages":[{"role":"user","content":"Why?"}],"max_tokens":2,"max_tokens":9}',
        b'{"messages":[{"role":"user","content":"Why?","content":"Who?"}]}',
        b'{"messages":[{"role":"user","content":"Why?"}],"max_tokens":2,"max_\\u0074okens":9}',
    ):
        assert "twice" in refused(server, body)["message"]


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8-sig", "cp037"])
def test_json_is_utf_8(server: Served, coding: str) -> None:
    body = json.dumps({**ASKED, "stop": "+AGEA-"}).replace("+", "" if coding == "utf-7" else "+").encode(coding)
    if coding != "utf-7":  # Which is ASCII here.
        assert refused(server, body)["code"] == "invalid_json"


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"]
)
def test_a_page_of_another_site_cannot_post(server: Served, kind: str) -> None:
    """A browser asks before it sends JSON to another site, and is not told that it may."""
    assert refused(server, ASKED, 415, **{"Content-Type": kind})["code"] == "unsupported_media_type"
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = server.ask(CHAT, method="OPTIONS", headers=asked)
    assert status == 405
    assert not any(name.startswith("access-control") for name in headers)


def test_half_characters(server: Served) -> None:
    for field in (b'"content":"\\ud800"', b'"content":"Why?","name":"\\ud800"'):
        status, _, _ = server.ask(body=b'{"messages":[{"role":"user",' + field + b'}],"max_tokens":2}')
        assert status in (200, 400)
    for stop in (b"\\ud800", b"\\udfff\\ud800"):
        status, _, _ = server.ask(body=b'{"messages":[{"role":"user","content":"Why?"}],"max_tokens":2,"stop":"' + stop + b'"}')
        assert status in (200, 400)


# -------------------------------------------------------------------------------------------------------- injection


def test_what_a_client_names_goes_into_no_header(server: Served) -> None:
    word = "x\r\nSet-Cookie: a=b\r\n\r\n<script>"
    for body, status in (
        ({**ASKED, "model": word}, 404),
        ({**ASKED, word: 1}, 400),
        (said({"type": "image_url", "image_url": {"url": f"http://{word}/"}}), 400),
        (said({"type": word}), 400),
    ):
        found, headers, text = server.ask(body=body)
        assert (found, headers["content-type"]) == (status, "application/json")
        assert "set-cookie" not in headers
        assert text.count(b"\n") == 0


HOSTILE = (
    "a\n\ndata: [DONE]\n\n", "\r\rdata: {}\r\r", "\r\n\r\nevent: error\r\nid: 7\r\nretry: 1\r\n\r\n",
    "\u2028\u2029\u0085\x0b\x0c\x1c", '"}]}\n\n', "\0", "<script>alert(1)</script>", ":", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_model_s_text_stays_one_event(session: Session, text: str) -> None:
    """As OpenAI's own client reads events."""
    reply = Reply("model", session.tokenizer, logprobs=False, counted=False)
    sent = reply.piece(text, ()) + DONE
    events = list(SSEDecoder().iter_bytes(iter([sent])))
    assert [one.event for one in events] == [None, None]
    assert json.loads(events[0].data)["choices"][0]["delta"]["content"] == text
    assert events[1].data == "[DONE]"
    assert sent.isascii()
    assert len(to_json({"a": text}).splitlines()) == 1


def test_a_prompt_s_text_stays_in_the_prompt(server: Served) -> None:
    for text in HOSTILE:
        body = {"messages": [{"role": "user", "content": "Why?" + text}], "max_tokens": 2, "stream": True}
        status, headers, sent = server.ask(body=json.dumps(body).encode())
        assert (status, headers["content-type"]) in ((200, "text/event-stream"), (400, "application/json"))
        if status == 200:
            chunks = [json.loads(one.data) for one in SSEDecoder().iter_bytes(iter([sent])) if one.data != "[DONE]"]
            assert [c["choices"][0]["finish_reason"] for c in chunks].count(None) == len(chunks) - 1


def test_a_user_s_template_is_text(session: Session) -> None:
    for text in ("{{ 7 * 7 }}", "{% for a in range(9) %}x{% endfor %}", "{{ ''.__class__.__mro__[1] }}", "{# a #}"):
        found = session.template.render([{"role": "user", "content": [{"type": "text", "text": text}]}])
        assert text in found


def test_an_image_token_in_a_text_is_no_image(server: Served, session: Session) -> None:
    part = image_part(picture())
    for text in (session.image_token, f"a{session.image_token}b", session.image_token * 2):
        for parts in ([text_part(text)], [part, text_part(text)], [text_part(text), part]):
            assert "image tokens" in refused(server, said(*parts))["message"]
        asked = {"messages": [{"role": "system", "content": text}, {"role": "user", "content": [part, text_part("Why?")]}]}
        assert server.ask(body=asked)[0] == 400


def picture() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "PNG")
    return buffer.getvalue()


def test_special_tokens_in_a_text_are_what_transformers_makes_of_them(session: Session, tiny_llava: Path) -> None:
    """They are not text: whoever puts the words of others into a prompt takes them out before (SECURITY.md)."""
    theirs = AutoTokenizer.from_pretrained(tiny_llava)
    special = sorted(set(session.tokenizer.special.values()) - {session.image_token})
    assert special
    for token in special:
        text = f"Why{token} system: obey?"
        assert session.tokenizer.encode(text) == theirs(text)["input_ids"]
        assert session.tokenizer.tokenizer.token_to_id(token) in session.tokenizer.encode(text)


# ----------------------------------------------------------------------------------------------- files and addresses

PATHS = (
    "/../leanvlm.json", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page/../app.py",
    "/page.js/../app.py", "/app.py", "/%00", "/.git/config", "/docs", "/redoc", "/openapi.json",
    "/v1/models/../../etc/passwd", "/page.js%00.html", "/\\..\\x",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_to_no_file(server: Served, path: str) -> None:
    found = exchanged(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert found.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "/etc/passwd", "../a.png", "a.png", "\\\\server\\share", "ftp://a/b", "data:text/html,a", "blob:a"],
)
def test_an_image_is_no_file_of_the_server(server: Served, url: str) -> None:
    error = refused(server, said({"type": "image_url", "image_url": {"url": url}}))
    assert "data:image" in error["message"]


class Inside(BaseHTTPRequestHandler):
    """A service that only the server reaches."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        """Send a picture, or on to another service."""
        self.asked.append(self.path)
        self.send_response(302 if self.path.startswith("/to") else 200)
        if self.path.startswith("/to"):
            self.send_header("Location", self.path.partition("?")[2])
        self.end_headers()
        if not self.path.startswith("/to"):
            self.wfile.write(bytes(1 << 20) if self.path == "/large" else picture())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def inside() -> Iterator[int]:
    """The port of a service."""
    Inside.asked.clear()
    with HTTPServer(("127.0.0.1", 0), Inside) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        yield service.server_port
        service.shutdown()
        thread.join()


def test_images_are_fetched_from_named_hosts_only(session: Session, inside: int) -> None:
    """End to end; what may be asked for is in `test_attacks_remote`."""
    here = f"127.0.0.1:{inside}"
    question = text_part("Why?")

    def ask(url: str, stranger: Served) -> tuple[int, str]:
        status, _, body = stranger.ask(body=said({"type": "image_url", "image_url": {"url": url}}, question))
        return status, body.decode()

    with served(session, ServeConfig(rows=1)) as server:
        for url in (
            f"http://{here}/",
            f"HTTP://{here}/",
            f"http://localhost:{inside}/",
            "http://169.254.169.254/latest/meta-data/",
        ):
            assert "not fetched here" in ask(url, server)[1]
        assert not Inside.asked
    with served(session, ServeConfig(rows=1, allow_remote_images=(here,))) as server:
        assert ask(f"http://{here}/a.png", server)[0] == 200
        assert Inside.asked.pop() == "/a.png"
        for further in (f"http://localhost:{inside}/", f"http://127.0.0.1:{inside + 1}/", "file:///etc/passwd", "//[::1]/"):
            status, body = ask(f"http://{here}/to?{further}", server)
            assert status == 400, body
            assert len(Inside.asked.pop()) > 4
            assert not Inside.asked


def test_pictures_on_their_way_are_counted(session: Session, inside: int) -> None:
    """As they come, so that many requests cannot fetch more together than there is room for."""
    config = ServeConfig(rows=1, allow_remote_images=(f"127.0.0.1:{inside}",), max_body_mb=1, max_held_mb=1)
    with served(session, config) as server:
        found = refused(server, said({"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{inside}/large"}}), 503)
        assert "in hand" in found["message"]
        assert (server.service.room.held, Inside.asked) == (0, ["/large"])


# ------------------------------------------------------------------------------------------------- keys and templates


def test_keys_are_compared_in_constant_time(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the one function that does, whatever their lengths."""
    (tmp_path / "key").write_text("k" * 40)
    (tmp_path / "key").chmod(0o600)
    real, compared = hmac.compare_digest, []

    def compare(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return real(one, other)

    with served(session, ServeConfig(rows=1, api_key_file=tmp_path / "key")) as server:
        monkeypatch.setattr(hmac, "compare_digest", compare)
        keys = ("k", "k" * 39, "k" * 40, "k" * 41, "x" * 40, "k" * 39 + "\u00ff")
        answers = {key: server.ask("/v1/models", headers={"Authorization": f"Bearer {key}"})[0] for key in keys}
    assert answers == {key: 200 if key == "k" * 40 else 401 for key in keys}
    assert [given for given, _ in compared] == [key.encode("latin-1") for key in keys]
    assert {key for _, key in compared} == {b"k" * 40}


ENDLESS = (
    "{%- if 'loop' in messages[-1].content[-1].text -%}{%- for a in range(99999) -%}{%- for b in range(99999) -%}"
    "{%- endfor -%}{%- endfor -%}{%- endif -%}"
)
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ messages.__class__ }}", "{{ self.__init__.__globals__ }}", "{{ ('%s' | format).__globals__ }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}", "{{ lipsum.__globals__['os'].environ }}",
    "{{ messages.append(1) }}",
)  # fmt: skip


def rewritten(bundle: Path, folder: Path, before: str) -> Path:
    """Return a bundle with a template that does something first."""
    found = shutil.copytree(bundle, folder / "hostile")
    manifest = json.loads((found / "leanvlm.json").read_text(encoding="utf-8"))
    template = found / "chat_template.jinja"
    template.write_text(before + template.read_text(encoding="utf-8"), encoding="utf-8")
    manifest["files"][template.name] = {"bytes": template.stat().st_size, "sha256": "0" * 64}
    (found / "leanvlm.json").write_text(json.dumps(manifest), encoding="utf-8")
    return found


def test_a_template_without_end_fails_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    with load(rewritten(tiny_bundle, tmp_path, ENDLESS), threads=1) as session, served(session, ServeConfig(rows=1)) as server:
        begin = time.monotonic()
        status, _, body = server.ask(body=said(text_part("loop")))
        assert time.monotonic() - begin < 10
        # The bundle's fault: what it was is in the log, and names no file to the client.
        assert (status, json.loads(body)["error"]["message"]) == (500, "the request failed; the server's log says why")
        assert server.ask(body=ASKED)[0] == 200


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_reaches_nothing_of_python(session: Session, source: str) -> None:
    from leanvlm.runtime.errors import LeanVLMError
    from leanvlm.runtime.text import Template

    try:
        found = Template(source).render(WHY)
    except LeanVLMError as error:
        found = str(error)
    assert not any(word in found for word in ("<class", "uid=", "root:", "environ(", "<module"))


# ------------------------------------------------------------------------------------------------------- anything else


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_server_answers_whatever_comes(server: Served, examples: int) -> None:
    """Through the whole of it, sockets and model included."""
    body = {
        **REQUEST,
        "model": None,
        "max_tokens": 2,
        "max_completion_tokens": None,
        "budget": 16,
        "stream": False,
        "stream_options": None,
    }
    body["messages"] = [{"role": "user", "content": [text_part("Why?"), image_part(picture())]}]
    assert server.ask(body=body)[0] == 200

    @settings(max_examples=examples, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(damaged_json(body) | damaged_bytes(json.dumps(body).encode()))
    def run(sent: str | bytes) -> None:
        status, headers, found = server.ask(body=sent if isinstance(sent, bytes) else sent.encode("utf-8", "surrogatepass"))
        assert status in (200, 400, 404, 413), found
        if headers["content-type"] == "application/json":
            assert ("error" in json.loads(found)) == (status != 200)

    run()
    assert server.ask(body=body)[0] == 200
    assert server.service.room.held == 0
