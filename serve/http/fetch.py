"""Requests to addresses that a user wrote: https, to public addresses only, bounded in time and size.

A name is resolved once for every connection; what it resolves to is checked, and the connection goes to
a checked address itself, so that a name server that answers differently the second time is never asked
a second time. The certificate is verified against the name. No proxy, cookie or credential of the
environment is used; redirects go through the same door; a compressed answer is not unpacked.

An address that is not public is not dialled, and the caller is told what it is told of a host that does
not answer: a stranger learns nothing of the network this runs in. No message says which URL it was about,
because a URL may carry a secret.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

import httpcore
import httpx

from serve.http.addresses import is_public

FetchErrorCode = Literal[
    "invalid_url",
    "unreachable",
    "too_slow",
    "too_large",
    "too_many_redirects",
    "unexpected_status",
    "unexpected_encoding",
]
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> address literals; raises OSError when there are none."""

MAX_PATH_LENGTH = 4096
"""Bytes of path and query."""
_REDIRECTS = (301, 302, 303, 307, 308)
_NUM_RESOLVERS = 64
"""A look-up that hangs keeps its thread, however soon it is given up, so there are many more than a tenant may have."""
_FAILURES = (
    httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, httpcore.UnsupportedProtocol,
    OSError, UnicodeError,
)  # fmt: skip


class FetchError(Exception):
    """A URL that was not fetched; ``code`` says why in one word, the message in one sentence without the URL."""

    def __init__(self, code: FetchErrorCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    location: str | None
    content: bytes
    """Of a 200 to a GET only."""


class PublicClient:
    """Speaks HTTP/1.1 over TLS to public addresses.

    Safe to share between event loops and threads; it keeps no connection between calls. For webhooks,
    ``status = await client.post(url, headers, body)`` obeys the same rules and follows no redirect (a 3xx is
    the receiver's answer); FetchError means that nobody answered. Construct it with ``timeout_s`` set to
    what one delivery may take.

    Args:
        timeout_s: for a whole call: names, connections, redirects, body.
        connect_timeout_s: for one connection, the look-up of its name included.
        max_redirects: that ``get`` follows.
        resolve: looks up a name; the system's resolver by default.
        backend: opens connections to address literals.
        ssl_context: verifies servers; the usual authorities by default.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 20.0,
        connect_timeout_s: float = 5.0,
        max_redirects: int = 3,
        resolve: Resolve | None = None,
        backend: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._max_redirects = max_redirects
        self._resolvers = ThreadPoolExecutor(_NUM_RESOLVERS, "resolver")
        self._backend = _PublicBackend(resolve or self._system_addresses, backend or httpcore.AnyIOBackend())
        self._ssl_context = ssl_context or httpcore.default_ssl_context()
        # It writes every header at DEBUG, addresses of redirects and signatures among them.
        logging.getLogger("httpcore").setLevel(logging.INFO)

    async def get(self, url: str, max_bytes: int) -> bytes:
        """The body at a URL, redirects followed.

        Raises:
            FetchError: it could not be had, or has more than ``max_bytes``.
        """
        target = _checked(url)
        async with _deadline(self._timeout_s):
            for _ in range(self._max_redirects + 1):
                answer = await self._exchange("GET", target, {}, None, max_bytes)
                if answer.status == HTTPStatus.OK:
                    return answer.content
                if answer.status not in _REDIRECTS or answer.location is None:
                    raise FetchError("unexpected_status", f"the server answered {answer.status}; it has to answer 200")
                target = _redirected(target, answer.location)
        raise FetchError("too_many_redirects", f"there are more than {self._max_redirects} redirects")

    async def post(self, url: str, headers: Mapping[str, str], content: bytes) -> int:
        """Post a body; returns the status of the answer, whatever it is, and reads no more of it.

        Raises:
            FetchError: no answer was had.
        """
        target = _checked(url)
        async with _deadline(self._timeout_s):
            return (await self._exchange("POST", target, headers, content, 0)).status

    def close(self) -> None:
        """Release the threads that look up names."""
        self._resolvers.shutdown(wait=False)

    async def _exchange(
        self, method: str, target: httpx.URL, headers: Mapping[str, str], content: bytes | None, max_bytes: int
    ) -> _Answer:
        url = httpcore.URL(scheme=b"https", host=target.raw_host, port=_port(target), target=target.raw_path)
        sent = {"host": target.netloc.decode("ascii"), "user-agent": "pusa", "accept-encoding": "identity", **headers}
        timeouts = {"connect": self._connect_timeout_s, "read": self._timeout_s, "write": self._timeout_s}
        try:
            async with (
                httpcore.AsyncConnectionPool(ssl_context=self._ssl_context, network_backend=self._backend) as pool,
                pool.stream(
                    method, url, headers=list(sent.items()), content=content, extensions={"timeout": timeouts}
                ) as response,
            ):
                received = {name.lower(): value.decode("latin-1") for name, value in response.headers}
                is_wanted = method == "GET" and response.status == HTTPStatus.OK
                body = await _body(response, received, max_bytes) if is_wanted else b""
        except _FAILURES as error:
            raise _unreachable() from error
        return _Answer(response.status, received.get(b"location"), body)

    async def _system_addresses(self, host: str, port: int) -> list[str]:
        # Not the loop's own threads: a resolver that hangs must not hold up, or outlive, the loop.
        found = await asyncio.get_running_loop().run_in_executor(
            self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class _PublicBackend(httpcore.AsyncNetworkBackend):
    """Resolves, checks, and connects to the very address it has checked."""

    def __init__(self, resolve: Resolve, inner: httpcore.AsyncNetworkBackend) -> None:
        self._resolve = resolve
        self._inner = inner

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to one of a name's public addresses; TLS, above, goes by the name."""
        try:
            async with asyncio.timeout(timeout):
                for address in filter(is_public, await self._resolve(host, port)):
                    try:
                        return await self._inner.connect_tcp(address, port, None, local_address, socket_options)
                    except httpcore.ConnectError:
                        continue
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("no public address answers in time") from error
        raise httpcore.ConnectError("no public address answers")


@asynccontextmanager
async def _deadline(seconds: float) -> AsyncIterator[None]:
    """Time for everything inside it; httpcore's own bounds start again with every byte."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise FetchError("too_slow", "it took too long to arrive") from error


def check_url(url: str) -> None:
    """Refuse a URL that no call would reach, before anybody relies on it.

    Raises:
        FetchError: it is no https URL, or spells out an address that is not public.
    """
    host = _checked(url).host
    is_literal = ":" in host or host.rpartition(".")[2].isdecimal()  # in whatever notation
    if is_literal and not is_public(host):
        raise FetchError("invalid_url", "it names an address that is not public")


def _checked(url: str) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise FetchError("invalid_url", "it is not a URL") from error
    if parsed.scheme != "https":
        raise FetchError("invalid_url", "only https addresses are fetched")
    if parsed.userinfo:
        raise FetchError("invalid_url", "a user name or password in a URL is not accepted")
    if not parsed.raw_host or not 0 < _port(parsed) < 65_536 or len(parsed.raw_path) > MAX_PATH_LENGTH:
        raise FetchError("invalid_url", "it is not a URL")
    return parsed


def _port(url: httpx.URL) -> int:
    return 443 if url.port is None else url.port


def _redirected(source: httpx.URL, location: str) -> httpx.URL:
    try:
        return _checked(str(source.join(location)))
    except (FetchError, httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise _unreachable() from error


async def _body(response: httpcore.Response, headers: Mapping[bytes, str], max_bytes: int) -> bytes:
    if headers.get(b"content-encoding", "identity") != "identity":
        raise FetchError("unexpected_encoding", "the server sends it compressed; it has to be sent as it is")
    length = headers.get(b"content-length", "")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    received = bytearray()
    async for chunk in response.aiter_stream():
        received += chunk
        if len(received) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(received)


def _unreachable() -> FetchError:
    return FetchError("unreachable", "no public https server answers there")


def _too_large(max_bytes: int) -> FetchError:
    return FetchError("too_large", f"it has more than {max_bytes} bytes")
