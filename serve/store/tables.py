"""The SQL schema and how a database is opened: the only file that knows SQLite from the rest.

Everything here and in ``jobs.py`` is portable SQL: single-statement compare-and-swap, no RETURNING,
no database clock. SQLite runs in WAL mode so that readers never wait for the writer.
"""

from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateIndex, CreateTable

from pusa_dist.errors import ConfigError

BUSY_TIMEOUT_S = 30

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("model", String(128), nullable=False),
    Column("revision", String(128), nullable=False),
    Column("precision", String(8)),
    Column("status", String(16), nullable=False),
    Column("request", JSON, nullable=False),
    Column("inputs", JSON, nullable=False),
    Column("priority", String(16), nullable=False),
    Column("stage", String(16)),
    Column("step", Integer, nullable=False),
    Column("num_steps", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("expires_at", Double),
    Column("attempt", Integer, nullable=False),
    Column("gang_deaths", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("error_code", String(64)),
    Column("error_message", Text),
    Column("results", JSON, nullable=False),
    Column("seconds", JSON, nullable=False),
    Column("fingerprint", String(64)),
    Column("idempotency_key", String(255)),
    # Who runs the attempt, and until when without renewing: the dispatcher's alone, not part of Job.
    Column("owner", String(128)),
    Column("lease_until", Double),
    Index("jobs_by_tenant", "tenant", "id"),
    Index("jobs_by_fingerprint", "tenant", "fingerprint"),
    Index("jobs_by_idempotency_key", "tenant", "idempotency_key", unique=True),
    Index("jobs_by_status", "status", "created_at"),
)


def open_database(url: str, synchronous: str) -> Engine:
    """Connect to ``url``; on SQLite commits wait for the disk as ``synchronous`` says (NORMAL, FULL).

    Errors do not show the values of a statement: prompts are among them.
    """
    try:
        address = make_url(url)
    except ArgumentError as error:  # not shown: it may hold a password
        raise ConfigError(
            "database_url is no SQLAlchemy URL; write it like postgresql+psycopg://user@host/name"
        ) from error
    if address.get_backend_name() != "sqlite":
        return create_engine(address, pool_pre_ping=True, hide_parameters=True)
    if address.database is None:
        raise ConfigError(f"database_url={url} is in memory and would lose every job; name a file")
    Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"timeout": BUSY_TIMEOUT_S}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.execute(f"PRAGMA synchronous={synchronous}")

    return engine


def create_tables(engine: Engine, attempts: int = 20) -> None:
    """Create what is missing; any number of processes may do this at once.

    ``IF NOT EXISTS`` is not atomic between sessions (PostgreSQL: a unique violation in its catalogue;
    SQLite: the switch to WAL does not wait for a busy database), so the loser of a race tries again.
    """
    for attempt in range(attempts):
        try:
            _create_tables_once(engine)
            return
        except DBAPIError:
            if attempt == attempts - 1:
                raise


def _create_tables_once(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    with engine.begin() as connection:
        connection.execute(CreateTable(jobs, if_not_exists=True))
        for index in sorted(jobs.indexes, key=lambda index: str(index.name)):
            connection.execute(CreateIndex(index, if_not_exists=True))
