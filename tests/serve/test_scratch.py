"""Temporary folders: one that a killed process leaves is removed by the next of its kind, and no other is."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from serve.scratch import scratch_folder

HOLD = """
import time
from serve.scratch import scratch_folder
with scratch_folder("test") as folder:
    (folder / "big").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_ends_with_its_block(parent):
    with scratch_folder("test") as folder:
        assert folder.parent == parent
    assert list(parent.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(parent):
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        held = Path(process.stdout.readline().strip())
        with scratch_folder("test"):
            assert held.exists()
        process.send_signal(signal.SIGKILL)
    with scratch_folder("other"):
        assert held.exists()
    with scratch_folder("test"):
        assert not held.exists()


def test_a_folder_that_nobody_holds_is_removed_with_what_is_in_it(parent):
    (parent / "pusa-test-x" / "deep").mkdir(parents=True)
    (parent / "somebody-elses").mkdir()
    with scratch_folder("test"), scratch_folder("test"):
        assert not (parent / "pusa-test-x").exists()
        assert len(list(parent.glob("pusa-test-*"))) == 2
    assert [path.name for path in parent.iterdir()] == ["somebody-elses"]


def test_a_link_is_not_followed(parent, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "precious").touch()
    (parent / "pusa-test-link").symlink_to(elsewhere)
    with scratch_folder("test"):
        assert (elsewhere / "precious").exists()
