"""The artifact store, in a folder and in a bucket (moto's S3 server on loopback)."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pusa_dist.errors import ConfigError
from serve.store.artifacts import ArtifactStore, input_key, job_prefix

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
