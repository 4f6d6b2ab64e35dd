import pytest

from tests.distributed.ranks import run_ranks as launch


@pytest.fixture(scope="session")
def run_ranks():
    return launch
