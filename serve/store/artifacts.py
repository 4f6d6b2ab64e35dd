"""Bytes that outlive a process: inputs and results, in a local folder or an S3-compatible bucket.

Keys are ours, never a user's path. What is written is whole: locally a temporary file is flushed to
disk and renamed, a bucket publishes an object only when it is complete.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from pusa_dist.errors import ConfigError

_DELETE_ATTEMPTS = 5
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def input_key(job_id: str, index: int) -> str:
    """Key of a job's uploaded image or clip."""
    return f"{job_prefix(job_id)}/inputs/{index}"


def job_prefix(job_id: str) -> str:
    """Everything of a job lies under this key."""
    return f"jobs/{job_id}"


class ArtifactStore:
    """Files under one fsspec URL; safe to use from several threads and processes.

    Args:
        url: ``file:///folder`` or a plain path, or ``s3://bucket/prefix`` (credentials and endpoint as
            usual for AWS clients).
    """

    def __init__(self, url: str) -> None:
        # Another process may have written since: never answer from a cached listing.
        options: dict[str, Any] = {"use_listings_cache": False}
        if url.startswith(("s3:", "s3a:")):
            # Links signed the old way, botocore's default in one region, fail on encrypted buckets.
            options["config_kwargs"] = {"signature_version": "s3v4"}
        try:
            self._fs, root = url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"artifacts_url={url} cannot be opened: {error}") from error
        self._root = root.rstrip("/")
        protocols = self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        self.is_local = "file" in protocols

    def put(self, key: str, data: bytes) -> None:
        """Write bytes."""
        if self.is_local:
            with _replacing(Path(self._path(key))) as file:
                file.write(data)
        else:
            self._fs.pipe_file(self._path(key), data)

    def put_file(self, key: str, path: Path) -> None:
        """Copy a file of this machine into the store."""
        if self.is_local:
            with path.open("rb") as source, _replacing(Path(self._path(key))) as file:
                shutil.copyfileobj(source, file)
        else:
            self._fs.put_file(str(path), self._path(key))

    def read(self, key: str) -> bytes:
        """All bytes of an artifact.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._fs.cat_file(self._path(key))

    def open(self, key: str) -> BinaryIO:
        """An artifact as a seekable binary file.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._fs.open(self._path(key), "rb")

    def size(self, key: str) -> int:
        """Bytes of an artifact.

        Raises:
            FileNotFoundError: there is none.
        """
        return int(self._fs.info(self._path(key))["size"])

    def redirect_url(self, key: str, seconds: int, content_type: str | None = None) -> str | None:
        """A link that serves the artifact without our help for a while; None when the store is local."""
        if self.is_local:
            return None
        extra = {} if content_type is None else {"ResponseContentType": content_type}
        return str(self._fs.sign(self._path(key), expiration=seconds, **extra))

    def delete(self, prefix: str) -> None:
        """Remove an artifact, or every artifact below a prefix; nothing there is fine.

        Raises:
            OSError: the store cannot be reached, or something goes on writing there.
        """
        path = self._path(prefix)
        for attempt in range(_DELETE_ATTEMPTS):
            try:
                self._fs.rm(path, recursive=True)
            except FileNotFoundError:  # nothing there, or a writer renamed a file meanwhile
                pass
            except OSError:  # a writer added a file meanwhile
                if attempt == _DELETE_ATTEMPTS - 1:
                    raise
            if not self._fs.exists(path):
                return
        raise OSError(f"{prefix} is being written to and could not be removed; try again")

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise ValueError(f"artifact key {key!r}: segments of letters, digits, dot, dash and underscore only")
        return f"{self._root}/{key}"


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
    except BaseException:
        os.unlink(temporary)
        raise
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
