"""The official client, unmodified, newest and last 2.x, against a real server on loopback."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from serve.config import ServeConfig, UploadLimits
from serve.http.api import create_api
from serve.http.gateway import Gateway
from serve.store.jobs import JobStore
from tests.serve.api_support import FakeDispatcher, mp4, png

SESSION = Path(__file__).parent / "openai_session.py"
LAST_2X = Path(sys.prefix) / "openai-2"
"""Where ``make setup`` puts the last 2.x, beside the newest that is installed."""


@contextmanager
def running_server(config: ServeConfig) -> Iterator[tuple[str, Gateway]]:
    async def ready() -> dict[str, bool]:
        return {"Gateway": True}

    gateway = Gateway(config, ready)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_api(gateway), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", gateway
    server.should_exit = True
    thread.join()
    listener.close()
    gateway.close()


@pytest.fixture
def config(tmp_path: Path) -> ServeConfig:
    return ServeConfig(
        model="debug",
        state_dir=str(tmp_path / "state"),
        require_keys=True,
        poll_after_ms=50,
        uploads=UploadLimits(max_body_bytes=2_000_000),
    )


@pytest.mark.parametrize("major", [2, 3])
def test_a_session_with_the_official_client_works_from_create_to_delete(
    tmp_path: Path, config: ServeConfig, major: int
) -> None:
    if major == 2:
        assert LAST_2X.is_dir(), f"{LAST_2X} is missing; run make setup"
    clip = mp4(17)
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.mp4").write_bytes(clip)
    with running_server(config) as (url, _):
        key = key_of("red", config)
        dispatcher = FakeDispatcher(config, clip)
        dispatcher.start()
        session = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", str(SESSION), str(major), url, str(tmp_path), key],
            env={**os.environ, "PYTHONPATH": str(LAST_2X) if major == 2 else ""},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        dispatcher.stop()
    assert session.returncode == 0, session.stderr
    assert session.stdout == "session complete\n"


def test_a_body_without_end_is_cut_off_while_it_arrives(config: ServeConfig) -> None:
    with running_server(config) as (url, _):
        key = key_of("red", config)
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(
                b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + key.encode() + b"\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            part = b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
            send_chunk(connection, part)
            num_sent = 0
            connection.setblocking(False)
            answer = b""
            deadline = time.monotonic() + 20
            while not answer and time.monotonic() < deadline:
                try:
                    answer = connection.recv(65536)
                except BlockingIOError:
                    connection.settimeout(10)
                    send_chunk(connection, b"x" * 65536)
                    num_sent += 65536
                    connection.setblocking(False)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in answer
    assert num_sent < 20_000_000


def key_of(tenant: str, config: ServeConfig) -> str:
    store = JobStore(config.resolved_database_url)
    _, secret = store.create_key(tenant)
    store.close()
    return secret


def send_chunk(connection: socket.socket, data: bytes) -> None:
    connection.sendall(b"%x\r\n%s\r\n" % (len(data), data))
