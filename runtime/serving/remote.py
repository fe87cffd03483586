"""Pictures that a request names by address: fetched from hosts that the operator allowed, at addresses that were checked.

Whoever has a server fetch something borrows its place in the network (server-side request forgery, CWE-918). So a name is
resolved once, all its addresses must be public, and the connection is made to one of these and not to the name again; TLS is
verified for the name. A redirect is checked like a first address. Nothing is sent along that would identify anybody.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urljoin

import h11

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.records import shorten

Address = IPv4Address | IPv6Address
PORTS = {"http": 80, "https": 443}
MAX_URL = 4096
"""Characters of an address; signed ones of object stores take up to 2,000."""
BLOCK = 1 << 16
REDIRECTS = (301, 302, 303, 307, 308)

# Neither user and password nor anything else that parsers read differently; a fragment is for browsers.
_URL = re.compile(
    r"(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?([/?][!-\"$-\[\]-~]*)?(?:#[!-~]*)?", re.IGNORECASE
)
_ENTRY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
# The C library takes such a name for an address, in octal or hexadecimal or as one number.
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")

# What Python's `is_global` passes, or did before the fix of CVE-2024-4032: protocol assignments, relays from IPv6.
_RESERVED_4 = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"))
_UNICAST_6 = IPv6Network("2000::/3")
# Within that: Teredo and other tunnels, documentation, 6to4. IPv4-mapped addresses are outside.
_RESERVED_6 = (IPv6Network("2001::/23"), IPv6Network("2001:db8::/32"), IPv6Network("2002::/16"), IPv6Network("3fff::/20"))
_NAT64 = IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Place:
    """A host that may be asked.

    Attributes:
        host: A name in lower case, or an address as Python writes it.
        port: None is the scheme's own.
        literal: The address, where `host` is one.
    """

    host: str
    port: int | None
    literal: Address | None


@dataclass(frozen=True)
class RemotePolicy:
    """Which pictures are fetched.

    Attributes:
        hosts: `HOST` or `HOST:PORT`, exactly these; none: nothing is fetched. A name must resolve to public addresses. A
            host of one's own network is written as its address (`10.0.0.5`, `[fd00::5]:8080`): no name server decides it then.
        max_bytes: Of a picture.
        seconds: For all of it, from the first look-up to the last byte.
        max_redirects: Followed for one picture.
    """

    hosts: tuple[str, ...] = ()
    max_bytes: int = 20 << 20
    seconds: float = 10.0
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for host in self.hosts:
            _entry(host)

    @property
    def places(self) -> Iterator[Place]:
        """The hosts, parsed."""
        return map(_entry, self.hosts)


@dataclass(frozen=True)
class Target:
    """An address that may be asked for a picture."""

    url: str
    tls: bool
    place: Place
    path: str

    @property
    def port(self) -> int:
        """Where it is asked."""
        return self.place.port or PORTS["https" if self.tls else "http"]

    @property
    def authority(self) -> str:
        """What the header `Host` says."""
        host = f"[{self.place.host}]" if isinstance(self.place.literal, IPv6Address) else self.place.host
        return host if self.port == PORTS["https" if self.tls else "http"] else f"{host}:{self.port}"


async def fetch(url: str, policy: RemotePolicy, count: Callable[[int], None] = lambda size: None) -> bytes:
    """Fetch a picture.

    Args:
        url: http or https.
        policy: What is allowed.
        count: Told how many bytes have come, each time that some have; may raise.

    Raises:
        InputError: It is not allowed, does not answer in time, or answers with anything but 200 and so many bytes.
    """
    try:
        return await asyncio.wait_for(_fetch(url, policy, count), policy.seconds)
    except asyncio.TimeoutError as error:
        raise InputError(f"{_named(url)} took over {policy.seconds:g} s; send the picture as a data URI") from error
    except h11.RemoteProtocolError as error:
        raise InputError(f"{_named(url)} answered with what is no HTTP") from error
    except OSError as error:  # Also of TLS. What it says of the network is not for whoever asks.
        verified = isinstance(error, ssl.SSLCertVerificationError)
        reason = "its certificate cannot be verified" if verified else "there was no connection"
        raise InputError(f"{_named(url)} cannot be fetched: {reason}") from error


def is_public(address: Address) -> bool:
    """Whether an address is one that anybody can reach: of no local network, not this machine's, for no special purpose."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in network for network in _RESERVED_4)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _UNICAST_6 and address.is_global and not any(address in network for network in _RESERVED_6)


def target_of(url: str, policy: RemotePolicy) -> Target:
    """Return what to ask for an address.

    Raises:
        InputError: It is no http or https address, holds more than host, port and path, or its host is not allowed.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if match is None:
        raise InputError(
            f"{_named(url)} cannot be fetched: give http(s)://HOST/PATH, of {MAX_URL} ASCII characters at most, or a data URI"
        )
    scheme, host, port, path = match[1].lower(), match[2], match[3], match[4] or "/"
    asked = _place(host, int(port) if port else PORTS[scheme])
    allowed = {(place.host, place.port or PORTS[scheme]) for place in policy.places}
    if asked is None or (asked.host, asked.port) not in allowed:
        raise InputError(f"pictures of {shorten(host)!r} are not fetched here; send the picture as a data URI")
    return Target(url, scheme == "https", asked, path if path.startswith("/") else f"/{path}")


async def _fetch(url: str, policy: RemotePolicy, count: Callable[[int], None]) -> bytes:
    target = target_of(url, policy)
    for _ in range(policy.max_redirects + 1):
        answer = await _ask(target, policy, count)
        if isinstance(answer, bytes):
            return answer
        further = target_of(urljoin(target.url, answer), policy)
        if target.tls and not further.tls:
            raise InputError(f"{_named(url)} leads from https to http")
        target = further
    raise InputError(f"{_named(url)} leads on more than {policy.max_redirects} times")


async def _ask(target: Target, policy: RemotePolicy, count: Callable[[int], None]) -> bytes | str:
    """Return what a server answers: a picture, or where it is."""
    reader, writer = await _connect(await _addresses(target), target)
    try:
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", target.authority),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
            ("User-Agent", "leanvlm"),
        ]
        request = connection.send(h11.Request(method="GET", target=target.path, headers=headers))
        writer.write((request or b"") + (connection.send(h11.EndOfMessage()) or b""))
        response = await _event(connection, reader)
        while isinstance(response, h11.InformationalResponse):
            response = await _event(connection, reader)
        assert isinstance(response, h11.Response)
        found = {name: value.decode("latin-1") for name, value in response.headers}
        if response.status_code in REDIRECTS and b"location" in found:
            return found[b"location"]
        _check(response.status_code, found, target, policy)
        data = bytearray()
        while isinstance(part := await _event(connection, reader), h11.Data):
            data += part.data
            count(len(part.data))
            if len(data) > policy.max_bytes:
                raise _too_large(target.url, policy)
        return bytes(data)
    finally:
        writer.transport.abort()


async def _event(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(BLOCK))
    return event


def _check(status: int, headers: dict[bytes, str], target: Target, policy: RemotePolicy) -> None:
    if status != 200:
        raise InputError(f"{_named(target.url)} answered {status}")
    # Unpacked, a few bytes can be any number.
    if headers.get(b"content-encoding", "identity").strip().lower() != "identity":
        raise InputError(f"{_named(target.url)} answered with a packed body, though identity was asked for")
    if int(headers.get(b"content-length", "0")) > policy.max_bytes:
        raise _too_large(target.url, policy)


async def _addresses(target: Target) -> list[Address]:
    """Resolve a target's host.

    Raises:
        InputError: It does not resolve, or to any address that is not public.
    """
    if target.place.literal is not None:
        return [target.place.literal]
    name = target.place.host
    try:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(name, target.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{_named(target.url)} cannot be fetched: its host is not known") from error
    addresses = [ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise InputError(f"{_named(target.url)} is not fetched: its host has an address that is not public")
    return addresses


async def _connect(addresses: list[Address], target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the first of the addresses that answers."""
    failed: OSError | None = None
    for address in dict.fromkeys(addresses):
        try:
            return await _open(str(address), target.port, target.place.host if target.tls else None)
        except ssl.SSLError:
            raise
        except OSError as error:
            failed = error
    assert failed is not None
    raise failed


async def _open(address: str, port: int, name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to an address; with TLS for a name."""
    context = None if name is None else _tls()
    # Numbers only: nothing is resolved here.
    return await asyncio.open_connection(address, port, ssl=context, server_hostname=name, flags=socket.AI_NUMERICHOST)


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _entry(text: str) -> Place:
    """Read one of `RemotePolicy.hosts`.

    Raises:
        InputError: It is not a host and perhaps a port, or an address that nothing is fetched from.
    """
    match = _ENTRY.fullmatch(text)
    place = None if match is None else _place(match[1], int(match[2]) if match[2] else None)
    if place is None:
        raise InputError(f"{shorten(text)!r} is no host; give HOST or HOST:PORT, such as images.example.org or 10.0.0.5:8080")
    if place.literal is not None and not (is_public(place.literal) or _is_own(place.literal)):
        raise InputError(f"{shorten(text)!r} is an address for a special purpose, of which no pictures are fetched")
    return place


def _is_own(address: Address) -> bool:
    """Whether an address is of a local network or this machine: no other special one, such as those of cloud metadata."""
    if isinstance(address, IPv6Address):
        return address == IPv6Address("::1") or address in IPv6Network("fc00::/7")
    own = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "100.64.0.0/10")
    return any(address in IPv4Network(network) for network in own)


def _place(host: str, port: int | None) -> Place | None:
    """Return a host, or None if it is none."""
    if port is not None and not 0 < port < 65536:
        return None
    host = host.lower()
    try:
        literal = IPv6Address(host[1:-1]) if host.startswith("[") else IPv4Address(host)
    except ValueError:
        # A name of only "localhost" is of no use here: it does not resolve to a public address.
        return None if host.startswith("[") or _NUMERIC.fullmatch(host) else Place(host, port, None)
    return Place(str(literal), port, literal)


def _too_large(url: str, policy: RemotePolicy) -> InputError:
    return InputError(f"{_named(url)} has more than {policy.max_bytes / (1 << 20):g} MB")


def _named(url: str) -> str:
    return f"the image at {shorten(url)!r}"
