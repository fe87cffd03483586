"""What a request can make the server fetch: only pictures of allowed hosts, at addresses that were checked (SECURITY.md)."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

import pytest
import trustme

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.serving import remote
from leanvlm.runtime.serving.remote import RemotePolicy, fetch, is_public, target_of

PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"
PICTURE = b"\x89PNG of a cat"
POLICY = RemotePolicy(("cats.example", "dogs.example", "mixed.example", "inner.example"), max_bytes=1000, seconds=5)
NAMES = {
    "cats.example": [PUBLIC],
    "dogs.example": [OTHER],
    "mixed.example": [PUBLIC, "10.0.0.1"],
    "inner.example": ["169.254.169.254"],
}
Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def reply(body: bytes = PICTURE, status: str = "200 OK", **headers: str) -> bytes:
    lines = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    return "\r\n".join([f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in lines.items()), "", ""]).encode() + body


class World:
    """The Internet of a test: a name server that can change its mind, and one machine that every connection ends at.

    Attributes:
        names: Addresses of each name; a list of lists is answered one after another.
        answers: What the machine answers, by path; or a function that does it.
        resolved: Names that were looked up.
        dialled: (address, port, name that TLS is verified for) of connections.
        requests: Heads that came.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, Any] = dict(NAMES)
        self.answers: Mapping[str, bytes] | Handler = {"/": reply()}
        self.server_tls: ssl.SSLContext | None = None
        self.resolved: list[str] = []
        self.dialled: list[tuple[str, int, str | None]] = []
        self.requests: list[bytes] = []
        self._real = asyncio.open_connection
        monkeypatch.setattr(socket, "getaddrinfo", self._resolve)
        monkeypatch.setattr(asyncio, "open_connection", self._connect)

    def fetch(self, url: str, policy: RemotePolicy = POLICY) -> bytes:
        """Fetch a picture while the machine runs."""

        async def run() -> bytes:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.server_tls)
            self._port = server.sockets[0].getsockname()[1]
            try:
                return await fetch(url, policy)
            finally:
                server.close()
                await server.wait_closed()
                others = asyncio.all_tasks() - {asyncio.current_task()}
                for task in others:
                    task.cancel()
                await asyncio.gather(*others)

        return asyncio.run(run())

    def _resolve(self, host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        self.resolved.append(host)
        found = self.names[host]
        addresses: Sequence[str] = found.pop(0) if isinstance(found[0], list) else found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    async def _connect(self, host: str, port: int, **options: Any) -> Any:
        assert options.pop("flags") == socket.AI_NUMERICHOST
        self.dialled.append((host, port, options.get("server_hostname")))
        return await self._real("127.0.0.1", self._port, **options)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head)
            if callable(self.answers):
                await self.answers(head, writer)
            else:
                writer.write(self.answers[head.split()[1].decode()])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    # A proxy would resolve and connect for us.
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return World(monkeypatch)


def test_a_picture_comes_from_the_checked_address(world: World) -> None:
    world.answers = {"/a?b=%20c": reply()}
    assert world.fetch("http://Cats.Example/a?b=%20c#part") == PICTURE
    assert (world.resolved, world.dialled) == (["cats.example"], [(PUBLIC, 80, None)])
    (head,) = world.requests
    lines = head.decode().split("\r\n")
    assert lines[0] == "GET /a?b=%20c HTTP/1.1"
    assert {line.partition(":")[0].lower() for line in lines[1:] if line} == {
        "host", "accept", "accept-encoding", "connection", "user-agent",
    }  # fmt: skip
    assert "Host: cats.example" in lines


REFUSED = (
    "http://evil.example/", "http://cats.example.evil.example/", "http://xcats.example/", "http://cats.example./",
    "http://localhost/", "http://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "http://10.0.0.1/",
    "http://0/", "http://2130706433/", "http://0x7f000001/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/",
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/",
    "http://[fe80::1%25eth0]/", "http://[::]/", "http://93.184.215.14/",
    "http://user@cats.example/", "http://user:word@cats.example/", "http://cats.example@evil.example/",
    "http://evil.example#@cats.example/", "http://evil.example\\@cats.example/", "http://cats.example:80@evil.example/",
    "http://cats.example:8080/", "http://cats.example:443/", "https://cats.example:80/", "http://cats.example:/",
    "http://cats.example:99999/", "http://cats.example:-1/", "http://cats.example:0/",
    "file:///etc/passwd", "file://cats.example/etc/passwd", "ftp://cats.example/", "gopher://cats.example/", "/etc/passwd",
    "../secret.png", "cats.example/a.png", "//cats.example/a.png", "http:cats.example", "http:/cats.example/", "", "http://",
    "jar:http://cats.example!/", "view-source:http://cats.example/", "http://cats.example/\r\nX-Evil: 1", "http://cats.example\r\n/",
    "http://cats.example/a b", "http://cats.example/\t", "\thttp://cats.example/", "http://cats.example/\x00", "http://ca\u00adts.example/",
    "http://cats\u3002example/", "http://\uff43ats.example/", "http://cats.example/\u00e9", "http://cats.example%2f@evil/",
    "http://cats%2eexample/", "http://cats.example/" + "a" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
def test_other_addresses_are_refused_unasked(world: World, url: str) -> None:
    with pytest.raises(InputError) as error:
        world.fetch(url)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert (world.resolved, world.dialled) == ([], [])


def test_without_an_allow_list_nothing_is_fetched(world: World) -> None:
    with pytest.raises(InputError, match="are not fetched here"):
        world.fetch("http://cats.example/", RemotePolicy())
    assert not world.resolved


@pytest.mark.parametrize("name", ["inner.example", "mixed.example"])
def test_a_name_with_any_private_address_is_refused(world: World, name: str) -> None:
    with pytest.raises(InputError, match="not public"):
        world.fetch(f"http://{name}/")
    assert not world.dialled


def test_a_name_that_changes_its_address_gains_nothing(world: World) -> None:
    """Rebinding: the second look-up would lead inside, so there is none."""
    world.names["cats.example"] = [[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]]
    assert world.fetch("http://cats.example/") == PICTURE
    assert world.dialled == [(PUBLIC, 80, None)]
    assert len(world.resolved) == 1


def test_a_redirect_resolves_and_checks_anew(world: World) -> None:
    world.names["cats.example"] = [[PUBLIC], ["127.0.0.1"]]
    world.answers = {"/": reply(b"", "302 Found", Location="/again")}
    with pytest.raises(InputError, match="not public"):
        world.fetch("http://cats.example/")
    assert world.dialled == [(PUBLIC, 80, None)]


LOCATIONS = (
    "http://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "//127.0.0.1/", "http://[::1]/", "http://evil.example/",
    "http://inner.example/", "http://mixed.example/", "http://cats.example:22/", "file:///etc/passwd", "data:image/png,A",
    "gopher://cats.example/", "http://user@cats.example/", "http://2130706433/", "\\\\127.0.0.1\\x", "http://cats.example/\xff",
)  # fmt: skip


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_redirect_is_checked_like_a_first_address(world: World, location: str) -> None:
    world.answers = {"/": reply(b"", "302 Found").replace(b"\r\n", b"\r\nLocation: " + location.encode("latin-1") + b"\r\n", 1)}
    with pytest.raises(InputError):
        world.fetch("http://cats.example/")
    assert world.dialled == [(PUBLIC, 80, None)]


def test_redirects_to_allowed_hosts_are_followed_so_often(world: World) -> None:
    world.answers = {"/": reply(b"", "301 Moved", Location="//dogs.example/b"), "/b": reply(b"", "307 Again", Location="?c"),
                     "/b?c": reply()}  # fmt: skip
    assert world.fetch("http://cats.example/") == PICTURE
    assert world.dialled == [(PUBLIC, 80, None), (OTHER, 80, None), (OTHER, 80, None)]
    with pytest.raises(InputError, match="more than 1 times"):
        world.fetch("http://cats.example/", RemotePolicy(POLICY.hosts, max_redirects=1))
    world.answers = {"/": reply(b"", "302 Found", Location="/")}
    with pytest.raises(InputError, match="more than 3 times"):
        world.fetch("http://cats.example/")


def test_the_size_is_bounded_whatever_is_stated(world: World) -> None:
    async def endless(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"64\r\n" + bytes(100) + b"\r\n")
            await writer.drain()

    for answer in (reply(bytes(1001)), b"HTTP/1.1 200 OK\r\n\r\n" + bytes(5000), endless):
        world.answers = {"/": answer} if isinstance(answer, bytes) else answer
        with pytest.raises(InputError, match="has more than"):
            world.fetch("http://cats.example/")
    world.answers = {"/": reply(bytes(1000))}
    assert len(world.fetch("http://cats.example/")) == 1000


def test_the_time_is_bounded_as_a_whole(world: World) -> None:
    async def drip(head: bytes, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b"X")
            await writer.drain()
            await asyncio.sleep(0.02)

    async def silence(head: bytes, writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            await asyncio.sleep(0.02)

    async def drip_body(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
        await drip(head, writer)

    async def circle(head: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.15)
        writer.write(reply(b"", "302 Found", Location="/"))

    for handler in (silence, drip_body, circle):
        world.answers = handler
        begin = time.perf_counter()
        with pytest.raises(InputError, match=r"took over 0\.4 s"):
            world.fetch("http://cats.example/", RemotePolicy(POLICY.hosts, seconds=0.4, max_redirects=9))
        assert time.perf_counter() - begin < 2
    world.answers = drip
    with pytest.raises(InputError):
        world.fetch("http://cats.example/", RemotePolicy(POLICY.hosts, seconds=0.4))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply(Content_Encoding="gzip"), "packed"),
        (reply(Content_Encoding="identity, br"), "packed"),
        (reply(status="404 Not Found"), "answered 404"),
        (reply(status="206 Partial Content"), "answered 206"),
        (reply(status="304 Not Modified"), "answered 304"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000, "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 9\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no HTTP"),
        (b"", "no HTTP"),
    ],
    ids=range(12),
)
def test_other_answers_are_refused(world: World, answer: bytes, message: str) -> None:
    world.answers = {"/": answer}
    with pytest.raises(InputError, match=message) as error:
        world.fetch("http://cats.example/")
    assert "SSH" not in str(error.value)  # What a service inside says is not for whoever asks.


def test_a_host_of_ones_own_network_is_named_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a real socket: what is written as an address is connected to."""

    async def run() -> bytes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply())
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(InputError, match="are not fetched here"):
                await fetch(f"http://127.0.0.1:{port}/", RemotePolicy(("127.0.0.1",)))
            data = await fetch(f"http://127.0.0.1:{port}/", RemotePolicy((f"127.0.0.1:{port}",)))
            await asyncio.sleep(0)
            return data

    monkeypatch.setattr(socket, "getaddrinfo", None)
    assert asyncio.run(run()) == PICTURE


def test_nobody_there_is_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with pytest.raises(InputError, match="there was no connection"):
            asyncio.run(fetch(f"http://127.0.0.1:{port}/", RemotePolicy((f"127.0.0.1:{port}",))))


@pytest.mark.parametrize("issued", ["cats.example", "dogs.example", None])
def test_tls_is_verified_for_the_name(world: World, monkeypatch: pytest.MonkeyPatch, issued: str | None) -> None:
    """None: by an authority that nobody trusts."""
    authority, trusted = trustme.CA(), ssl.create_default_context()
    world.server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(issued or "cats.example").configure_cert(world.server_tls)
    if issued is not None:
        authority.configure_trust(trusted)
    monkeypatch.setattr(remote, "_tls", lambda: trusted)
    if issued == "cats.example":
        assert world.fetch("https://cats.example/") == PICTURE
    else:
        with pytest.raises(InputError, match="its certificate cannot be verified"):
            world.fetch("https://cats.example/")
        assert not world.requests
    assert world.dialled == [(PUBLIC, 443, "cats.example")]


def test_the_trust_is_the_system_s() -> None:
    context = remote._tls()
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED


def test_a_redirect_never_takes_tls_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, trusted = trustme.CA(), ssl.create_default_context()
    world.server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("cats.example").configure_cert(world.server_tls)
    authority.configure_trust(trusted)
    monkeypatch.setattr(remote, "_tls", lambda: trusted)
    world.answers = {"/": reply(b"", "302 Found", Location="http://cats.example/")}
    with pytest.raises(InputError, match="from https to http"):
        world.fetch("https://cats.example/")


# Written from the registries of special addresses (RFC 6890 and those that add to it), not from the code.
SPECIAL = (
    "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.255.254", "169.254.169.254", "172.16.0.1",
    "172.31.255.255", "192.0.0.1", "192.0.0.170", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1",
    "203.0.113.1", "224.0.0.1", "224.0.1.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:0:4136:e378::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::",
    "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "ff0e::1",
)  # fmt: skip


@pytest.mark.parametrize("address", SPECIAL)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "172.15.0.1", "172.32.0.1", "100.128.0.1", PUBLIC, OTHER, "2001:4860:4860::8888", "64:ff9b::8.8.8.8"]
)
def test_others_are(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "", "*", "*.example.org", "http://example.org", "example.org/", "a b", "user@example.org", "example.org:",
        "example.org:0", "example.org:65536", "2130706433", "0x7f.1", "127.1",
        "0177.0.0.1", "::1", "[::1", "[zz]", "169.254.169.254", "0.0.0.0",
        "224.0.0.1", "[fe80::1]", "[::ffff:127.0.0.1]", "[::]", "192.0.2.1", "fd00::5", "bücher.example",
    ],
)  # fmt: skip
def test_an_allow_list_names_hosts_only(host: str) -> None:
    with pytest.raises(InputError) as error:
        RemotePolicy((host,))
    assert "\n" not in str(error.value)


def test_an_allow_list_may_name_ports_and_addresses() -> None:
    policy = RemotePolicy(("Example.org:8443", "10.0.0.5", "[FD00::5]:8080", "127.0.0.1", "[::1]:1"))
    urls = ("https://example.ORG:8443/", "http://10.0.0.5/", "http://[fd00:0::5]:8080/", "https://127.0.0.1/", "http://[::1]:1")
    assert [target_of(url, policy).authority for url in urls] == [
        "example.org:8443", "10.0.0.5", "[fd00::5]:8080", "127.0.0.1", "[::1]:1",
    ]  # fmt: skip
    for url in ("https://example.org/", "http://10.0.0.5:81/", "http://[fd00::5]/", "http://[::ffff:10.0.0.5]/"):
        with pytest.raises(InputError):
            target_of(url, policy)
