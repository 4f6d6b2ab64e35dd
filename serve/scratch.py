"""Temporary folders that do not outlive a process that was killed: the next one of its kind removes them.

A folder belongs to whoever holds the lock on it, which the kernel lets go with the process.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_YOUNG_S = 60.0
"""A folder may be this old before its owner has locked it."""


@contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """A temporary folder for as long as a ``with`` block lasts.

    Args:
        kind: what it is for; folders of this kind that nobody holds any more are removed.
    """
    prefix = f"pusa-{kind}-"
    _remove_abandoned(Path(tempfile.gettempdir()), prefix)
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        handle = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(handle)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        try:
            status = folder.lstat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S:
                _remove_unless_held(folder)
        except OSError:  # its owner, or another of our kind, was faster
            continue


def _remove_unless_held(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(handle)
