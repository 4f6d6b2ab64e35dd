"""The outbox of webhooks, on SQLite and on a real PostgreSQL."""

from collections.abc import Callable

import pytest

from serve.store.jobs import Job, JobStore
from tests.serve.store_support import Clock, claimed, created

URL = "https://example.com/hook"


def complete(store: JobStore, job: Job) -> None:
    store.complete(job.id, 1, {}, {})


def fail(store: JobStore, job: Job) -> None:
    store.fail(job.id, 1, "x", "y")


def cancel(store: JobStore, job: Job) -> None:
    store.request_cancel("a", job.id)
    store.cancelled(job.id, 1)


def cancel_and_give_up(store: JobStore, job: Job) -> None:
    store.request_cancel("a", job.id)
    store.requeue(job.id, 1, gang_died=True)


@pytest.mark.parametrize(
    ("end", "outcome"),
    [(complete, "completed"), (fail, "failed"), (cancel, "cancelled"), (cancel_and_give_up, "cancelled")],
    ids=["complete", "fail", "cancel", "cancel-and-give-up"],
)
def test_every_end_of_a_job_owes_one_delivery(
    store: JobStore, clock: Clock, end: Callable[[JobStore, Job], None], outcome: str
) -> None:
    job = claimed(store, webhook_url=URL)
    end(store, claimed(store))
    assert store.due_deliveries(clock.now, 10) == [], "nobody asked to be told of that one"
    end(store, job)
    end(store, job)
    (owed,) = store.due_deliveries(clock.now, 10)
    assert (owed.job_id, owed.tenant, owed.url, owed.outcome, owed.attempts) == (job.id, "a", URL, outcome, 0)
    assert owed.id.startswith("evt_")


def test_a_queued_job_that_is_cancelled_owes_a_delivery_and_a_requeued_one_none(store: JobStore, clock: Clock) -> None:
    running = claimed(store, webhook_url=URL)
    store.requeue(running.id, 1, gang_died=False)
    assert store.due_deliveries(clock.now, 10) == []
    store.request_cancel("a", running.id)
    store.request_cancel("a", running.id)
    assert [(owed.job_id, owed.outcome) for owed in store.due_deliveries(clock.now, 10)] == [(running.id, "cancelled")]


def test_a_delivery_is_tried_by_one_at_a_time_until_it_arrives(store: JobStore, clock: Clock) -> None:
    job = created(store, webhook_url=URL)
    store.request_cancel("a", job.id)
    (owed,) = store.due_deliveries(clock.now, 10)
    first = store.claim_delivery(owed.id, clock.now, 30.0)
    assert first is not None
    assert first.attempts == 1
    assert store.claim_delivery(owed.id, clock.now, 30.0) is None
    assert store.due_deliveries(clock.now, 10) == []
    # The one who tried has died: another tries, and what the first says no longer counts.
    clock.now += 30.0
    second = store.claim_delivery(owed.id, clock.now, 30.0)
    assert second is not None
    assert (second.id, second.attempts) == (owed.id, 2)
    assert not store.postpone(owed.id, 1, clock.now, "late")
    assert store.postpone(owed.id, 2, clock.now + 5.0, "503")
    assert store.due_deliveries(clock.now + 4.9, 10) == []
    third = store.claim_delivery(owed.id, clock.now + 5.0, 30.0)
    assert third is not None
    assert store.delivered(owed.id, 3)
    assert not store.delivered(owed.id, 3)
    assert store.due_deliveries(clock.now + 1e6, 10) == []


def test_a_delivery_that_was_given_up_is_not_tried_again_and_is_forgotten_in_the_end(
    store: JobStore, clock: Clock
) -> None:
    for _ in range(2):
        store.request_cancel("a", created(store, webhook_url=URL).id)
    hopeless, waiting = store.due_deliveries(clock.now, 10)
    assert store.claim_delivery(hopeless.id, clock.now, 30.0) is not None
    assert store.give_up(hopeless.id, 1, "410")
    assert [owed.id for owed in store.due_deliveries(clock.now + 1e6, 10)] == [waiting.id]
    assert store.forget_deliveries(clock.now) == 0
    assert store.forget_deliveries(clock.now + 1) == 1
    assert [owed.id for owed in store.due_deliveries(clock.now, 10)] == [waiting.id]


def test_the_longest_due_is_first(store: JobStore, clock: Clock) -> None:
    ids = []
    for _ in range(3):
        clock.now += 1
        job = created(store, webhook_url=URL)
        store.request_cancel("a", job.id)
        ids.append(job.id)
    assert [owed.job_id for owed in store.due_deliveries(clock.now, 2)] == ids[:2]
