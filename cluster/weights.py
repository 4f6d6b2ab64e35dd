"""``python -m cluster.weights``: weights brought to a node's disk and held against their digests.

The init container of every pod that computes. A file that is there and right is left alone, so on a disk
that is kept the second start only reads. What is wrong at the end is said by name, and the pod does not start.
"""

import argparse
import fnmatch
import hashlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import fsspec

_CHUNK = 16 * 2**20
_AT_ONCE = 4


def wanted(sums: str, patterns: Sequence[str]) -> dict[str, str]:
    """Digests by file name, of a ``sha256sum`` listing; of the names that match a pattern where there are any.

    Raises:
        ValueError: a line is no digest and name, or leads out of the folder.
    """
    digests = {}
    for line in filter(None, map(str.strip, sums.splitlines())):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"SHA256SUMS: not a digest, two spaces and a name below the folder: {line!r}")
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            digests[name] = digest
    return digests


def fetch(source: str, folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Bring what is missing or wrong from an fsspec URL; returns what is wrong after it, a sentence a file."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        answers = threads.map(lambda one: _fetch_one(source, folder, *one), digests.items())
        return [answer for answer in answers if answer is not None]


def _fetch_one(source: str, folder: Path, name: str, digest: str) -> str | None:
    path = folder / name
    if path.exists() and _digest(_read(path)) == digest:
        return None
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with fsspec.open(f"{source.rstrip('/')}/{name}", "rb") as remote, part.open("wb") as local:
            found = _digest(_copied(iter(lambda: remote.read(_CHUNK), b""), local))
        if found != digest:
            part.unlink()
            return f"{name}: SHA-256 is {found}, SHA256SUMS says {digest}"
        os.replace(part, path)  # what has the name is whole
    except OSError as error:
        part.unlink(missing_ok=True)
        return f"{name}: {type(error).__name__}: {error}"
    return None


def _read(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        yield from iter(lambda: file.read(_CHUNK), b"")


def _copied(chunks: Iterable[bytes], file: BinaryIO) -> Iterable[bytes]:
    for chunk in chunks:
        file.write(chunk)
        yield chunk


def _digest(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch and check; returns 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m cluster.weights", description=__doc__)
    parser.add_argument("configuration", type=Path, help="folder with SHA256SUMS and source, a file with an fsspec URL")
    parser.add_argument("folder", type=Path, help="where the weights go")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="fetch only the files with these names (default: all)"
    )
    options = parser.parse_args(arguments)
    try:
        digests = wanted((options.configuration / "SHA256SUMS").read_text(), options.only)
        source = (options.configuration / "source").read_text().strip()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"weights: {error}\n")
        return 1
    wrong = fetch(source, options.folder, digests)
    sys.stderr.writelines(f"weights: {one}\n" for one in wrong)
    sys.stderr.write(f"weights: {len(digests) - len(wrong)} of {len(digests)} files are there and right\n")
    return int(bool(wrong) or not digests)


if __name__ == "__main__":
    sys.exit(main())
