"""Bytes that outlive a process: inputs and results, in a local folder or an S3-compatible bucket.

Keys are ours, never a user's path. What is written is whole: locally a temporary file is flushed to
disk and renamed, a bucket publishes an object only when it is complete. Whatever goes wrong with disk
or bucket is one error, which names neither path nor key.
"""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from pusa_dist.errors import ConfigError, PusaError

_DELETE_ATTEMPTS = 5
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


_JOBS = "jobs"
_OWNER = "database"
# A bucket that is away is found out within seconds, whoever waits for the answer.
_BUCKET_PATIENCE: dict[str, Any] = {
    "connect_timeout": 5,
    "read_timeout": 30,
    "retries": {"max_attempts": 2, "mode": "standard"},
}
_WRITE_S = 30.0
_WRITE_BYTES_PER_S = 1e6
"""A bucket that takes longer for a write is away. (Its client waits for ever to be told to send the bytes.)"""
_PART_BYTES = 2**24
_PARTS_AT_ONCE = 4
"""Of a file that is written in parts: at the slowest pace that is allowed, some part is done within about a minute."""


class StorageError(PusaError, OSError):
    """The artifact store cannot do it now: the disk is full, or the bucket does not answer; try again later.

    Its ``errno`` is ``ENOSPC`` or ``EDQUOT`` for a full disk, ``EIO`` for a bucket that fails in a way of its own.
    """


def input_key(job_id: str, index: int) -> str:
    """Key of a job's uploaded image or clip."""
    return f"{job_prefix(job_id)}/inputs/{index}"


def job_prefix(job_id: str) -> str:
    """Everything of a job lies under this key."""
    return f"{_JOBS}/{job_id}"


def unfinished_prefixes(job_id: str) -> tuple[str, str]:
    """What attempts at a job write lies under these keys: of no use once it has ended without a result."""
    return f"{job_prefix(job_id)}/attempts", f"{job_prefix(job_id)}/checkpoints"


class ArtifactStore:
    """Files under one fsspec URL; safe to use from several threads and processes.

    Every method raises ``StorageError`` when the disk or the bucket fails.

    Args:
        url: ``file:///folder`` or a plain path, or ``s3://bucket/prefix`` (credentials and endpoint as
            usual for AWS clients).

    Raises:
        ConfigError: there is no store of this kind.
    """

    def __init__(self, url: str) -> None:
        # Another process may have written since: never answer from a cached listing.
        options: dict[str, Any] = {"use_listings_cache": False}
        if url.startswith(("s3:", "s3a:")):
            # Links signed the old way, botocore's default in one region, fail on encrypted buckets.
            options["config_kwargs"] = {"signature_version": "s3v4", **_BUCKET_PATIENCE}
        try:
            self._fs, root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"artifacts_url={url} cannot be opened: {error}") from error
        self._root = root.rstrip("/")
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        self.is_local = "file" in protocols
        self._failures = (OSError,) if self.is_local else _bucket_failures()

    def put(self, key: str, data: bytes) -> None:
        """Write bytes; if that fails, what was there before is there still."""
        path = self._path(key)
        with self._failing(is_write=True):
            if self.is_local:
                with _replacing(Path(path)) as file:
                    file.write(data)
            else:
                self._fs.pipe_file(path, data, timeout=_WRITE_S + len(data) / _WRITE_BYTES_PER_S)

    def put_file(self, key: str, path: Path, moves_on: Callable[[], None] = lambda: None) -> None:
        """Copy a file of this machine into the store; if that fails, what was there before is there still.

        Args:
            key: where to.
            path: where from.
            moves_on: called after every part, from any thread; what it raises ends the copying.

        Raises:
            FileNotFoundError: there is no such file.
        """
        to = self._path(key)
        with path.open("rb") as source, self._failing(is_write=True):
            if self.is_local:
                with _replacing(Path(to)) as file:
                    while part := source.read(_PART_BYTES):
                        file.write(part)
                        moves_on()
            else:
                self._fs.put_file(
                    str(path),
                    to,
                    callback=Callback(hooks={"moves_on": lambda *_, **__: moves_on()}),
                    chunksize=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                    timeout=_WRITE_S + path.stat().st_size / _WRITE_BYTES_PER_S,
                )

    def read(self, key: str) -> bytes:
        """All bytes of an artifact.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._failing():
            return self._fs.cat_file(self._path(key))

    def open(self, key: str) -> BinaryIO:
        """An artifact as a seekable binary file.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._failing():
            return self._fs.open(self._path(key), "rb")

    def size(self, key: str) -> int:
        """Bytes of an artifact.

        Raises:
            FileNotFoundError: there is none.
        """
        with self._failing():
            return int(self._fs.info(self._path(key))["size"])

    def redirect_url(self, key: str, seconds: int, content_type: str | None = None) -> str | None:
        """A link that serves the artifact without our help for a while; None when the store is local."""
        if self.is_local:
            return None
        extra = {} if content_type is None else {"ResponseContentType": content_type}
        with self._failing():
            return str(self._fs.sign(self._path(key), expiration=seconds, **extra))

    def jobs(self) -> list[str]:
        """Ids of the jobs that have any file."""
        with self._failing():
            try:
                return sorted(
                    {path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path(_JOBS), detail=False)}
                )
            except FileNotFoundError:
                return []

    def owner(self) -> str | None:
        """Identity of the database whose files these are; None: nobody has said."""
        try:
            return self.read(_OWNER).decode()
        except FileNotFoundError:
            return None

    def own(self, identity: str) -> None:
        """Say whose files these are."""
        self.put(_OWNER, identity.encode())

    def is_empty(self) -> bool:
        """Whether there is no file but that which says whose they are."""
        with self._failing():
            try:
                entries = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                return True
        return {entry.rstrip("/").rpartition("/")[2] for entry in entries} <= {_OWNER}

    def delete(self, prefix: str) -> None:
        """Remove an artifact, or every artifact below a prefix; nothing there is fine."""
        path = self._path(prefix)
        for attempt in range(_DELETE_ATTEMPTS):
            with self._failing():
                try:
                    self._fs.rm(path, recursive=True)
                except FileNotFoundError:  # nothing there, or a writer renamed a file meanwhile
                    pass
                except OSError:  # a writer added a file meanwhile
                    if not self.is_local or attempt == _DELETE_ATTEMPTS - 1:
                        raise
                if not self._fs.exists(path):
                    return
        raise StorageError(errno.EBUSY, "files that are being removed are being written to; try again")

    def delete_others(self, prefix: str, keep: Collection[str]) -> int:
        """Remove every file below a prefix, half written ones too, but those of the keys in ``keep``.

        Returns:
            How many were removed.
        """
        top, kept = self._path(prefix), {self._path(key) for key in keep}
        removed = 0
        with self._failing():
            for path in self._fs.find(top):
                if path not in kept:
                    with suppress(FileNotFoundError):  # somebody else removed it
                        self._fs.rm_file(path)
                        removed += 1
            if self.is_local:
                _remove_empty_folders(Path(top))
        return removed

    @contextmanager
    def _failing(self, *, is_write: bool = False) -> Iterator[None]:
        """Whatever fails below is a ``StorageError``; that a file is not there is not a failure.

        Not chained to what was raised, which names paths and keys.
        """
        try:
            yield
        except StorageError:
            raise
        except self._failures as error:
            # Writing finds nothing missing but the bucket itself.
            if isinstance(error, FileNotFoundError) and not (is_write and not self.is_local):
                raise
            number = getattr(error, "errno", None) or errno.EIO
            raise StorageError(number, f"{type(error).__name__}: {os.strerror(number)}") from None

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise ValueError(f"artifact key {key!r}: segments of letters, digits, dot, dash and underscore only")
        return f"{self._root}/{key}"


def _bucket_failures() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, BotoCoreError, ClientError)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes ``path``'s place, on disk and at once, if the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):  # somebody deletes the whole folder
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_empty_folders(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        with suppress(OSError):  # not empty
            os.rmdir(folder)
