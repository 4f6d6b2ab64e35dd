"""The schema: every way to get to it, on SQLite and on a real PostgreSQL."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, create_engine, insert, inspect, text

from pusa_dist.errors import ConfigError
from serve.store.database import open_database
from serve.store.jobs import JobStore
from serve.store.migrate import BEFORE_MIGRATIONS, current_revision, known_revisions, migrate, newest_revision
from serve.store.tables import jobs, metadata
from tests.serve.store_support import LEASE_S, created, new_job

# What the service of before there were migrations made of an empty database.
BEFORE = """
CREATE TABLE jobs (
    id VARCHAR(64) NOT NULL, tenant VARCHAR(128) NOT NULL, model VARCHAR(128) NOT NULL,
    revision VARCHAR(128) NOT NULL, precision VARCHAR(8), status VARCHAR(16) NOT NULL, request JSON NOT NULL,
    inputs JSON NOT NULL, priority VARCHAR(16) NOT NULL, stage VARCHAR(16), step INTEGER NOT NULL,
    num_steps INTEGER NOT NULL, created_at DOUBLE PRECISION NOT NULL, started_at DOUBLE PRECISION,
    completed_at DOUBLE PRECISION, expires_at DOUBLE PRECISION, attempt INTEGER NOT NULL,
    gang_deaths INTEGER NOT NULL, cancel_requested BOOLEAN NOT NULL, error_code VARCHAR(64), error_message TEXT,
    results JSON NOT NULL, seconds JSON NOT NULL, fingerprint VARCHAR(64), idempotency_key VARCHAR(255),
    owner VARCHAR(128), lease_until DOUBLE PRECISION, PRIMARY KEY (id)
);
CREATE UNIQUE INDEX jobs_by_idempotency_key ON jobs (tenant, idempotency_key);
CREATE INDEX jobs_by_tenant ON jobs (tenant, id);
CREATE INDEX jobs_by_fingerprint ON jobs (tenant, fingerprint);
CREATE INDEX jobs_by_status ON jobs (status, created_at);
"""
OLD_ROW = """
INSERT INTO jobs VALUES ('video_1', 'red', 'debug', '1', NULL, 'queued', :request, '[]', 'interactive', NULL, 0, 4,
    1.0, NULL, NULL, NULL, 0, 0, false, NULL, NULL, '{}', '{}', NULL, NULL, NULL, NULL)
"""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    opened = open_database(database_url, "NORMAL")
    yield opened
    opened.dispose()


def make_old(engine: Engine) -> None:
    before = BEFORE if engine.dialect.name == "postgresql" else BEFORE.replace("DOUBLE PRECISION", "DOUBLE")
    with engine.begin() as connection:
        for statement in before.split(";"):
            if statement.strip():
                connection.execute(text(statement))
        request = engine.dialect.type_descriptor(jobs.c.request.type).bind_processor(engine.dialect)(  # type: ignore[misc]
            new_job().request.to_dict()
        )
        connection.execute(text(OLD_ROW), {"request": request})


def revision_of(engine: Engine) -> str | None:
    with engine.connect() as connection:
        return current_revision(connection)


def test_migrations_lead_to_exactly_the_schema_the_code_reads(engine: Engine) -> None:
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    assert revision_of(engine) == newest_revision() == max(known_revisions())


def test_a_database_from_before_there_were_migrations_is_upgraded_and_keeps_its_jobs(
    engine: Engine, database_url: str
) -> None:
    make_old(engine)
    assert revision_of(engine) is None
    store = JobStore(database_url)
    store.create_tables()
    (job,) = store.queued("debug", 10)
    assert (job.id, job.tenant, job.request, job.cost, job.preview_every) == (
        "video_1", "red", new_job().request, 0.0, 0,
    )  # fmt: skip
    assert store.standings()["red"].weight == 1.0
    assert store.claim("video_1", "me", LEASE_S) is not None
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    store.close()


@pytest.mark.parametrize(("steps_run", "furthest_step"), [(3, 3), (9, 4)])
def test_a_job_from_before_has_come_no_further_than_its_steps_allow(
    engine: Engine, database_url: str, steps_run: int, furthest_step: int
) -> None:
    make_old(engine)
    migrate(engine, "0003")
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET steps_run = :steps_run"), {"steps_run": steps_run})
    store = JobStore(database_url)
    store.create_tables()
    (job,) = store.queued("debug", 10)
    assert (job.num_steps, job.furthest_step) == (4, furthest_step)
    store.close()


def test_a_process_of_the_version_before_can_still_accept_jobs(engine: Engine, database_url: str) -> None:
    make_old(engine)
    store = JobStore(database_url)
    store.create_tables()
    new = {column.name for column in jobs.columns} - {name.split()[0] for name in BEFORE.split("(", 1)[1].split(",")}
    assert "cost" in new
    with engine.begin() as connection:
        row = connection.execute(text("SELECT * FROM jobs")).mappings().one()
        old = {
            name: value for name, value in row.items() if name not in new and name not in ("id", "request", "results")
        }
        request = new_job().request.to_dict()
        values = {**old, "inputs": [], "seconds": {}, "results": {}, "request": request, "id": "video_2"}
        # Through the table, but with the old columns only, as that process does.
        connection.execute(insert(jobs).values(values))
    assert {job.id for job in store.queued("debug", 10)} == {"video_1", "video_2"}
    store.close()


def test_a_database_of_a_newer_version_is_refused_and_not_touched(engine: Engine, database_url: str) -> None:
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    store = JobStore(database_url)
    with pytest.raises(ConfigError, match=f"has schema 9999, which is newer .*{newest_revision()}"):
        store.create_tables()
    assert revision_of(engine) == "9999"
    store.close()


def test_a_migration_that_fails_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE identity (id VARCHAR(64))"))  # in the way of the last table
    with pytest.raises(Exception, match="already exists"):
        migrate(engine)
    columns = {column["name"] for column in inspect(engine).get_columns("jobs")}
    assert "cost" not in columns
    assert revision_of(engine) is None
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE identity"))
    migrate(engine)
    assert revision_of(engine) == newest_revision()


CHILD = """
import sys
from serve.store.jobs import JobStore
store = JobStore(sys.argv[1])
store.create_tables()
print(store.counts(), store.identity())
"""


@pytest.mark.parametrize("begin", ["empty", "old"])
def test_processes_that_start_at_once_migrate_once(engine: Engine, database_url: str, begin: str) -> None:
    if begin == "old":
        make_old(engine)

    def child(_: int) -> str:
        command = [sys.executable, "-c", CHILD, database_url]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(4) as pool:
        outputs = set(pool.map(child, range(4)))
    assert len(outputs) == 1, outputs
    assert revision_of(engine) == newest_revision()


def test_starting_again_needs_no_lock(database_url: str) -> None:
    first, second = JobStore(database_url), JobStore(database_url)
    first.create_tables()
    job = created(first)
    with first._durable.begin() as writing:
        writing.execute(jobs.update().values(step=1))
        second.create_tables()  # would wait for the writer
    assert second.get("a", job.id) is not None
    first.close()
    second.close()


def test_the_oldest_known_schema_is_the_one_before_there_were_versions() -> None:
    assert min(known_revisions()) == BEFORE_MIGRATIONS


def test_the_stores_name_stays_the_same(database_url: str) -> None:
    stores = [JobStore(database_url) for _ in range(2)]
    for store in stores:
        store.create_tables()
    assert len({store.identity() for store in stores}) == 1
    for store in stores:
        store.close()


def test_a_folder_of_a_database_may_have_any_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("50% of #1?")
    engine = create_engine(f"sqlite:///{folder / 'x'}.sqlite")
    migrate(engine)
    assert revision_of(engine) == newest_revision()
    engine.dispose()
