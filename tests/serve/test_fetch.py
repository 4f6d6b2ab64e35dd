"""Requests to users' URLs: real TLS servers on loopback, which a resolver of ours calls public addresses."""

import asyncio
import gzip
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.http.addresses import is_public
from serve.http.fetch import FetchError, PublicClient

x509 = pytest.importorskip("cryptography.x509")
PUBLIC, OTHER_PUBLIC = "93.184.215.14", "2606:4700::6810:84e5"
NAMES = ("media.test", "other.test")
SECRET = "t0ken-in-a-url"
Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]

NOT_PUBLIC = {
    "private": "10.0.0.1",
    "private-172": "172.16.5.4",
    "private-192": "192.168.1.1",
    "loopback": "127.0.0.1",
    "this-network": "0.0.0.0",
    "metadata": "169.254.169.254",
    "azure-host": "168.63.129.16",
    "cgnat": "100.64.0.1",
    "alibaba-metadata": "100.100.100.200",
    "benchmark": "198.18.0.1",
    "documentation": "203.0.113.9",
    "multicast": "224.0.0.251",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "oracle-metadata": "192.0.0.192",
    "loopback-6": "::1",
    "unspecified-6": "::",
    "mapped-loopback": "::ffff:127.0.0.1",
    "mapped-metadata": "::ffff:169.254.169.254",
    "compatible": "::127.0.0.1",
    "nat64-private": "64:ff9b::10.0.0.1",
    "nat64-metadata": "64:ff9b::a9fe:a9fe",
    "nat64-local": "64:ff9b:1::10.0.0.1",
    "6to4-private": "2002:0a00:0001::1",
    "teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "link-local-6": "fe80::1",
    "scoped": "fe80::1%eth0",
    "unique-local": "fd00:ec2::254",
    "multicast-6": "ff02::1",
    "documentation-6": "2001:db8::1",
    "no-address": "localhost",
}


@pytest.mark.parametrize("address", NOT_PUBLIC.values(), ids=NOT_PUBLIC)
def test_addresses_that_are_not_of_the_internet(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, OTHER_PUBLIC, "8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2a00:1450:4001:82a::200e"]
)
def test_addresses_of_the_internet(address):
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_however_it_is_wrapped(address):
    assert is_public(f"::ffff:{address}") == is_public(f"64:ff9b::{address}") == is_public(str(address))


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """(server context, client context) of a certificate for NAMES."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in NAMES]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + pem
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cadata=pem.decode())


@dataclass
class Internet(httpcore.AsyncNetworkBackend):
    """Every address that is dialled leads to one server on loopback; what was dialled is remembered."""

    handler: Handler
    names: dict[str, list[list[str]]] = field(default_factory=lambda: {"media.test": [[PUBLIC]]})
    """Answers to the first, the second, ... look-up of a name; the last one is repeated."""
    dialled: list[str] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    sni: list[str] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)

    async def resolve(self, host: str, port: int) -> list[str]:
        if host not in self.names:
            loop = asyncio.get_running_loop()  # octal, hexadecimal and decimal hosts: as the system reads them
            return [entry[4][0] for entry in await loop.getaddrinfo(host, port, type=1)]
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def connect_tcp(self, host, port, timeout=None, *_):  # noqa: ASYNC109 - httpcore's signature
        self.dialled.append(host)
        if host in self.unreachable:
            raise httpcore.ConnectError("refused")
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port, timeout)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.received.append(head)
        try:
            await self.handler(head, writer)
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        except OSError:
            pass  # the client had enough


async def fetch(internet, authority, url=f"https://media.test/a?{SECRET}", max_bytes=10_000, post=None, **options):
    server_context, client_context = authority
    server_context.sni_callback = lambda _, name, __: internet.sni.append(name)
    server = await asyncio.start_server(internet.serve, "127.0.0.1", 0, ssl=server_context)
    internet.port = server.sockets[0].getsockname()[1]
    client = PublicClient(
        backend=internet,
        **{"resolve": internet.resolve, "timeout_s": 5.0, "ssl_context": client_context} | options,
    )
    try:
        return await (client.get(url, max_bytes) if post is None else client.post(url, *post))
    finally:
        client.close()
        server.close()


def run(*arguments, **options):
    return asyncio.run(fetch(*arguments, **options))


def refusal(*arguments, **options) -> FetchError:
    with pytest.raises(FetchError) as caught:
        run(*arguments, **options)
    assert SECRET not in str(caught.value)
    assert "media.test" not in str(caught.value)
    return caught.value


def answering(body: bytes, status: str = "200 OK", **headers: str) -> Handler:
    async def handler(head, writer):
        lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    return handler


def test_a_public_file_is_fetched_by_name_from_the_checked_address(authority, monkeypatch):
    for name in ("HTTPS_PROXY", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    internet = Internet(answering(b"bytes"))
    assert run(internet, authority) == b"bytes"
    assert (internet.dialled, internet.sni) == ([PUBLIC], ["media.test"])
    head = internet.received[0].lower()
    assert head.startswith(f"get /a?{SECRET} http/1.1\r\n".encode())
    assert b"\r\nhost: media.test\r\n" in head
    assert b"authorization" not in head
    assert b"cookie" not in head


def test_the_next_public_address_is_tried_and_others_are_left_out(authority):
    internet = Internet(answering(b"x"), {"media.test": [["10.0.0.1", OTHER_PUBLIC, "::1", PUBLIC]]})
    internet.unreachable = {OTHER_PUBLIC}
    assert run(internet, authority) == b"x"
    assert internet.dialled == [OTHER_PUBLIC, PUBLIC]


@pytest.mark.parametrize("address", NOT_PUBLIC.values(), ids=NOT_PUBLIC)
def test_what_is_not_public_is_not_dialled_and_looks_unreachable(authority, address):
    unreachable = Internet(answering(b"x"), unreachable={PUBLIC})
    expected = refusal(unreachable, authority)
    internet = Internet(answering(b"x"), {"media.test": [[address]]})
    error = refusal(internet, authority)
    assert (error.args, internet.dialled) == (expected.args, [])
    assert unreachable.dialled == [PUBLIC]


@pytest.mark.parametrize(
    "host",
    ["0x7f.1", "0177.1", "2130706433", "127.1", "0", "[::ffff:7f00:1]", "[::1]", "localhost", "10.0.0.1:8443"],
)
def test_hosts_that_are_private_in_disguise_look_unreachable(authority, host):
    internet = Internet(answering(b"x"))
    assert (refusal(internet, authority, f"https://{host}/").code, internet.dialled) == ("unreachable", [])


def test_a_name_that_does_not_exist_looks_unreachable(authority):
    async def resolve(host, port):
        raise OSError("no such name")

    assert refusal(Internet(answering(b"x")), authority, resolve=resolve).code == "unreachable"


def test_a_name_that_changes_between_look_ups_gains_nothing(authority):
    internet = Internet(answering(b"x"), {"media.test": [[PUBLIC], ["127.0.0.1"]]})
    assert run(internet, authority) == b"x"
    assert internet.dialled == [PUBLIC]
    internet = Internet(
        answering(b"", "302 Found", location="https://media.test/b"), {"media.test": [[PUBLIC], ["127.0.0.1"]]}
    )
    assert refusal(internet, authority).code == "unreachable"
    assert internet.dialled == [PUBLIC]


def test_a_server_without_the_names_certificate_is_unreachable(authority):
    internet = Internet(answering(b"x"), {"imposter.test": [[PUBLIC]]})
    assert refusal(internet, authority, "https://imposter.test/").code == "unreachable"
    assert internet.received == []


def redirecting(*locations: str) -> Handler:
    left = list(locations)

    async def handler(head, writer):
        answer = answering(b"", "302 Found", location=left.pop(0)) if left else answering(b"there")
        await answer(head, writer)

    return handler


def test_redirects_are_followed_to_other_names_and_paths(authority):
    internet = Internet(
        redirecting("https://other.test/b", "/c"), {"media.test": [[PUBLIC]], "other.test": [[OTHER_PUBLIC]]}
    )
    assert run(internet, authority) == b"there"
    assert internet.dialled == [PUBLIC, OTHER_PUBLIC, OTHER_PUBLIC]
    assert [head.split()[1] for head in internet.received] == [f"/a?{SECRET}".encode(), b"/b", b"/c"]


@pytest.mark.parametrize(
    "location",
    [
        "https://169.254.169.254/latest/meta-data/",
        "https://inside.test/",
        "http://media.test/",
        "https://user:password@media.test/",
        "file:///etc/passwd",
        "gopher://media.test/",
        "https://[::ffff:10.0.0.1]/",
        "https://media.test:0/",
    ],
)
def test_a_redirect_to_what_is_not_allowed_looks_unreachable(authority, location):
    internet = Internet(redirecting(location), {"media.test": [[PUBLIC]], "inside.test": [["10.1.2.3"]]})
    assert refusal(internet, authority).code == "unreachable"
    assert internet.dialled == [PUBLIC]


def test_redirects_end(authority):
    assert refusal(Internet(redirecting(*["/a"] * 4)), authority, max_redirects=3).code == "too_many_redirects"
    assert run(Internet(redirecting(*["/a"] * 3)), authority, max_redirects=3) == b"there"


@pytest.mark.parametrize(
    "url",
    [
        "http://media.test/",
        "ftp://media.test/",
        "//media.test/",
        "media.test",
        "https://",
        "https:///a",
        "https://user@media.test/",
        f"https://user:{SECRET}@media.test/",
        "https://media.test:0/",
        "https://media.test:70000/",
        "https://media.test/\r\nx-injected: 1",
        "https://media.test/" + "a" * 5000,
        "https://[::1/",
        "https://0177.0.0.1/",
        "https://\ud800/",
    ],
)
def test_urls_that_are_not_plain_https_are_refused_before_anything_is_dialled(authority, url):
    internet = Internet(answering(b"x"))
    assert (refusal(internet, authority, url).code, internet.dialled) == ("invalid_url", [])


def test_what_is_too_large_by_its_header_is_not_read(authority):
    async def promising(head, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n")

    assert refusal(Internet(promising), authority).code == "too_large"


def test_what_is_too_large_without_a_header_is_cut_off(authority):
    sent = 0

    async def endless(head, writer):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while sent < 100_000_000:
            writer.write(b"10000\r\n" + bytes(65_536) + b"\r\n")
            await writer.drain()
            sent += 65_536

    assert refusal(Internet(endless), authority, max_bytes=200_000).code == "too_large"
    assert sent < 20_000_000
    assert len(run(Internet(answering(bytes(10_000))), authority)) == 10_000


def test_a_compressed_answer_is_not_unpacked(authority):
    bomb = gzip.compress(bytes(100_000_000), 9)[:9000]
    internet = Internet(answering(bomb, content_encoding="gzip"))
    assert refusal(internet, authority).code == "unexpected_encoding"
    assert b"accept-encoding: identity" in internet.received[0].lower()


async def slow_body(head, writer):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
    for _ in range(100):
        writer.write(b"x")
        await asyncio.sleep(0.02)


async def slow_head(head, writer):
    for _ in range(100):
        writer.write(b"H")
        await asyncio.sleep(0.02)


async def silent(head, writer):
    await asyncio.sleep(5)


@pytest.mark.parametrize("handler", [slow_body, slow_head, silent])
def test_a_server_that_takes_its_time_is_left(authority, handler):
    started = time.monotonic()
    assert refusal(Internet(handler), authority, timeout_s=0.3).code == "too_slow"
    assert time.monotonic() - started < 1.0


def test_a_name_server_that_takes_its_time_is_left(authority):
    async def resolve(host, port):
        await asyncio.sleep(5)

    error = refusal(Internet(answering(b"x")), authority, resolve=resolve, connect_timeout_s=0.1)
    assert error.code == "unreachable"


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oh", "204 No Content", "206 Partial Content", "302 Found"])
def test_only_200_is_an_answer(authority, status):
    assert refusal(Internet(answering(b"", status)), authority).code == "unexpected_status"


async def not_http(head, writer):
    writer.write(b"220 mail.example ESMTP\r\n")


async def hung_up(head, writer):
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")


@pytest.mark.parametrize("handler", [not_http, hung_up])
def test_what_is_not_a_whole_http_answer_is_unreachable(authority, handler):
    assert refusal(Internet(handler), authority).code == "unreachable"


def test_a_post_obeys_the_same_rules_and_follows_no_redirect(authority):
    post = ({"webhook-id": "msg_1", "content-type": "application/json"}, b'{"id": 1}')
    internet = Internet(answering(b"", "302 Found", location="https://other.test/"))
    assert run(internet, authority, post=post) == 302
    assert b"webhook-id: msg_1" in internet.received[0].lower()
    internet = Internet(answering(b"ok", "204 No Content"))
    assert run(internet, authority, post=post) == 204
    internet = Internet(answering(b"x"), {"media.test": [["10.0.0.1"]]})
    assert (refusal(internet, authority, post=post).code, internet.dialled) == ("unreachable", [])


def test_nothing_of_a_url_is_logged_even_at_debug(authority, caplog):
    caplog.set_level(logging.DEBUG)
    internet = Internet(redirecting(f"https://media.test/b?{SECRET}"))
    assert run(internet, authority) == b"there"
    refusal(Internet(answering(b"x"), {"media.test": [["10.0.0.1"]]}), authority)
    assert SECRET not in caplog.text
