"""What is left to do, by tenant and class, as the dispatcher reports it."""

from serve.policy.cost import Backlog
from serve.store.jobs import JobStore
from tests.serve.store_support import LEASE_S, Clock, created


def test_the_backlog_counts_what_unfinished_jobs_still_need(store: JobStore, clock: Clock) -> None:
    started = created(store, cost=8.0)
    created(store, cost=4.0, created_at=1_001.0)
    created(store, cost=2.0, created_at=1_003.0)
    created(store, "b", cost=1.0, priority="batch")
    created(store, cost=50.0, model="another")
    ended = created(store, "b", cost=100.0)
    store.request_cancel("b", ended.id)
    claimed = store.claim(started.id, "d", LEASE_S)
    assert claimed is not None
    store.progress(started.id, claimed.attempt, "denoise", 3, 4)
    clock.now = 1_010.0
    assert sorted(store.backlog("debug"), key=lambda one: (one.tenant, one.status)) == [
        Backlog(tenant="a", status="in_progress", priority="interactive", num=1, cost=2.0, whole=8.0, oldest_s=10.0),
        Backlog(tenant="a", status="queued", priority="interactive", num=2, cost=6.0, whole=6.0, oldest_s=9.0),
        Backlog(tenant="b", status="queued", priority="batch", num=1, cost=1.0, whole=1.0, oldest_s=10.0),
    ]


def test_nothing_unfinished_is_no_backlog(store: JobStore) -> None:
    assert store.backlog("debug") == []
