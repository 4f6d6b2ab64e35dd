"""Backup and restore, from and to either database, while others write."""

import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from pusa_dist.errors import ConfigError
from serve.policy.cost import StepShape
from serve.policy.quota import Quota
from serve.store.artifacts import ArtifactStore, job_prefix
from serve.store.backup import back_up, restore
from serve.store.database import open_database
from serve.store.jobs import Artifact, Job, JobStore
from serve.store.tables import metadata
from serve.sweeper import sweep_orphans
from tests.serve.store_support import LEASE_S, Clock, claimed, created, job_of, new_job


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "artifacts"))


@pytest.fixture
def backup(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "backup"))


@pytest.fixture
def new_artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "new-artifacts"))


@pytest.fixture(params=["to-sqlite", "to-postgres"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "to-sqlite":
        return f"sqlite:///{tmp_path}/new/jobs.sqlite"
    return str(request.getfixturevalue("other_postgres_url"))


def rows(url: str) -> dict[str, list[dict[str, Any]]]:
    engine = open_database(url, "NORMAL")
    with engine.connect() as connection:
        found = {
            table.name: [dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()]
            for table in metadata.sorted_tables
        }
    engine.dispose()
    return found


def keys_of(job: Job) -> list[str]:
    keys = [one.key for one in (*job.inputs, *job.results.values())]
    return keys + [key for key in (job.checkpoint_key, job.preview_key) if key is not None]


def fill(store: JobStore, artifacts: ArtifactStore) -> list[Job]:
    """Jobs in every state with their files, and a row in every table."""
    store.set_tenant("a", weight=2.0, limits=asdict(Quota(max_queued=50, cost_per_day=1.5)))
    store.create_key("a", "laptop")
    waiting, running = created(store, idempotency_key="k"), claimed(store)
    done, cancelled = claimed(store, webhook_url="https://example.com"), created(store)
    for job in (waiting, running, done, cancelled):
        artifacts.put(job.inputs[0].key, job.id.encode())
    folder = job_prefix(running.id)
    artifacts.put(f"{folder}/checkpoints/1-2", b"state")
    store.checkpoint(running.id, 1, f"{folder}/checkpoints/1-2", 2)
    video = Artifact(key=f"{job_prefix(done.id)}/attempts/1/video.mp4", content_type="video/mp4", num_bytes=3)
    artifacts.put(video.key, b"mp4")
    store.complete(done.id, 1, {"video": video}, {"denoise": 1.5})
    store.request_cancel("a", cancelled.id)
    store.charge("a", 3.0)
    store.record_step_seconds("debug", {StepShape(num_tokens=48, uses_guidance=True): 0.5})
    return [waiting, running, done, cancelled]


def test_what_is_restored_equals_what_was_backed_up(
    store: JobStore,
    database_url: str,
    artifacts: ArtifactStore,
    backup: ArtifactStore,
    new_url: str,
    new_artifacts: ArtifactStore,
    clock: Clock,
) -> None:
    jobs = fill(store, artifacts)
    done = back_up(store, artifacts, backup)
    assert (done.num_jobs, done.num_files, done.incomplete) == (4, 6, ())
    assert restore(backup, new_url, new_artifacts) == done
    assert rows(new_url) == rows(database_url)
    restored = JobStore(new_url, clock)
    restored.create_tables()
    for job in jobs:
        for key in keys_of(job_of(store, job)):
            assert new_artifacts.read(key) == artifacts.read(key)
    # It is a working store: what ran goes on from its checkpoint, and what is written has numbers of its own.
    assert restored.requeue_expired(clock.now + LEASE_S + 1) == {jobs[1].id: "queued"}
    again = restored.claim(jobs[1].id, "me", LEASE_S)
    assert again is not None
    assert (again.attempt, again.checkpoint_step) == (2, 2)
    restored.create_key("a")
    assert len(restored.audit()) == len(store.audit()) + 1
    assert sweep_orphans(restored, new_artifacts, clock.now + 1e9) == 0
    assert sorted(new_artifacts.jobs()) == sorted(job.id for job in jobs)
    restored.close()


def test_files_that_are_replaced_or_deleted_meanwhile_leave_a_whole_backup(
    store: JobStore, artifacts: ArtifactStore, backup: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, running, done, cancelled = fill(store, artifacts)
    read, moved = artifacts.read, []

    def read_late(key: str) -> bytes:
        """The rows are read; before the first file is, the service goes on."""
        if not moved:
            moved.append(key)
            artifacts.delete(job_of(store, running).checkpoint_key or "")
            store.delete("a", waiting.id)
            artifacts.delete(job_prefix(waiting.id))
            artifacts.delete(job_prefix(cancelled.id))
        return read(key)

    monkeypatch.setattr(artifacts, "read", read_late)
    copied = back_up(store, artifacts, backup)
    assert (copied.num_jobs, copied.incomplete) == (2, (cancelled.id,))
    target = ArtifactStore(str(tmp_path / "new"))
    restore(backup, f"sqlite:///{tmp_path}/new.sqlite", target)
    restored = JobStore(f"sqlite:///{tmp_path}/new.sqlite")
    assert {job.id for job in restored.page("a", None, 10, "asc")[0]} == {running.id, done.id}
    begins_anew = job_of(restored, running)
    assert (begins_anew.checkpoint_key, begins_anew.checkpoint_step, begins_anew.step) == (None, None, 0)
    assert sorted(target.jobs()) == sorted([running.id, done.id])
    restored.close()


def test_a_backup_taken_while_many_write_is_whole(
    store: JobStore, artifacts: ArtifactStore, backup: ArtifactStore, tmp_path: Path
) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []

    def live(number: int) -> None:
        """What gateway and dispatcher do with a job, again and again."""
        try:
            while not stop.is_set():
                job = new_job(f"t{number}", created_at=time.time())
                artifacts.put(job.inputs[0].key, b"input")
                store.create(job)
                store.claim(job.id, "me", LEASE_S)
                former = None
                for step in (1, 2):
                    key = f"{job_prefix(job.id)}/checkpoints/1-{step}"
                    artifacts.put(key, b"state")
                    store.checkpoint(job.id, 1, key, step)
                    if former is not None:
                        artifacts.delete(former)
                    former = key
                video = Artifact(key=f"{job_prefix(job.id)}/attempts/1/v.mp4", content_type="video/mp4", num_bytes=1)
                artifacts.put(video.key, b"video")
                store.complete(job.id, 1, {"video": video}, {})
                artifacts.delete(f"{job_prefix(job.id)}/checkpoints")
                if number == 0:
                    store.delete("t0", job.id)
                    artifacts.delete(job_prefix(job.id))
        except BaseException as error:
            errors.append(error)
            raise

    writers = [threading.Thread(target=live, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 120
    while store.counts().get("completed", 0) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    copied = back_up(store, artifacts, backup)
    stop.set()
    for writer in writers:
        writer.join()
    assert errors == []
    assert copied.incomplete == ()
    target, url = ArtifactStore(str(tmp_path / "new")), f"sqlite:///{tmp_path}/new.sqlite"
    assert restore(backup, url, target).num_jobs == copied.num_jobs >= 6
    restored = JobStore(url)
    jobs = [job for number in range(3) for job in restored.page(f"t{number}", None, 10_000, "asc")[0]]
    assert len(jobs) == copied.num_jobs
    for job in jobs:
        assert [target.read(key) for key in keys_of(job)], "every job has an input"
    # Of one moment: every completed job was counted when it completed.
    completed = sum(day.completed for number in range(3) for day in restored.usage(f"t{number}", "1970-01-01"))
    assert completed >= sum(job.status == "completed" for job in jobs)
    restored.close()


def test_a_target_that_holds_anything_is_refused_and_left_as_it_is(
    store: JobStore, database_url: str, artifacts: ArtifactStore, backup: ArtifactStore, tmp_path: Path
) -> None:
    fill(store, artifacts)
    back_up(store, artifacts, backup)
    before = rows(database_url)
    empty = ArtifactStore(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="database to restore into is not empty"):
        restore(backup, database_url, empty)
    with pytest.raises(ConfigError, match="artifact store to restore into is not empty"):
        restore(backup, f"sqlite:///{tmp_path}/new.sqlite", artifacts)
    with pytest.raises(ConfigError, match="destination of the backup is not empty"):
        back_up(store, artifacts, backup)
    assert rows(database_url) == before
    assert empty.is_empty()


def test_what_is_no_whole_backup_is_refused(tmp_path: Path, backup: ArtifactStore) -> None:
    url, target = f"sqlite:///{tmp_path}/new.sqlite", ArtifactStore(str(tmp_path / "new"))
    with pytest.raises(ConfigError, match="no complete backup"):
        restore(backup, url, target)
    backup.put("backup.json", b"{")
    with pytest.raises(ConfigError, match="no complete backup"):
        restore(backup, url, target)
    backup.put("backup.json", json.dumps({"schema": "9999", "rows": {}, "files": 0}).encode())
    with pytest.raises(ConfigError, match="9999, which is newer"):
        restore(backup, url, target)


def test_a_backup_whose_files_are_damaged_restores_no_rows(
    store: JobStore, artifacts: ArtifactStore, backup: ArtifactStore, tmp_path: Path
) -> None:
    jobs = fill(store, artifacts)
    back_up(store, artifacts, backup)
    backup.delete(jobs[0].inputs[0].key)
    url = f"sqlite:///{tmp_path}/new.sqlite"
    with pytest.raises(ConfigError, match=f"a file of job {jobs[0].id} is missing"):
        restore(backup, url, ArtifactStore(str(tmp_path / "new")))
    assert rows(url)["jobs"] == []


def test_a_backup_of_an_older_version_is_upgraded(
    store: JobStore, artifacts: ArtifactStore, backup: ArtifactStore, tmp_path: Path
) -> None:
    job = created(store)
    artifacts.put(job.inputs[0].key, b"input")
    back_up(store, artifacts, backup)
    # As version 0001 would have written it: jobs alone, with the columns of then.
    later = ("cost", "checkpoint_", "steps_run", "furthest_step", "webhook_", "preview_", "is_")
    row = json.loads(backup.read("tables/jobs.jsonl"))
    old = {name: value for name, value in row.items() if not name.startswith(later)}
    backup.put("tables/jobs.jsonl", json.dumps(old).encode())
    backup.put("backup.json", json.dumps({"schema": "0001", "rows": {"jobs": 1}, "files": 1}).encode())
    url = f"sqlite:///{tmp_path}/new.sqlite"
    restore(backup, url, ArtifactStore(str(tmp_path / "new")))
    restored = JobStore(url)
    assert job_of(restored, job) == job
    restored.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_backups_fit_buckets_and_folders_alike(bucket: str, tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/jobs.sqlite")
    store.create_tables()
    artifacts = ArtifactStore(f"{bucket}/artifacts")
    fill(store, artifacts)
    folder, again = ArtifactStore(str(tmp_path / "backup")), ArtifactStore(f"{bucket}/backup")
    done = back_up(store, artifacts, folder)
    local = ArtifactStore(str(tmp_path / "local"))
    restore(folder, f"sqlite:///{tmp_path}/first.sqlite", local)
    first = JobStore(f"sqlite:///{tmp_path}/first.sqlite")
    assert back_up(first, local, again) == done
    assert restore(again, f"sqlite:///{tmp_path}/second.sqlite", ArtifactStore(f"{bucket}/new")) == done
    assert rows(f"sqlite:///{tmp_path}/second.sqlite") == rows(f"sqlite:///{tmp_path}/jobs.sqlite")
    for one in (store, first):
        one.close()
