from importlib.resources import files

import pytest
import yaml


@pytest.fixture
def debug_yaml(tmp_path):
    """Writes the debug model with some settings replaced; returns the path."""

    def write(**changes):
        values = yaml.safe_load((files("configs") / "model" / "debug.yaml").read_text())
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return str(path)

    return write
