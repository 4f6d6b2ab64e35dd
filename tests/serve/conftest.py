"""The stores of production, on this machine: a PostgreSQL of our own, and S3 as moto plays it; and stand-ins."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url

from serve.store.jobs import JobStore
from tests.serve.api_support import Service, open_service
from tests.serve.dispatcher_support import World
from tests.serve.postgres import own_postgres
from tests.serve.store_support import Clock


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server of our own."""
    pytest.importorskip("psycopg", reason="no PostgreSQL: psycopg is not installed (extra 'postgres')")
    with own_postgres() as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """An empty database."""
    with _empty_database(postgres_server) as url:
        yield url


@pytest.fixture
def other_postgres_url(postgres_server: str) -> Iterator[str]:
    """A second one."""
    with _empty_database(postgres_server) as url:
        yield url


@contextmanager
def _empty_database(postgres_server: str) -> Iterator[str]:
    """A database, as a schema of the server's: those are made and dropped in no time."""
    name = f"test_{secrets.token_hex(4)}"
    server = create_engine(postgres_server, poolclass=NullPool)
    with server.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    url = make_url(postgres_server).update_query_dict({"options": f"-csearch_path={name}"})
    yield url.render_as_string(hide_password=False)
    with server.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once in a file and once on a server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/jobs.sqlite"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database_url: str, clock: Clock) -> Iterator[JobStore]:
    """A job store of either kind, whose clock stands at 1000 s."""
    opened = JobStore(database_url, clock)
    opened.create_tables()
    yield opened
    opened.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A gateway and its API."""
    with open_service(tmp_path) as opened:
        yield opened


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Stores in a folder, and stages and a gang for a dispatcher to drive jobs through."""
    world = World(tmp_path)
    yield world
    world.store.close()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    boto3: Any = pytest.importorskip("boto3")
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="videos")
    yield "s3://videos/prefix"
    for item in client.list_objects_v2(Bucket="videos").get("Contents", []):
        client.delete_object(Bucket="videos", Key=item["Key"])
    client.delete_bucket(Bucket="videos")
    client.close()
