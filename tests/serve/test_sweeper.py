"""Expiry: what is removed, what is kept, and what happens when the bucket is away meanwhile."""

import asyncio
import errno
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from serve.store.artifacts import ArtifactStore, StorageError
from serve.store.jobs import Artifact, Job, JobStore, new_job_id
from serve.sweeper import LEFTOVERS_AGE_S, ORPHAN_AGE_S, Swept, keep_sweeping, sweep, sweep_orphans
from tests.serve.store_support import Clock, claimed, created, made_by_another_version, new_job

DAY_S = 86_400.0


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "artifacts"))


def files(artifacts: ArtifactStore) -> set[str]:
    root = Path(artifacts._root)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {"database"}


def with_files(store: JobStore, artifacts: ArtifactStore, *, end: str, expires_at: float = 1_000.0 + DAY_S) -> Job:
    """A job on its second attempt, with everything both left behind, ended so."""
    job = claimed(store, expires_at=expires_at)
    folder = f"jobs/{job.id}"
    for name in ("inputs/0", "attempts/1/video.mp4", "attempts/2/video.mp4", "checkpoints/1-2", "checkpoints/2-4"):
        artifacts.put(f"{folder}/{name}", b"x")
    artifacts.put(f"{folder}/previews/2.webp", b"x")
    store.checkpoint(job.id, 1, f"{folder}/checkpoints/1-2", 2)
    store.preview(job.id, 1, 2, f"{folder}/previews/2.webp")
    store.requeue(job.id, 1, gang_died=True)
    store.claim(job.id, "me", 10.0)
    if end == "completed":
        video = Artifact(key=f"{folder}/attempts/2/video.mp4", content_type="video/mp4", num_bytes=1)
        store.complete(job.id, 2, {"video": video}, {})
    elif end == "failed":
        store.fail(job.id, 2, "x", "y")
    return job


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        ("completed", {"inputs/0", "attempts/2/video.mp4", "previews/2.webp"}),
        ("failed", {"inputs/0", "previews/2.webp"}),
    ],
)
def test_of_an_ended_job_only_what_it_publishes_is_kept(
    store: JobStore, artifacts: ArtifactStore, clock: Clock, end: str, kept: set[str]
) -> None:
    job = with_files(store, artifacts, end=end)
    before = files(artifacts)
    assert sweep(store, artifacts, clock.now + LEFTOVERS_AGE_S - 1) == Swept()
    assert files(artifacts) == before
    assert sweep(store, artifacts, clock.now + LEFTOVERS_AGE_S + 1) == Swept(tidied=1)
    assert files(artifacts) == {f"jobs/{job.id}/{name}" for name in kept}
    assert sweep(store, artifacts, clock.now + LEFTOVERS_AGE_S + 2) == Swept()
    assert store.get("a", job.id) is not None


def test_a_job_that_runs_or_waits_keeps_everything_whatever_its_age(
    store: JobStore, artifacts: ArtifactStore, clock: Clock
) -> None:
    running = with_files(store, artifacts, end="not yet")
    waiting = created(store, expires_at=clock.now)
    artifacts.put(waiting.inputs[0].key, b"x")
    before = files(artifacts)
    assert sweep(store, artifacts, clock.now + 100 * DAY_S) == Swept()
    assert sweep_orphans(store, artifacts, clock.now + 100 * DAY_S) == 0
    assert files(artifacts) == before
    assert {job.id for job in store.page("a", None, 10, "asc")[0]} == {running.id, waiting.id}


def test_a_job_past_its_time_is_forgotten_with_all_its_files(
    store: JobStore, artifacts: ArtifactStore, clock: Clock
) -> None:
    old = with_files(store, artifacts, end="completed")
    young = with_files(store, artifacts, end="completed", expires_at=clock.now + 2 * DAY_S)
    kept = claimed(store, expires_at=None)
    store.complete(kept.id, 1, {}, {})
    assert sweep(store, artifacts, clock.now + DAY_S + 1).forgotten == 1
    assert store.get("a", old.id) is None
    assert store.get("a", young.id) is not None
    assert artifacts.jobs() == [young.id]
    assert sweep(store, artifacts, clock.now + 100 * DAY_S).forgotten == 1
    assert store.get("a", kept.id) is not None, "it was promised for ever"


def test_a_bucket_that_is_away_delays_a_sweep_and_leaves_nothing_dangling(
    store: JobStore, artifacts: ArtifactStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = (with_files(store, artifacts, end="completed") for _ in range(2))
    delete = artifacts.delete

    def failing_delete(prefix: str) -> None:
        if stuck.id in prefix:
            raise StorageError(errno.EIO, "no answer")
        delete(prefix)

    with monkeypatch.context() as away:
        away.setattr(artifacts, "delete", failing_delete)
        assert sweep(store, artifacts, clock.now + DAY_S + 1) == Swept(
            forgotten=1, tidied=1, failed=frozenset({stuck.id})
        )
    # Its row is there still, so that its files are found again.
    assert store.get("a", other.id) is None
    assert store.get("a", stuck.id) is not None
    assert sweep(store, artifacts, clock.now + DAY_S + 1).forgotten == 1
    assert files(artifacts) == set()


def test_a_bucket_that_is_away_is_not_asked_for_every_job(
    store: JobStore, artifacts: ArtifactStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for _ in range(20):
        job = created(store, expires_at=clock.now)
        store.request_cancel("a", job.id)

    def away(prefix: str) -> None:
        asked.append(prefix)
        raise StorageError(errno.EIO, "no answer")

    monkeypatch.setattr(artifacts, "delete", away)
    assert len(sweep(store, artifacts, clock.now + 1).failed) == len(asked) == 5


def test_jobs_whose_files_cannot_be_removed_do_not_keep_those_of_others(
    store: JobStore, artifacts: ArtifactStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = ([created(store, expires_at=clock.now - age).id for _ in range(7)] for age in (2, 1))
    for job_id in (*bad, *good):
        store.request_cancel("a", job_id)

    def locked(prefix: str) -> None:
        if prefix.removeprefix("jobs/") in bad:
            raise StorageError(errno.EACCES, "locked")

    async def sweeping() -> None:
        task = asyncio.create_task(keep_sweeping(store, artifacts, period_s=0.0, clock=clock))
        async with asyncio.timeout(60):
            while await asyncio.to_thread(lambda: any(store.get("a", job_id) for job_id in good)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    monkeypatch.setattr(artifacts, "delete", locked)
    asyncio.run(sweeping())
    assert all(store.get("a", job_id) for job_id in bad)


def test_what_another_version_wrote_is_tidied_as_far_as_it_can_be_read_and_forgotten_like_the_rest(
    store: JobStore, artifacts: ArtifactStore, clock: Clock
) -> None:
    foreign, stranger, mine = (with_files(store, artifacts, end="completed") for _ in range(3))
    made_by_another_version(store, foreign.id)
    made_by_another_version(store, stranger.id, inputs={"of": "another kind"})
    before = files(artifacts)
    assert sweep(store, artifacts, clock.now + LEFTOVERS_AGE_S + 1) == Swept(tidied=3)
    kept = {"inputs/0", "attempts/2/video.mp4", "previews/2.webp"}
    readable = {f"jobs/{job.id}/{name}" for job in (foreign, mine) for name in kept}
    assert files(artifacts) == readable | {name for name in before if stranger.id in name}
    assert sweep(store, artifacts, clock.now + DAY_S + 1).forgotten == 3
    assert store.known([foreign.id, stranger.id, mine.id]) == set()
    assert files(artifacts) == set()


def test_files_whose_row_is_gone_are_removed_after_an_hour(
    store: JobStore, artifacts: ArtifactStore, clock: Clock
) -> None:
    kept = created(store)
    half_deleted, being_made = new_job_id(clock.now), new_job_id(clock.now + ORPHAN_AGE_S)
    for job_id in (kept.id, half_deleted, being_made, "not-a-job"):
        artifacts.put(f"jobs/{job_id}/inputs/0", b"x")
    assert sweep_orphans(store, artifacts, clock.now + ORPHAN_AGE_S + 1) == 1
    assert set(artifacts.jobs()) == {kept.id, being_made, "not-a-job"}


def test_the_files_of_an_erased_tenant_go_at_once(store: JobStore, artifacts: ArtifactStore, clock: Clock) -> None:
    mine, running = with_files(store, artifacts, end="completed"), with_files(store, artifacts, end="not yet")
    other = created(store, "b")
    artifacts.put(other.inputs[0].key, b"x")
    store.erase_tenant("a")
    assert sweep(store, artifacts, clock.now).forgotten == 2
    assert artifacts.jobs() == [other.id]
    assert store.progress_of([mine.id, running.id]) == {}


def test_the_files_of_another_database_are_left_alone(
    store: JobStore, artifacts: ArtifactStore, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = created(store)
    artifacts.put(job.inputs[0].key, b"x")
    assert sweep_orphans(store, artifacts, clock.now) == 0
    other = JobStore(f"sqlite:///{tmp_path}/other.sqlite", clock)
    other.create_tables()
    assert sweep_orphans(other, artifacts, clock.now + DAY_S) == 0
    assert "another database" in caplog.text
    assert artifacts.jobs() == [job.id]
    other.close()


def test_files_from_before_the_database_was_lost_are_left_alone(
    store: JobStore, artifacts: ArtifactStore, clock: Clock
) -> None:
    artifacts.put(f"jobs/{new_job_id(clock.now)}/inputs/0", b"x")
    assert sweep_orphans(store, artifacts, clock.now + DAY_S) == 0
    assert len(artifacts.jobs()) == 1


def test_sweeping_goes_on_whatever_fails(
    store: JobStore, artifacts: ArtifactStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [StorageError(errno.EIO, "no answer"), RuntimeError("a bug")]
    done = asyncio.Event()

    async def scenario() -> None:
        loop = asyncio.get_running_loop()

        def failing(*_: object) -> Swept:
            if errors:
                raise errors.pop()
            loop.call_soon_threadsafe(done.set)
            return Swept()

        monkeypatch.setattr("serve.sweeper.sweep", failing)
        sweeping = asyncio.create_task(keep_sweeping(store, artifacts, period_s=0.0, clock=clock))
        async with asyncio.timeout(60):
            await done.wait()
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)

    asyncio.run(scenario())


def test_no_key_and_no_path_is_logged(
    store: JobStore,
    artifacts: ArtifactStore,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = replace(new_job(), expires_at=clock.now)
    store.create(job)
    store.request_cancel("a", job.id)
    artifacts.put(job.inputs[0].key, b"x")

    def rm(path: str, recursive: bool) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(artifacts._fs, "rm", rm)
    with caplog.at_level(logging.DEBUG):
        sweep(store, artifacts, clock.now + 1)
    assert "cannot be removed" in caplog.text
    assert artifacts._root not in caplog.text
    assert "inputs" not in caplog.text
