"""Bringing a database to the schema of this code, whatever it is now and whoever else is doing so."""

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import OperationalError

from pusa_dist.errors import ConfigError

BEFORE_MIGRATIONS = "0001"
"""What a database is that has jobs and no version: the first schema, which kept none."""
_LOCK = 7_853_102_447  # any number that nobody else locks in this database
_WAL_ATTEMPTS = 20
# Alembic keeps the migration that runs in a module: two threads must not have one each.
_one_at_a_time = threading.Lock()


def migrate(engine: Engine, revision: str = "head") -> None:
    """Create or upgrade the schema; any number of processes may do this at once.

    Args:
        engine: of the database.
        revision: where to stop, for restoring what an older version wrote.

    Raises:
        ConfigError: the database was written by a newer version.
    """
    if engine.dialect.name == "sqlite":
        _write_ahead(engine)
    with engine.connect() as connection:
        if current_revision(connection) == newest_revision():
            return
    with _one_at_a_time, engine.connect() as connection:
        _lock(connection)
        _check_known(current_revision(connection))
        config = _config(connection)
        if current_revision(connection) is None and inspect(connection).has_table("jobs"):
            command.stamp(config, BEFORE_MIGRATIONS)
        command.upgrade(config, revision)
        connection.commit()


def current_revision(connection: Connection) -> str | None:
    """Which schema the database has; None: none, or one from before there were versions."""
    return MigrationContext.configure(connection).get_current_revision()


def newest_revision() -> str:
    """The schema of this code."""
    head = _scripts().get_current_head()
    assert head is not None
    return head


def known_revisions() -> set[str]:
    """Every schema this code can upgrade from."""
    return {script.revision for script in _scripts().walk_revisions()}


def _check_known(revision: str | None) -> None:
    if revision is not None and revision not in known_revisions():
        raise ConfigError(
            f"the database has schema {revision}, which is newer than this version of the service knows "
            f"({newest_revision()}); run the newer version, or restore a backup made before it"
        )


def _lock(connection: Connection) -> None:
    """Wait until nobody else migrates; held until the end of the transaction."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def _write_ahead(engine: Engine) -> None:
    """Switch to WAL; SQLite does not wait for a busy database there, so the loser of a race tries again."""
    for attempt in range(_WAL_ATTEMPTS):
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            return
        except OperationalError:
            if attempt == _WAL_ATTEMPTS - 1:
                raise


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
