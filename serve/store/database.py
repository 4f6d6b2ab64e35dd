"""How a database is opened and written: the only file that knows SQLite from the rest.

Everything else is portable SQL: single-statement compare-and-swap, no RETURNING, no database clock.
SQLite runs in WAL mode so that readers never wait for the writer. Where a transaction locks several
rows, it locks them in the order tenant, job, anything else: no two wait for each other.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pusa_dist.errors import ConfigError
from serve.store.migrate import migrate

BUSY_TIMEOUT_S = 30
ANSWER_S = 15.0
"""A statement that takes longer, waiting for another's lock included, is given up: the database counts as away."""
LONG_ANSWER_S = 3600.0
"""The same for what goes through whole tables: migrations and backups."""
DATABASE_AWAY = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)
"""What a statement without a fault meets: no connection, a server that goes down, or one that has just become a
standby and takes no writes (``InternalError``)."""


class Database:
    """Connections to one database: what every part of the store stands on.

    Args:
        url: of SQLAlchemy.
        clock: Unix seconds.

    Raises:
        ConfigError: the URL cannot be read, or names a database in memory.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self._engine = open_database(url, synchronous="NORMAL")
        # An acknowledged job must survive a power cut; progress need not.
        self._durable = open_database(url, synchronous="FULL")
        self._patient = open_database(url, synchronous="NORMAL", answer_s=LONG_ANSWER_S)
        self._clock = clock
        # SQLite lets one write at a time, and the others look again and again: whoever has just come may be
        # faster than who has waited for seconds. Within a process they queue here instead.
        self._one_writer = FirstComeLock() if self._engine.dialect.name == "sqlite" else nullcontext()

    def create_tables(self) -> None:
        """Create or upgrade the schema; every process that opens the store may call it, at any time.

        Raises:
            ConfigError: the database was written by a newer version.
        """
        migrate(self._patient)

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """A connection that reads everything as it is at one moment, and keeps nobody from writing."""
        with self._patient.connect() as connection:
            if connection.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN")
            else:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            yield connection
            connection.rollback()

    @contextmanager
    def _writing(self, *, durably: bool = False) -> Iterator[Connection]:
        """A transaction that writes; it is kept if the block ends well.

        Args:
            durably: whether it must survive a power cut from the moment the block has ended.
        """
        with self._one_writer, (self._durable if durably else self._engine).begin() as connection:
            yield connection

    def empty_log(self) -> bool:
        """Empty SQLite's write-ahead log, which still spells what was removed; elsewhere there is none.

        Returns:
            False: somebody was reading all the while, and it is as it was.
        """
        if self._engine.dialect.name != "sqlite":
            return True
        with self._engine.connect() as connection:
            is_busy, *_ = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()
        return not is_busy

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()
        self._durable.dispose()
        self._patient.dispose()


class FirstComeLock(AbstractContextManager[None]):
    """A lock that is given to who has waited longest, where ``threading.Lock`` may give it to anybody."""

    def __init__(self) -> None:
        self._waiting: deque[threading.Lock] = deque()
        self._is_held = False
        self._guard = threading.Lock()

    def __enter__(self) -> None:
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()  # until the holder before hands it over

    def __exit__(self, *_: object) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False


def open_database(url: str, synchronous: str, answer_s: float = ANSWER_S) -> Engine:
    """Connect to ``url``; errors do not show the values of a statement: prompts are among them.

    Args:
        url: of SQLAlchemy.
        synchronous: how commits wait for the disk on SQLite (NORMAL, FULL).
        answer_s: for how long a statement may run on PostgreSQL, which may be silent for hardly longer.
    """
    try:
        address = make_url(url)
    except ArgumentError as error:  # not shown: it may hold a password
        raise ConfigError(
            "database_url is no SQLAlchemy URL; write it like postgresql+psycopg://user@host/name"
        ) from error
    if address.get_backend_name() != "sqlite":
        engine = create_engine(address, pool_pre_ping=True, hide_parameters=True)
        if engine.driver == "psycopg":
            _bound(engine, answer_s)
        return engine
    if address.database is None:
        raise ConfigError(f"database_url={url} is in memory and would lose every job; name a file")
    file = Path(address.database)
    file.parent.mkdir(parents=True, exist_ok=True)
    # The owner's alone: prompts and the secrets that sign webhooks are in it, and in what SQLite puts beside it.
    file.touch(mode=0o600)
    engine = create_engine(address, connect_args={"timeout": BUSY_TIMEOUT_S}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.execute(f"PRAGMA synchronous={synchronous}")
        # What a tenant deletes, prompts among it, is not left in the file.
        connection.execute("PRAGMA secure_delete=ON")

    return engine


def _bound(engine: Engine, answer_s: float) -> None:
    from serve.store import postgres  # psycopg is an extra

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: object, _record: object, arguments: Any, options: Any) -> Any:
        return postgres.connect(arguments, options, answer_s)


def upsert(connection: Connection, table: Table) -> Any:
    """An INSERT that has ``on_conflict_do_update`` and ``on_conflict_do_nothing``."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)
