"""A PostgreSQL that falls silent is away within seconds, whoever waits for it."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from serve.store.database import open_database
from serve.store.jobs import JobStore
from tests.serve.store_support import new_job

postgres = pytest.importorskip("serve.store.postgres", reason="psycopg is not installed (extra 'postgres')")


class SilentServer:
    """Takes connections and answers nothing more, as a server does that is stopped: its machine still acknowledges.

    Args:
        num_answers: queries of a connection that are answered before, each with no row.
    """

    def __init__(self, num_answers: int | None) -> None:
        self.num_answers = num_answers
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"postgresql+psycopg://tests@127.0.0.1:{self.listening.getsockname()[1]}/tests"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as reading, suppress(OSError, struct.error):
            while self.num_answers is not None:
                (size, code) = struct.unpack(">II", reading.read(8))
                reading.read(size - 8)
                if code not in (80877103, 80877104):  # encryption: not here
                    break
                connection.sendall(b"N")
            if self.num_answers is not None:
                settings = b"".join(
                    message(b"S", one) for one in (b"server_version\x0016.0\0", b"client_encoding\0UTF8\0")
                )
                connection.sendall(message(b"R", bytes(4)) + settings + message(b"K", bytes(8)) + READY)
                for _ in range(self.num_answers):
                    kind = b""
                    while kind not in (b"Q", b"S"):
                        kind, size = struct.unpack(">cI", reading.read(5))
                        reading.read(size - 4)
                    answer = message(b"1") + message(b"2") + message(b"n") if kind == b"S" else b""
                    connection.sendall(answer + message(b"C", b"SELECT 0\0") + READY)
            while reading.read(1):
                pass


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack(">I", len(body) + 4) + body


READY = message(b"Z", b"I")


@pytest.fixture
def silent() -> Iterator[Callable[[int | None], str]]:
    servers = []

    def started(num_answers: int | None) -> str:
        servers.append(SilentServer(num_answers))
        return servers[-1].url

    yield started
    for server in servers:
        server.listening.close()


def seconds_until_given_up(url: str) -> float:
    engine = open_database(url, "FULL", answer_s=0.5)
    began = time.monotonic()
    with pytest.raises(OperationalError) as given_up, engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    engine.dispose()
    assert given_up.value.connection_invalidated or given_up.value.statement is None
    return time.monotonic() - began


@pytest.mark.timeout(60)
@pytest.mark.parametrize("num_answers", [0, 1, 2, 3])
def test_a_server_that_falls_silent_is_given_up(silent, monkeypatch, num_answers):
    monkeypatch.setattr(postgres, "_MARGIN_S", 0.5)
    assert 0.9 < seconds_until_given_up(silent(num_answers)) < 10


@pytest.mark.timeout(60)
def test_a_server_that_takes_a_connection_and_says_nothing_is_given_up(silent):
    assert seconds_until_given_up(silent(None) + "?connect_timeout=2") < 4.5


def statement_timeout(url: str) -> str:
    engine = open_database(url, "FULL", answer_s=7.0)
    with engine.connect() as connection:
        found = connection.execute(text("SHOW statement_timeout")).scalar_one()
    engine.dispose()
    return found


def test_the_server_ends_long_statements_unless_the_operator_has_said_when(postgres_url, tmp_path, monkeypatch):
    assert statement_timeout(postgres_url) == "7s"
    assert statement_timeout(f"{postgres_url} -cstatement_timeout=3000") == "3s"
    host, port = postgres_url.partition("@")[2].partition("/")[0].split(":")
    service = f"[pusa]\nhost={host}\nport={port}\nuser=tests\ndbname=postgres\noptions=-cstatement_timeout=4000\n"
    (tmp_path / "services").write_text(service)
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert statement_timeout("postgresql+psycopg:///?service=pusa") == "4s"


def test_a_statement_that_takes_too_long_costs_no_connection_and_one_that_speaks_none_either(postgres_url, monkeypatch):
    monkeypatch.setattr(postgres, "_MARGIN_S", 0.5)
    engine = open_database(postgres_url, "FULL", answer_s=0.5)
    with engine.connect() as connection:
        process = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with pytest.raises(OperationalError, match="statement timeout") as ended:
            connection.execute(text("SELECT pg_sleep(60)"))
        assert not ended.value.connection_invalidated
        connection.rollback()
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() == process
        # Longer than its silence may last, but there is something to hear of it all the time.
        connection.execute(text("SET statement_timeout = 0"))
        begun = time.monotonic()
        rows = connection.execute(text("SELECT repeat('x', 10000), pg_sleep(0.05) FROM generate_series(1, 40)")).all()
        assert (len(rows), time.monotonic() - begun > 1.5) == (40, True)
    engine.dispose()


def test_a_lock_that_another_holds_is_waited_for_within_bounds_and_migrations_are_not_bounded(
    postgres_url, monkeypatch
):
    monkeypatch.setattr("serve.store.database.open_database.__defaults__", (0.5,))
    store = JobStore(postgres_url)
    store.create_tables()
    job = new_job()
    store.create(job)
    with store._patient.begin() as holder:
        assert holder.execute(text("SHOW statement_timeout")).scalar_one() == "1h"
        holder.execute(text("SELECT * FROM jobs FOR UPDATE"))
        with pytest.raises(OperationalError, match="statement timeout"):
            store.claim(job.id, "me", 1.0)
    assert store.claim(job.id, "me", 1.0) is not None
    store.close()
