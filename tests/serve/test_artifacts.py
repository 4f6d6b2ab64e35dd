"""The artifact store, in a folder and in a bucket (moto's S3 server on loopback)."""

import errno
import os
import pickle
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec
import httpx
import pytest
from sqlalchemy.exc import OperationalError

from pusa_dist.errors import Cancelled, ConfigError
from serve.store import artifacts
from serve.store.artifacts import ArtifactStore, StorageError, input_key, job_prefix
from serve.store.jobs import JobStore
from tests.serve.store_support import new_job

KEY = "jobs/video_1/attempts/1/video.mp4"
pytestmark = [
    # aiobotocore and moto's server close their sockets when collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return ArtifactStore(f"file://{tmp_path}/artifacts")
    return ArtifactStore(request.getfixturevalue("bucket"))


def test_what_is_put_is_read_back(store: ArtifactStore, tmp_path: Path) -> None:
    store.put(KEY, b"0123456789")
    assert store.read(KEY) == b"0123456789"
    assert store.size(KEY) == 10
    with store.open(KEY) as file:
        file.seek(4)
        assert file.read(3) == b"456"
    (tmp_path / "local.bin").write_bytes(b"from a file")
    store.put_file(KEY, tmp_path / "local.bin")
    assert store.read(KEY) == b"from a file"
    assert store.size(KEY) == 11


def test_a_file_is_copied_in_parts_and_may_be_stopped_after_any(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "_PART_BYTES", 5 * 2**20)  # a bucket takes no smaller ones
    data, said = os.urandom(16 * 2**20), []
    (tmp_path / "local.bin").write_bytes(data)
    store.put_file(KEY, tmp_path / "local.bin", lambda: said.append(True))
    assert store.read(KEY) == data
    assert len(said) >= 4
    store.delete(KEY)

    def stop() -> None:
        said.append(True)
        if len(said) == 2:
            raise Cancelled

    said.clear()
    with pytest.raises(Cancelled):
        store.put_file(KEY, tmp_path / "local.bin", stop)
    with pytest.raises(FileNotFoundError):
        store.read(KEY)


def test_what_another_process_wrote_is_seen(store: ArtifactStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.size(KEY)
    with pytest.raises(FileNotFoundError):
        store.read(KEY)
    store.put(KEY, b"x")
    assert store.size(KEY) == 1


def test_deleting_a_prefix_removes_everything_below_and_nothing_beside(store: ArtifactStore) -> None:
    for key in (input_key("video_1", 0), KEY, input_key("video_12", 0)):
        store.put(key, b"x")
    store.delete(job_prefix("video_1"))
    for key in (input_key("video_1", 0), KEY):
        with pytest.raises(FileNotFoundError):
            store.read(key)
    assert store.read(input_key("video_12", 0)) == b"x"
    store.delete(job_prefix("video_1"))


def test_deleting_removes_what_a_writer_adds_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(f"file://{tmp_path}")
    store.put("jobs/a/1", b"x")
    remove, errors = store._fs.rm, [OSError("directory not empty"), FileNotFoundError("renamed")]

    def rm(path: str, recursive: bool) -> None:
        if errors:
            raise errors.pop()
        remove(path, recursive=recursive)

    monkeypatch.setattr(store._fs, "rm", rm)
    store.delete("jobs/a")
    assert not (tmp_path / "jobs/a").exists()


def test_files_that_nobody_names_are_removed_and_the_others_kept(store: ArtifactStore) -> None:
    kept = [input_key("video_1", 0), KEY]
    for key in (*kept, "jobs/video_1/attempts/2/frames.zip", "jobs/video_1/checkpoints/1-4", "jobs/video_12/a"):
        store.put(key, b"x")
    assert store.delete_others("jobs/video_1", kept) == 2
    assert store.delete_others("jobs/video_1", kept) == 0
    assert store.delete_others("jobs/video_2", kept) == 0
    for key in (*kept, "jobs/video_12/a"):
        assert store.read(key) == b"x"
    assert store.delete_others("jobs/video_1", []) == 2
    assert store.jobs() == ["video_12"]


def test_half_written_files_and_empty_folders_are_removed_with_the_others(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.put("jobs/a/attempts/1/video.mp4", b"x")
    (tmp_path / "jobs/a/attempts/1/.partial-killed").write_bytes(b"x")
    (tmp_path / "jobs/a/attempts/2").mkdir()
    assert store.delete_others("jobs/a", ["jobs/a/attempts/1/video.mp4"]) == 1
    assert [path.name for path in (tmp_path / "jobs/a").rglob("*")] == ["attempts", "1", "video.mp4"]
    assert store.delete_others("jobs/a", []) == 1
    assert not (tmp_path / "jobs/a").exists()


def test_jobs_that_have_files_are_listed(store: ArtifactStore) -> None:
    assert store.jobs() == []
    for key in (input_key("video_2", 0), input_key("video_1", 0), input_key("video_1", 1), "database"):
        store.put(key, b"x")
    assert store.jobs() == ["video_1", "video_2"]


def test_a_bucket_gives_a_link_that_works_without_credentials(bucket: str) -> None:
    store = ArtifactStore(bucket)
    store.put(KEY, b"0123456789")
    assert not store.is_local
    link = store.redirect_url(KEY, 60, "video/mp4")
    assert link is not None
    answer = httpx.get(link, headers={"Range": "bytes=2-4"})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (206, b"234", "video/mp4")


def test_a_folder_gives_no_link(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    assert store.is_local
    assert store.redirect_url(KEY, 60) is None


def test_a_write_that_fails_leaves_the_old_bytes_and_no_rest(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "artifacts"))
    store.put(KEY, b"old")
    with pytest.raises(FileNotFoundError):
        store.put_file(KEY, tmp_path / "missing")
    with pytest.raises(TypeError):
        store.put(KEY, "not bytes")  # type: ignore[arg-type]
    assert store.read(KEY) == b"old"
    assert [path.name for path in (tmp_path / "artifacts").rglob("*") if path.is_file()] == ["video.mp4"]


def test_readers_see_the_old_or_the_new_bytes_and_never_a_mixture(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    versions = [bytes([n]) * 200_000 for n in range(8)]
    store.put(KEY, versions[0])
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(store.put, KEY, data) for data in versions]
        reads = [pool.submit(store.read, KEY) for _ in range(40)]
        assert all(read.result() in versions for read in reads)
        for write in writes:
            write.result()


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a\x00b", "a b"])
def test_a_key_that_is_not_ours_is_refused(tmp_path: Path, key: str) -> None:
    store = ArtifactStore(str(tmp_path))
    with pytest.raises(ValueError, match="artifact key"):
        store.put(key, b"x")
    with pytest.raises(ValueError, match="artifact key"):
        store.delete(key)


def test_an_unknown_kind_of_store_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="nonsense://"):
        ArtifactStore("nonsense://x")


@pytest.fixture(params=["tmpfs", "patched"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with room for less than 100,000 bytes."""
    if request.param == "patched":

        def fsync(handle: int) -> None:
            if os.fstat(handle).st_size > 90_000:
                raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

        monkeypatch.setattr(os, "fsync", fsync)
        yield tmp_path
        return
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(tmp_path)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here (needs root)")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_full_disk_refuses_a_file_and_leaves_no_part_of_it(full_disk: Path) -> None:
    store = ArtifactStore(str(full_disk))
    store.put(KEY, b"old")
    with pytest.raises(StorageError) as refusal:
        store.put(KEY, b"x" * 100_000)
    assert refusal.value.errno == errno.ENOSPC
    assert str(full_disk) not in str(refusal.value)
    assert refusal.value.__cause__ is None
    with pytest.raises(StorageError):
        store.put("jobs/video_2/inputs/0", b"x" * 100_000)
    assert [path.name for path in full_disk.rglob("*") if path.is_file()] == ["video.mp4"]
    assert store.read(KEY) == b"old"
    store.put(KEY, b"new")
    assert store.read(KEY) == b"new"


@pytest.mark.parametrize("full_disk", ["tmpfs"], indirect=True)
def test_a_full_disk_refuses_a_job_and_the_database_is_whole_afterwards(full_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", str(full_disk)], check=True)
    database = JobStore(f"sqlite:///{full_disk}/jobs.sqlite")
    database.create_tables()
    kept = new_job()
    database.create(kept)
    filler = full_disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    refused = [new_job() for _ in range(3)]
    for job in refused:
        with pytest.raises(OperationalError):
            database.create(job)
    filler.unlink()
    assert [database.get("a", job.id) for job in (kept, *refused)] == [kept, None, None, None]
    database.create(refused[0])
    assert database.get("a", refused[0].id) == refused[0]
    database.close()


def test_a_storage_error_crosses_processes_whole() -> None:
    error = StorageError(errno.ENOSPC, "No space left on device")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, copy.errno) == (StorageError, error.args, errno.ENOSPC)


@pytest.fixture(params=["refused", "silent", "failing", "no-bucket"])
def broken_bucket(request: pytest.FixtureRequest, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket that is away: nobody listens, nobody answers, a server that fails, a server without the bucket."""
    for name, value in {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # they were made for another endpoint
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint if request.param == "no-bucket" else f"http://{host}:{port}")
        if request.param == "refused":
            server.close()
        if request.param == "failing":
            threading.Thread(target=_answer_500, args=(server,), daemon=True).start()
        if request.param == "silent":
            monkeypatch.setattr(artifacts, "_WRITE_S", 2.0)
        yield "s3://nowhere/prefix"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def _answer_500(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_a_bucket_that_is_away_is_one_error_whatever_is_asked(broken_bucket: str, tmp_path: Path) -> None:
    store = ArtifactStore(broken_bucket)
    (tmp_path / "file").write_bytes(b"x")
    began = time.monotonic()
    for ask in (lambda: store.put(KEY, b"x"), lambda: store.put_file(KEY, tmp_path / "file")):
        with pytest.raises(StorageError) as refusal:
            ask()
        assert refusal.value.errno not in (errno.ENOSPC, errno.EDQUOT)
        assert "nowhere" not in str(refusal.value)
        assert KEY not in str(refusal.value)
    assert time.monotonic() - began < 60
