"""Tenants, keys, quotas and the audit log, on SQLite and on a real PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields

import pytest

from pusa_dist.errors import ConfigError
from serve.policy.quota import Quota
from serve.store.jobs import JobStore, QuotaExceededError, UnknownTenantError
from tests.serve.store_support import LEASE_S, Clock, claimed, created, job_of, new_job


def test_a_key_is_its_tenants_until_it_is_revoked(store: JobStore, clock: Clock) -> None:
    first_id, first = store.create_key("red", "laptop")
    second_id, second = store.create_key("red")
    _, other = store.create_key("blue")
    assert [store.tenant_of_key(key) for key in (first, second, other)] == ["red", "red", "blue"]
    clock.now += 1
    assert store.revoke_key(first_id)
    assert not store.revoke_key(first_id)
    assert not store.revoke_key("key_unknown")
    assert [store.tenant_of_key(key) for key in (first, second, other)] == [None, "red", "blue"]
    known = {key.id: (key.label, key.revoked_at) for key in store.keys("red")}
    assert known == {first_id: ("laptop", 1_001.0), second_id: ("", None)}


@pytest.mark.parametrize("guess", ["", "pusa_", "\udcff", "x" * 10_000, "pusa_\x00"])
def test_what_is_no_key_is_nobodys(store: JobStore, guess: str) -> None:
    store.create_key("red")
    assert store.tenant_of_key(guess) is None


def test_a_key_cannot_be_read_back_from_anything_that_is_kept(store: JobStore) -> None:
    _, secret = store.create_key("red", "laptop", actor="me")
    assert len(secret) >= 48
    assert secret not in repr((store.keys(), store.audit(), store.tenants()))
    with store._engine.connect() as connection:
        (digest,) = connection.exec_driver_sql("SELECT digest FROM keys").scalars()
    assert secret not in digest
    assert digest != store.create_key("red")[1]


def test_a_tenant_is_set_up_by_its_first_job_or_key_and_changed_in_part(store: JobStore) -> None:
    assert store.tenant("a") is None
    created(store, "a")
    fresh = store.tenant("a")
    assert fresh is not None
    assert (fresh.weight, fresh.quota, fresh.virtual_time) == (1.0, Quota(), 0.0)
    assert fresh.webhook_secret.startswith("whsec_")
    store.create_key("b")
    store.set_tenant("b", weight=2.5)
    quota = Quota(requests_per_minute=5, cost_per_day=0.5)
    changed = store.set_tenant("b", limits=asdict(quota))
    assert (changed.weight, changed.quota) == (2.5, quota)
    assert store.set_tenant("b", replace_webhook_secret=True).webhook_secret != changed.webhook_secret
    assert [tenant.name for tenant in store.tenants()] == ["a", "b"]


@pytest.mark.parametrize("name", ["", "a b", "-a", "\u732b", "a" * 129, "a/b", "a\n"])
def test_a_name_that_cannot_be_a_tenants_is_refused(store: JobStore, name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        store.set_tenant(name)
    with pytest.raises(ConfigError, match="letters, digits"):
        store.create_key(name)
    assert store.tenants() == []


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(store: JobStore, weight: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        store.set_tenant("a", weight=weight)
    assert store.tenant("a") is None


def test_the_audit_log_says_who_changed_what_and_no_secret(store: JobStore, clock: Clock) -> None:
    key_id, _ = store.create_key("red", "laptop", actor="eve")
    clock.now = 1_001.0
    store.set_tenant("red", weight=2.0, limits=asdict(Quota(max_queued=3)), replace_webhook_secret=True, actor="adam")
    store.revoke_key(key_id, actor="adam")
    store.erase_tenant("blue", actor="eve")
    log = [(entry.at, entry.actor, entry.action, entry.tenant) for entry in store.audit()]
    assert log == [
        (1_000.0, "eve", "key.create", "red"),
        (1_001.0, "adam", "tenant.set", "red"),
        (1_001.0, "adam", "key.revoke", "red"),
        (1_001.0, "eve", "tenant.erase", "blue"),
    ]
    changed = store.audit("red")[1].detail
    assert (changed["weight"], changed["max_queued"], changed["webhook_secret"]) == (2.0, 3, "replaced")
    assert [entry.action for entry in store.audit(limit=1)] == ["tenant.erase"]


def test_whoever_asks_is_counted_whatever_becomes_of_it(store: JobStore, clock: Clock) -> None:
    quota = Quota(requests_per_minute=2, max_tokens=1)
    for _ in range(2):
        store.ask("a", quota)
        with pytest.raises(QuotaExceededError) as too_large:
            store.create(new_job(), quota)
        assert too_large.value.refusal.code == "shape_over_quota"
    with pytest.raises(QuotaExceededError) as refused:
        store.ask("a", quota)
    assert refused.value.refusal.code == "rate_limit_exceeded"
    store.ask("b", quota)
    clock.now += 60
    store.ask("a", quota)
    assert store.counts() == {}


def test_who_asked_as_the_last_of_its_minute_has_its_job(store: JobStore) -> None:
    quota = Quota(requests_per_minute=1)
    store.ask("a", quota)
    store.create(new_job(), quota)
    store.erase_tenant("a")
    with pytest.raises(UnknownTenantError):
        store.ask("a", quota)


def test_requests_that_come_at_once_do_not_share_the_last_of_a_minute(store: JobStore) -> None:
    def ask(_: int) -> bool:
        try:
            store.ask("a", Quota(requests_per_minute=3))
        except QuotaExceededError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(12))) == 3


@pytest.mark.parametrize("label", ["x" * 256, "a\nb", "a\x00b", "\udcff"])
def test_a_label_that_a_database_would_refuse_is_refused(store: JobStore, label: str) -> None:
    with pytest.raises(ConfigError, match="at most 255, all printable"):
        store.create_key("red", label)
    store.create_key("red", "\u732b" * 255)
    (key,) = store.keys()
    assert key.label == "\u732b" * 255


@pytest.mark.parametrize("limit", [limit.name for limit in fields(Quota)])
def test_a_limit_that_a_database_would_refuse_is_refused(store: JobStore, limit: str) -> None:
    for value in (2**31, -1):
        with pytest.raises(ConfigError, match=f"{limit}={value} of tenant red: give 0 to 2147483647"):
            store.set_tenant("red", limits={limit: value})
    assert store.tenants() == []
    assert getattr(store.set_tenant("red", limits={limit: 2**31 - 1}).quota, limit) == 2**31 - 1


def test_cost_delivered_today_and_cost_still_to_come_count_against_a_day(store: JobStore, clock: Clock) -> None:
    quota = Quota(cost_per_day=10.0)
    running = claimed(store, cost=4.0)
    store.create(new_job(cost=6.0), quota)
    with pytest.raises(QuotaExceededError) as refused:
        store.create(new_job(cost=1.0), quota)
    assert refused.value.refusal.code == "daily_cost_exceeded"
    # Half of the running job is done, and was charged less than predicted.
    store.progress(running.id, 1, "denoise", 2, 4)
    store.charge("a", 1.0)
    store.create(new_job(cost=1.0), quota)
    with pytest.raises(QuotaExceededError):
        store.create(new_job(cost=0.5), quota)


def test_ended_jobs_cost_no_more_than_was_delivered(store: JobStore) -> None:
    quota = Quota(cost_per_day=10.0)
    job = claimed(store, cost=10.0)
    store.fail(job.id, 1, "numerics_error", "no")
    store.create(new_job(cost=10.0), quota)


def test_jobs_of_a_tenant_that_come_at_once_do_not_share_its_last_place(store: JobStore) -> None:
    def create(_: int) -> bool:
        try:
            store.create(new_job(), Quota(max_queued=3))
        except QuotaExceededError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(12))) == 3
    assert store.counts() == {"queued": 3}


def test_many_first_jobs_of_a_tenant_at_once_make_one_tenant(store: JobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: created(store, "new"), range(8)))
    assert [tenant.name for tenant in store.tenants()] == ["new"]
    assert store.counts() == {"queued": 8}


def test_erasing_a_tenant_ends_its_jobs_and_takes_its_keys_usage_deliveries_and_settings(
    store: JobStore, clock: Clock
) -> None:
    _, secret = store.create_key("a")
    store.set_tenant("a", weight=3.0, limits=asdict(Quota(max_queued=9)))
    done = claimed(store, webhook_url="https://example.com")
    store.complete(done.id, 1, {}, {})
    running, waiting = claimed(store), created(store)
    other = created(store, "b")
    store.charge("a", 5.0)
    store.erase_tenant("a")
    assert store.tenant_of_key(secret) is None
    assert store.keys("a") == []
    assert store.usage("a", "1970-01-01") == []
    assert store.due_deliveries(clock.now + 1e6, 10) == []
    assert store.tenant("a") is None
    assert [tenant.name for tenant in store.tenants()] == ["b"]
    assert "a" not in store.standings()
    # What runs is stopped, and can publish nothing.
    assert store.cancel_requests([running.id]) == {running.id}
    assert not store.complete(running.id, 1, {}, {})
    assert not store.requeue(running.id, 1, gang_died=False)
    assert store.claim(waiting.id, "me", LEASE_S) is None
    # Their files are to be removed, whatever their age.
    assert set(store.expired_jobs(clock.now, 10)) == {done.id, running.id, waiting.id}
    assert set(store.erased_jobs(10)) == {done.id, running.id, waiting.id}
    assert job_of(store, other) == other


def test_an_erased_tenant_makes_no_jobs_and_is_charged_nothing_until_it_is_set_up_again(store: JobStore) -> None:
    store.set_tenant("a", weight=3.0)
    for tenant in ("a", "b"):
        created(store, tenant, idempotency_key="k", fingerprint="f")
        store.erase_tenant(tenant)
    with pytest.raises(UnknownTenantError):
        store.create(new_job())
    store.charge("a", 5.0)
    store.activate("a", 5.0)
    assert store.usage("a", "1970-01-01") == []
    store.create_key("a")
    store.create(new_job())
    assert len(store.page("a", None, 10, "asc")[0]) == 1
    again = store.tenant("a")
    assert again is not None
    assert (again.weight, again.virtual_time, again.quota) == (1.0, 0.0, Quota())
    assert again.webhook_secret.startswith("whsec_")
