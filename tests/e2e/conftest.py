"""The application of a module that has a ``config``, for as long as the module lasts."""

import pytest

from serve.store.jobs import JobStore
from tests.e2e.local_app import local_app


@pytest.fixture(scope="module")
def client(config):
    with local_app(config) as http:
        yield http


@pytest.fixture(scope="module")
def job_of(config, client):
    """Looks a job up in the store."""
    store = JobStore(config.resolved_database_url)
    yield lambda job_id: store.get("local", job_id)
    store.close()
