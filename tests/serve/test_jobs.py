"""The job store: durability, fencing and paging, on SQLite and on a real PostgreSQL."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from pusa_dist.errors import ConfigError
from serve.store.attempts import UnreadableJobError
from serve.store.jobs import Artifact, DuplicateKeyError, Job, JobStore
from serve.store.tables import jobs
from tests.serve.store_support import LEASE_S, Clock, claimed, created, job_of, new_job


def test_a_job_is_read_back_equal(store: JobStore) -> None:
    job = new_job()
    store.create(job)
    assert store.get("a", job.id) == job


def test_a_tenant_sees_only_its_own_jobs(store: JobStore) -> None:
    job = new_job("a")
    store.create(job)
    assert store.get("b", job.id) is None
    assert store.page("b", None, 10, "asc") == ([], False)
    assert store.request_cancel("b", job.id) is None
    assert not store.delete("b", job.id)
    assert store.get("a", job.id) == job


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_join_to_every_job_once_even_when_ages_are_equal(store: JobStore, order: str) -> None:
    created = [new_job(created_at=1_000.0 + index // 3) for index in range(10)]
    for job in created:
        store.create(job)
    seen: list[Job] = []
    has_more = True
    while has_more:
        page, has_more = store.page("a", seen[-1].id if seen else None, 3, order)  # type: ignore[arg-type]
        seen += page
    expected = sorted(created, key=lambda job: job.id, reverse=order == "desc")
    assert seen == expected
    assert [job.created_at for job in seen] == sorted((job.created_at for job in seen), reverse=order == "desc")


def test_a_page_may_start_after_a_job_that_was_deleted(store: JobStore) -> None:
    first, second = new_job(created_at=1.0), new_job(created_at=2.0)
    store.create(first)
    store.create(second)
    store.delete("a", first.id)
    assert store.page("a", first.id, 10, "asc") == ([second], False)


def test_an_idempotency_key_is_used_once_a_tenant(store: JobStore) -> None:
    first = replace(new_job("a"), idempotency_key="k", fingerprint="f")
    store.create(first)
    store.create(replace(new_job("b"), idempotency_key="k"))
    with pytest.raises(DuplicateKeyError) as caught:
        store.create(replace(new_job("a"), idempotency_key="k"))
    assert "a cat" not in str(caught.value.__cause__), "errors are logged, and prompts must not be"
    assert store.find_by_key("a", "k") == first
    assert store.find_by_key("a", "other") is None


def test_a_repeat_is_found_by_fingerprint_within_its_window(store: JobStore) -> None:
    old, new = (replace(new_job(created_at=at), fingerprint="f") for at in (1.0, 5.0))
    store.create(old)
    store.create(new)
    assert store.find_repeat("a", "f", since=0.0) == new
    assert store.find_repeat("a", "f", since=6.0) is None
    assert store.find_repeat("b", "f", since=0.0) is None


def test_a_request_and_its_repetition_make_one_job_in_whichever_order_they_end(store: JobStore) -> None:
    first = new_job(created_at=10.0, fingerprint="f")
    again = new_job(created_at=11.0, fingerprint="f", is_retry=True)
    store.create(first, repeats_since=9.0)
    with pytest.raises(DuplicateKeyError):
        store.create(again, repeats_since=0.0)
    assert store.find_repeat("a", "f", 9.0) == first
    store.delete("a", first.id)
    store.create(again, repeats_since=0.0)
    with pytest.raises(DuplicateKeyError):
        store.create(new_job(created_at=12.0, fingerprint="f"), repeats_since=9.0)
    assert store.find_repeat("a", "f", 9.0, only_retries=True) == again
    # The same order sent on purpose, later, and one of another tenant, are jobs of their own.
    store.create(new_job(created_at=20.0, fingerprint="f"), repeats_since=19.0)
    store.create(new_job("b", created_at=12.0, fingerprint="f"), repeats_since=9.0)
    assert store.counts() == {"queued": 3}


def test_a_request_and_its_repetition_at_the_same_time_make_one_job(store: JobStore) -> None:
    def create(is_retry: bool) -> bool:
        try:
            store.create(new_job(fingerprint="f", is_retry=is_retry), repeats_since=999.0)
        except DuplicateKeyError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, [True] * 8)) == 1
    assert not create(is_retry=False)


def test_a_claim_begins_an_attempt_and_only_one_claimant_wins(store: JobStore) -> None:
    job = new_job()
    store.create(job)
    with ThreadPoolExecutor(8) as pool:
        wins = [win for win in pool.map(lambda n: store.claim(job.id, f"d{n}", LEASE_S), range(8)) if win]
    assert [(win.status, win.attempt, win.started_at) for win in wins] == [("in_progress", 1, 1_000.0)]
    assert store.queued("debug", 10) == []


def test_a_tenant_at_its_limit_begins_no_job_whoever_claims_it(store: JobStore) -> None:
    store.set_tenant("a", limits={"max_running": 2})
    mine = [created(store) for _ in range(8)]
    others = created(store, "b")
    assert store.room() == {"a": 2}
    with ThreadPoolExecutor(8) as pool:
        wins = [win for win in pool.map(lambda job: store.claim(job.id, "me", LEASE_S), mine) if win]
    assert len(wins) == 2
    assert store.room() == {"a": 0}
    assert store.claim(others.id, "me", LEASE_S)
    (waiting, *_) = store.queued("debug", 10)
    assert store.claim(waiting.id, "me", LEASE_S, to_fail=True), "a job that is overdue is failed all the same"
    assert store.room() == {"a": 0}
    assert store.complete(waiting.id, 1, {}, {})
    assert store.complete(wins[0].id, 1, {}, {})
    assert store.room() == {"a": 1}
    store.set_tenant("a", limits={"max_running": None})
    assert store.room() == {}
    assert all(store.claim(job.id, "me", LEASE_S) for job in store.queued("debug", 10))


def test_queued_jobs_come_oldest_first(store: JobStore) -> None:
    ages = [3.0, 1.0, 2.0]
    for age in ages:
        store.create(new_job(created_at=age))
    assert [job.created_at for job in store.queued("debug", 2)] == [1.0, 2.0]


def test_progress_and_completion_of_the_current_attempt_are_kept(store: JobStore, clock: Clock) -> None:
    job = claimed(store)
    assert store.record_precision(job.id, 1, "fp32")
    assert store.progress(job.id, 1, "denoise", 3, 4)
    running = store.get("a", job.id)
    assert running is not None
    assert (running.stage, running.step, running.precision) == ("denoise", 3, "fp32")
    clock.now = 1_050.0
    results = {"video": Artifact(key="jobs/x/attempts/1/video.mp4", content_type="video/mp4", num_bytes=7)}
    assert store.complete(job.id, 1, results, {"denoise": 1.5})
    done = store.get("a", job.id)
    assert done == replace(
        running,
        status="completed",
        stage=None,
        step=4,
        steps_run=4,
        furthest_step=4,
        completed_at=1_050.0,
        results=results,
        seconds={"denoise": 1.5},
    )


def test_a_stale_attempt_can_change_nothing(store: JobStore, clock: Clock) -> None:
    job = claimed(store)
    clock.now += LEASE_S + 1
    assert store.requeue_expired(clock.now) == {job.id: "queued"}
    second = store.claim(job.id, "other", LEASE_S)
    assert second is not None
    assert second.attempt == 2
    assert not store.progress(job.id, 1, "decode", 4, 4)
    assert not store.complete(job.id, 1, {}, {})
    assert not store.fail(job.id, 1, "x", "y")
    assert not store.cancelled(job.id, 1)
    assert not store.checkpoint(job.id, 1, "k", 4)
    assert not store.forget_checkpoint(job.id, 1)
    assert not store.preview(job.id, 1, 4, "k")
    assert not store.requeue(job.id, 1, gang_died=True)
    assert store.get("a", job.id) == second


@pytest.mark.parametrize("end", ["complete", "fail", "cancelled"])
def test_an_ended_job_stays_ended(store: JobStore, end: str) -> None:
    job = claimed(store)
    ends = {
        "complete": lambda: store.complete(job.id, 1, {}, {}),
        "fail": lambda: store.fail(job.id, 1, "gang_died", "twice"),
        "cancelled": lambda: store.cancelled(job.id, 1),
    }
    assert ends[end]()
    ended = store.get("a", job.id)
    assert ended is not None
    assert ended.is_final
    assert not any(again() for again in ends.values())
    assert store.claim(job.id, "me", LEASE_S) is None
    assert store.request_cancel("a", job.id) == ended


def test_a_renewed_lease_does_not_expire(store: JobStore, clock: Clock) -> None:
    mine, other, forgotten = (claimed(store, owner=owner) for owner in ("me", "other", "me"))
    clock.now += LEASE_S - 1
    store.renew("me", [mine.id, other.id], LEASE_S)
    clock.now += 2
    assert set(store.expired(clock.now)) == {other.id, forgotten.id}
    assert set(store.requeue_expired(clock.now)) == {other.id, forgotten.id}
    assert store.progress(mine.id, 1, "text", 0, 4)


def test_a_requeued_job_without_a_checkpoint_starts_over_and_counts_the_gang_that_died(store: JobStore) -> None:
    job = claimed(store)
    store.progress(job.id, 1, "denoise", 2, 4)
    assert store.requeue(job.id, 1, gang_died=True)
    waiting = store.get("a", job.id)
    assert waiting is not None
    assert (waiting.status, waiting.gang_deaths, waiting.step, waiting.stage) == ("queued", 1, 0, None)


def test_a_requeued_job_goes_on_from_its_checkpoint(store: JobStore) -> None:
    job = claimed(store)
    assert store.checkpoint(job.id, 1, "jobs/x/checkpoints/1/2", 2)
    assert store.progress(job.id, 1, "denoise", 3, 4)
    assert store.requeue(job.id, 1, gang_died=True)
    again = store.claim(job.id, "other", LEASE_S)
    assert again is not None
    assert (again.attempt, again.step, again.checkpoint_step) == (2, 2, 2)
    assert again.checkpoint_key == "jobs/x/checkpoints/1/2"
    for step in (3, 4):
        store.progress(job.id, 2, "denoise", step, 4)
    assert store.complete(job.id, 2, {}, {})
    assert job_of(store, job).steps_run == 5, "one step of four ran twice"


def test_reports_that_come_in_the_wrong_order_count_no_step_twice(store: JobStore) -> None:
    job = claimed(store, num_steps=8)
    for step in (4, 6, 5, 7):
        assert store.progress(job.id, 1, "denoise", step, 8)
        assert job_of(store, job).step == max(step, 6 if step == 5 else 0)
    assert job_of(store, job).steps_run == 7


def test_how_far_any_attempt_came_is_kept_however_often_steps_are_made_again(store: JobStore) -> None:
    job = claimed(store, num_steps=8)
    for attempt, step in ((1, 5), (2, 5), (3, 3)):
        assert store.progress(job.id, attempt, "denoise", step, 8)
        assert (job_of(store, job).step, job_of(store, job).furthest_step) == (step, 5)
        assert store.requeue(job.id, attempt, gang_died=False) == "queued"
        assert store.claim(job.id, "me", LEASE_S)
    assert job_of(store, job).steps_run == 13
    assert store.complete(job.id, 4, {}, {})
    assert job_of(store, job).furthest_step == 8


def test_overdue_jobs_are_those_that_still_wait_of_any_model_oldest_first(store: JobStore) -> None:
    old = [new_job(created_at=age, model=model) for age, model in ((2.0, "debug"), (1.0, "another"), (3.0, "debug"))]
    for job in (*old, new_job(created_at=9.0)):
        store.create(job)
    assert store.claim(old[2].id, "me", LEASE_S)
    assert store.overdue(9.0, 10) == [old[1].id, old[0].id]
    assert store.overdue(9.0, 1) == [old[1].id]


@pytest.mark.parametrize("request_stored", [{"of": "another version"}, []])
def test_a_row_that_cannot_be_read_is_left_to_others_or_claimed_to_be_failed(
    store: JobStore, request_stored: object
) -> None:
    job = new_job(priority="batch")
    store.create(job)
    with store._engine.begin() as connection:
        connection.execute(update(jobs).values(request=request_stored))
    with pytest.raises(UnreadableJobError):
        store.claim(job.id, "me", LEASE_S)
    assert store.counts() == {"queued": 1}
    with pytest.raises(UnreadableJobError) as refusal:
        store.claim(job.id, "me", LEASE_S, to_fail=True)
    error = refusal.value
    assert (error.attempt, error.created_at, error.priority) == (1, job.created_at, "batch")
    assert store.fail(job.id, error.attempt, "unreadable_job", "it cannot be read")
    assert store.waiting("debug", 10) == []


def test_a_checkpoint_that_cannot_be_used_is_forgotten(store: JobStore) -> None:
    job = claimed(store)
    store.checkpoint(job.id, 1, "jobs/x/checkpoints/1/2", 2)
    assert store.forget_checkpoint(job.id, 1)
    store.requeue(job.id, 1, gang_died=False)
    waiting = job_of(store, job)
    assert (waiting.checkpoint_key, waiting.checkpoint_step, waiting.step) == (None, None, 0)


def test_progress_is_read_without_the_request(store: JobStore) -> None:
    running, other = claimed(store), new_job()
    store.preview(running.id, 1, 2, "jobs/x/previews/2.webp")
    progress = store.progress_of([running.id, other.id])
    assert progress == {running.id: job_of(store, running).progress}
    assert (progress[running.id].preview_step, progress[running.id].preview_key) == (2, "jobs/x/previews/2.webp")


def test_a_long_queue_hides_no_other_tenant_class_or_model(store: JobStore) -> None:
    for age in range(20):
        store.create(new_job("a", created_at=float(age)))
    late = [
        new_job("a", created_at=30.0, priority="batch"),
        new_job("b", created_at=31.0),
        new_job("c", created_at=32.0),
    ]
    for job in (*late, new_job("d", model="other")):
        store.create(job)
    waiting = store.queued("debug", 3)
    assert [job.created_at for job in waiting] == [0.0, 1.0, 2.0, 30.0, 31.0, 32.0]
    assert waiting[3:] == late
    others = store.waiting("debug", 3, but_not=[waiting[0].id, waiting[4].id])
    assert sorted(one.created_at for one in others) == [1.0, 2.0, 3.0, 30.0, 32.0]


def test_a_cancel_that_meets_a_requeue_is_not_lost(store: JobStore, database_url: str) -> None:
    other, together = JobStore(database_url), threading.Barrier(2)
    with ThreadPoolExecutor(1) as thread:
        for _ in range(40):
            job = claimed(store)

            def requeue(job: Job = job) -> None:
                together.wait(30)
                other.requeue(job.id, job.attempt, gang_died=False)

            requeued = thread.submit(requeue)
            together.wait(30)
            store.request_cancel("a", job.id)
            requeued.result()
            assert job_of(store, job).status == "cancelled"
    other.close()


def test_a_queued_job_is_cancelled_at_once(store: JobStore) -> None:
    job = new_job()
    store.create(job)
    stopped = store.request_cancel("a", job.id)
    assert stopped is not None
    assert (stopped.status, stopped.completed_at) == ("cancelled", 1_000.0)
    assert store.queued("debug", 10) == []


def test_a_running_job_is_asked_to_stop_and_a_deleted_one_must(store: JobStore) -> None:
    asked, deleted, kept = (claimed(store) for _ in range(3))
    store.request_cancel("a", asked.id)
    assert store.delete("a", deleted.id)
    assert store.cancel_requests([asked.id, deleted.id, kept.id]) == {asked.id, deleted.id}
    assert store.cancel_requests([]) == set()
    assert store.get("a", deleted.id) is None


def test_a_job_asked_to_stop_ends_when_its_attempt_is_given_up(store: JobStore) -> None:
    job = claimed(store)
    store.request_cancel("a", job.id)
    assert store.requeue(job.id, 1, gang_died=True) == "cancelled"
    stopped = store.get("a", job.id)
    assert stopped is not None
    assert stopped.status == "cancelled"
    assert stopped.completed_at is not None


def test_jobs_are_counted_by_status(store: JobStore) -> None:
    store.create(new_job("a"))
    store.create(new_job("b"))
    claimed(store)
    assert store.counts() == {"queued": 2, "in_progress": 1}


def test_writers_in_many_threads_all_succeed(store: JobStore) -> None:
    def create_and_claim(_: int) -> bool:
        job = new_job()
        store.create(job)
        return store.claim(job.id, "me", LEASE_S) is not None and store.progress(job.id, 1, "text", 0, 4)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(create_and_claim, range(40)))


CHILD = """
import sys
from serve.store.jobs import JobStore
store = JobStore(sys.argv[1])
store.create_tables()
for job_id in sys.argv[2:]:
    if store.claim(job_id, "child", 10.0):
        print(job_id)
"""


def test_processes_share_the_store_and_never_claim_twice(database_url: str) -> None:
    first = JobStore(database_url)
    barrier = threading.Barrier(3)

    def child(ids: list[str]) -> list[str]:
        barrier.wait()
        command = [sys.executable, "-c", CHILD, database_url, *ids]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    first.create_tables()
    ids = []
    for _ in range(30):
        job = new_job()
        first.create(job)
        ids.append(job.id)
    with ThreadPoolExecutor(3) as pool:
        won = [job_id for part in pool.map(child, [ids, ids, ids[::-1]]) for job_id in part]
    assert sorted(won) == sorted(ids)
    first.close()


def test_an_acknowledged_job_is_in_the_file_while_the_store_is_still_open(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    store = JobStore(f"sqlite:///{path}")
    store.create_tables()
    job = new_job()
    store.create(job)
    # A copy of the files at this moment is what a crash would leave behind.
    for file in tmp_path.glob("jobs.sqlite*"):
        shutil.copy(file, tmp_path / f"crashed-{file.name}")
    store.close()
    connection = sqlite3.connect(tmp_path / "crashed-jobs.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("SELECT id FROM jobs").fetchall() == [(job.id,)]
    connection.close()


def test_many_stores_may_create_the_tables_at_once(tmp_path: Path) -> None:
    stores = [JobStore(f"sqlite:///{tmp_path}/jobs.sqlite") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(JobStore.create_tables, stores))
    assert stores[0].counts() == {}
    for store in stores:
        store.close()


def test_a_database_in_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="would lose every job"):
        JobStore("sqlite://")


def test_a_database_url_that_cannot_be_read_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match=r"database_url is no SQLAlchemy URL; write it like") as caught:
        JobStore("secret-password@host")
    assert "secret" not in str(caught.value)
