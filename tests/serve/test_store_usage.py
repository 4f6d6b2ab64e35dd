"""The ledger: virtual time, usage a day, measured steps; on SQLite and on a real PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.policy.cost import StepShape
from serve.policy.fairness import Standing
from serve.store.jobs import JobStore
from serve.store.usage import Usage
from tests.serve.store_support import Clock, claimed, created

DAY_S = 86_400


def test_delivered_cost_moves_virtual_time_by_weight_and_is_counted_on_its_day(store: JobStore, clock: Clock) -> None:
    store.set_tenant("a", weight=2.0)
    store.charge("a", 3.0)
    store.charge("a", 1.0)
    clock.now += DAY_S
    store.charge("a", 6.0)
    store.charge("b", 5.0)
    assert store.standings() == {
        "a": Standing(weight=2.0, virtual_time=5.0),
        "b": Standing(weight=1.0, virtual_time=5.0),
    }
    assert store.usage("a", "1970-01-01") == [Usage(day="1970-01-01", cost=4.0), Usage(day="1970-01-02", cost=6.0)]
    assert store.usage("a", "1970-01-02") == [Usage(day="1970-01-02", cost=6.0)]
    assert store.usage("nobody", "1970-01-01") == []


def test_a_tenant_is_moved_up_and_never_back(store: JobStore) -> None:
    store.charge("a", 3.0)
    store.activate("a", 2.0)
    assert store.standings()["a"].virtual_time == 3.0
    store.activate("a", 7.5)
    assert store.standings()["a"].virtual_time == 7.5


def test_charges_at_the_same_time_all_count(store: JobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.charge("a", 1.0), range(40)))
    assert store.standings()["a"].virtual_time == 40.0
    assert store.usage("a", "1970-01-01") == [Usage(day="1970-01-01", cost=40.0)]


def test_requests_and_videos_are_counted_where_they_happen(store: JobStore, clock: Clock) -> None:
    done, failed = claimed(store), claimed(store)
    created(store)
    clock.now += DAY_S
    store.complete(done.id, 1, {}, {})
    store.complete(done.id, 1, {}, {})
    store.fail(failed.id, 1, "x", "y")
    assert store.usage("a", "1970-01-01") == [
        Usage(day="1970-01-01", requests=3),
        Usage(day="1970-01-02", completed=1, video_seconds=pytest.approx(17 / 8)),
    ]


def test_measured_steps_are_kept_by_model_and_shape(store: JobStore) -> None:
    small, large = StepShape(num_tokens=48, uses_guidance=True), StepShape(num_tokens=480, uses_guidance=False)
    assert store.step_seconds("debug") == {}
    store.record_step_seconds("debug", {small: 0.5, large: 2.0})
    store.record_step_seconds("debug", {small: 0.25})
    store.record_step_seconds("other", {small: 9.0})
    assert store.step_seconds("debug") == {small: 0.25, large: 2.0}
