"""Temporary folders that do not outlive a process that was killed: the next one of its kind removes them.

A folder belongs to whoever holds the lock on it, which the kernel lets go with the process. It gets its name
when it is locked, so a folder of that name that is not locked has lost its owner.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMELESS = ".pusa-"


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """A temporary folder for as long as a ``with`` block lasts.

    Args:
        kind: what it is for; folders of this kind that nobody holds any more are removed.
    """
    prefix = f"pusa-{kind}-"
    nameless = Path(tempfile.mkdtemp(prefix=_NAMELESS))
    handle = os.open(nameless, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        folder = nameless.rename(nameless.parent / f"{prefix}{nameless.name.removeprefix(_NAMELESS)}")
        _remove_abandoned(folder.parent, prefix)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what is still written to goes the next time
    finally:
        os.close(handle)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        try:
            if folder.lstat().st_uid == os.getuid():
                _remove_unless_held(folder)
        except OSError:  # it is held, or another of our kind was faster
            continue


def _remove_unless_held(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(handle)
