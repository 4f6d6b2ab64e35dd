"""Weights come to a node whole and right, or the pod does not start."""

import hashlib

import pytest

from cluster.weights import main, wanted

FILES = {"a/one.safetensors": b"one" * 1000, "two.pth": b"two"}


@pytest.fixture
def given(tmp_path):
    """A source, a configuration that names it, and an empty folder."""
    for name, content in FILES.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    configuration = tmp_path / "configuration"
    configuration.mkdir()
    (configuration / "source").write_text(f"file://{tmp_path}/source/\n")
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in FILES.items())
    (configuration / "SHA256SUMS").write_text(sums)
    return tmp_path / "source", configuration, tmp_path / "models"


def run(given, *more):
    return main([str(given[1]), str(given[2]), *more])


def test_everything_comes_and_what_is_right_is_left_alone(given):
    assert run(given) == 0
    assert {name: (given[2] / name).read_bytes() for name in FILES} == FILES
    (given[0] / "two.pth").unlink()
    assert run(given) == 0


def test_what_was_damaged_is_brought_again(given):
    run(given)
    (given[2] / "two.pth").write_bytes(b"damaged")
    assert run(given) == 0
    assert (given[2] / "two.pth").read_bytes() == FILES["two.pth"]


def test_a_source_that_has_something_else_is_refused_by_name(given, capsys):
    (given[0] / "two.pth").write_bytes(b"evil")
    assert run(given) == 1
    assert "two.pth: SHA-256 is" in capsys.readouterr().err
    assert [path.name for path in given[2].iterdir()] == ["a"]


def test_a_file_that_is_nowhere_is_said_by_name(given, capsys):
    (given[0] / "two.pth").unlink()
    assert run(given) == 1
    assert "two.pth: FileNotFoundError" in capsys.readouterr().err


def test_only_what_a_role_reads_comes(given):
    assert run(given, "--only", "*.pth") == 0
    assert [path.name for path in given[2].iterdir()] == ["two.pth"]
    assert run(given, "--only", "*.bin") == 1


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", ""])
def test_a_name_outside_the_folder_is_refused(name):
    with pytest.raises(ValueError, match="SHA256SUMS"):
        wanted(f"{'0' * 64}  {name}\n", [])
