"""The rules of who may import whom, where import-linter cannot see."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pusa_dist

ROOT = Path(pusa_dist.__file__).parents[1]
ENGINE = sorted((ROOT / "pusa_dist").rglob("*.py"))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_public_names_are_sorted_and_exist():
    assert pusa_dist.__all__ == sorted(pusa_dist.__all__)
    assert all(hasattr(pusa_dist, name) for name in pusa_dist.__all__)


@pytest.mark.parametrize("module", ["pusa_dist", "pusa_dist.media.probe", "pusa_dist.tokenizer", "serve.http.api"])
def test_what_a_gateway_imports_does_not_import_torch(module):
    done = run_python(f"import sys, {module}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_engine_runs_where_no_service_library_is_installed():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in ENGINE
        if path.name != "__main__.py"
    ]
    blocked = ["ray", "fastapi", "pydantic", "starlette", "sqlalchemy", "serve", "cluster"]
    code = "import sys, importlib\n"
    code += f"for name in {blocked}: sys.modules[name] = None\n"
    code += f"for name in {modules}: importlib.import_module(name)\n"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_only_parallel_worker_and_distributed_training_know_of_ranks():
    allowed = {"worker.py", "experts.py", "training/distributed.py"}
    users = {
        path.relative_to(ROOT / "pusa_dist").as_posix()
        for path in ENGINE
        if re.search(r"torch\.distributed", path.read_text())
    }
    assert {name for name in users if not name.startswith("parallel/")} <= allowed
    assert not any(name.startswith("model/") for name in users)
