from importlib.resources import files

import pytest
import yaml

from pusa_dist.config import ParallelConfig, load_model_config
from pusa_dist.parallel.mesh import free_port
from pusa_dist.worker import Worker, WorkerOptions


@pytest.fixture
def debug_yaml(tmp_path):
    """Writes the debug model with some settings replaced; returns the path."""

    def write(**changes):
        values = yaml.safe_load((files("configs") / "model" / "debug.yaml").read_text())
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return str(path)

    return write


@pytest.fixture(scope="module")
def worker():
    """A gang of one rank with the debug model."""
    one = Worker(load_model_config("debug"), ParallelConfig(), WorkerOptions(threads=1))
    one.join(0, 1, "127.0.0.1", free_port())
    yield one
    one.leave()
