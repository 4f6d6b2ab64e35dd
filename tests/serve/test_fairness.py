"""Fair shares as properties of whole runs: the policy drives a cluster under virtual time."""

from collections import defaultdict
from itertools import combinations, pairwise

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.virtual.cluster import VirtualCluster
from cluster.virtual.event_loop import EventLoop
from cluster.virtual.job import Ask, Times
from serve.policy.priority import PATIENCE_S

runs = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])

weights = st.floats(0.25, 4.0)
step_seconds = st.floats(0.5, 4.0)


@st.composite
def arrivals(draw, max_jobs=24):
    """(when, ask) of jobs of up to four tenants, in bursts and singly."""
    jobs = draw(
        st.lists(
            st.tuples(
                st.sampled_from("abcd"),
                st.sampled_from([0.0, 0.0, 7.0, 20.0, 21.3, 60.0]),
                st.integers(1, 8),
                step_seconds,
                st.sampled_from(["interactive", "interactive", "batch"]),
                st.sampled_from([None, "x"]),
                st.floats(0.8, 1.25),
            ),
            min_size=1,
            max_size=max_jobs,
        )
    )
    return [
        (
            at,
            Ask(
                id=f"{tenant}{number}",
                tenant=tenant,
                num_steps=steps,
                step_s=step_s,
                priority=priority,
                lora=lora,
                slowness=slowness,
            ),
        )
        for number, (tenant, at, steps, step_s, priority, lora, slowness) in enumerate(jobs)
    ]


def started(cluster, loop, jobs):
    for at, ask in jobs:
        loop.at(at, lambda ask=ask: cluster.ask(ask))


def backlog(tenant, count, steps, step_s):
    return [Ask(id=f"{tenant}{n}", tenant=tenant, num_steps=steps, step_s=step_s) for n in range(count)]


@runs
@given(
    jobs=arrivals(),
    num_gangs=st.integers(1, 3),
    tenant_weights=st.dictionaries(st.sampled_from("abcd"), weights),
    max_resident=st.integers(1, 3),
    switch_s=st.sampled_from([0.0, 1.0]),
    release_s=st.sampled_from([0.0, 0.5]),
    drained=st.booleans(),
)
def test_every_job_ends_having_run_each_step_once_and_interruptions_are_bounded(
    jobs, num_gangs, tenant_weights, max_resident, switch_s, release_s, drained
):
    loop = EventLoop()
    times = Times(prepare_s=0.3, decode_s=0.5, switch_s=switch_s, release_s=release_s)
    cluster = VirtualCluster(loop, tenant_weights, num_gangs, times, max_resident=max_resident)
    started(cluster, loop, jobs)
    if drained and num_gangs > 1:
        loop.at(9.0, lambda: cluster.drain("0"))
    loop.run(until=100_000)
    records = cluster.records.values()
    assert all(record.ended_at < 100_000 for record in records)
    assert all(record.steps_run == record.ask.num_steps for record in records)
    # An arrival interrupts at most one job, and moves at most a few that were waiting.
    assert sum(record.num_interrupted for record in records) <= len(jobs)
    assert sum(record.num_released for record in records) <= 3 * len(jobs)


@runs
@given(jobs=arrivals(), num_gangs=st.integers(1, 3), max_resident=st.integers(1, 3))
def test_no_gang_is_idle_while_a_prepared_job_waits(jobs, num_gangs, max_resident):
    loop = EventLoop()
    cluster = VirtualCluster(loop, {}, num_gangs, Times(), max_resident=max_resident)
    started(cluster, loop, jobs)
    while loop.next_at < 100_000:
        loop.run(until=loop.next_at)
        assert not cluster.is_wasteful, loop.now


@runs
@given(
    shape=st.lists(st.tuples(weights, st.integers(1, 8), step_seconds), min_size=2, max_size=4),
    num_gangs=st.integers(1, 3),
)
@example(shape=[(1.0, 8, 4.0), (1.0, 1, 0.5)], num_gangs=1)
@example(shape=[(4.0, 1, 0.5), (0.25, 8, 4.0)], num_gangs=1)
# Two that once had a job come and go for ever: in a place beside the one it was to make room for, and behind
# another of its tenant that was placed while room was made.
@example(shape=[(4.0, 4, 0.5), (0.5, 3, 1.25), (2.5, 5, 2.0), (0.5, 8, 0.5)], num_gangs=2)
@example(shape=[(0.25, 3, 2.0), (0.5, 7, 1.0), (1.0, 6, 1.4), (1.17, 1, 3.54)], num_gangs=2)
def test_delivered_cost_by_weight_stays_within_a_job_of_each_tenant_under_backlog(shape, num_gangs):
    """On one gang; on several, within the jobs that are in service (SFQ(D))."""
    loop = EventLoop()
    names = "abcd"[: len(shape)]
    cluster = VirtualCluster(loop, {name: one[0] for name, one in zip(names, shape, strict=True)}, num_gangs, Times())
    horizon = 80.0
    for name, (_, steps, step_s) in zip(names, shape, strict=True):
        for ask in backlog(name, int(num_gangs * horizon / (steps * step_s)) + 2 * num_gangs + 2, steps, step_s):
            cluster.ask(ask)
    loop.run(until=horizon)
    slack = {
        name: num_gangs * (steps * step_s) / weight for name, (weight, steps, step_s) in zip(names, shape, strict=True)
    }
    got = defaultdict(float)
    weight_of = {name: one[0] for name, one in zip(names, shape, strict=True)}
    for _, tenant, cost in cluster.delivered:
        got[tenant] += cost / weight_of[tenant]
        for one, other in combinations(names, 2):
            assert abs(got[one] - got[other]) <= slack[one] + slack[other] + 1e-6


@runs
@given(
    tenants=st.lists(st.tuples(weights, st.integers(1, 8), step_seconds), min_size=2, max_size=4),
    begins=st.floats(0.0, 100.0),
)
def test_no_tenant_starves(tenants, begins):
    """One job among endless backlogs ends once the others had what their weights give them, and a job each."""
    loop = EventLoop()
    names = "abcd"[: len(tenants)]
    cluster = VirtualCluster(loop, dict(zip(names, (one[0] for one in tenants), strict=True)), 1, Times(poll_s=0.1))
    (weight, steps, step_s), *others = tenants
    cost = steps * step_s
    bound = 1.0 + cost + sum(one[0] * cost / weight + 2 * one[1] * one[2] for one in others)
    for name, (_, one_steps, one_s) in zip(names[1:], others, strict=True):
        for ask in backlog(name, int((begins + bound) / (one_steps * one_s)) + 2, one_steps, one_s):
            cluster.ask(ask)
    loop.at(begins, lambda: cluster.ask(Ask(id="it", tenant=names[0], num_steps=steps, step_s=step_s)))
    loop.run(until=begins + bound)
    assert cluster.records["it"].ended_at <= begins + bound


@runs
@given(
    steps=st.integers(1, 8),
    step_s=step_seconds,
    weight=weights,
    other_steps=st.integers(1, 8),
    other_s=step_seconds,
    after=st.floats(0.0, 50.0),
)
def test_a_newcomers_first_step_begins_within_one_step_of_the_running_job(
    steps, step_s, weight, other_steps, other_s, after
):
    loop = EventLoop()
    cluster = VirtualCluster(loop, {"new": weight}, 1, Times())
    for ask in backlog("old", int(400 / (other_steps * other_s)) + 2, other_steps, other_s):
        cluster.ask(ask)
    # By then the other tenant has had as much as the newcomer's job needs.
    begins = steps * step_s / weight + other_s + after
    loop.at(begins, lambda: cluster.ask(Ask(id="it", tenant="new", num_steps=steps, step_s=step_s)))
    loop.run(until=begins + 100)
    record = cluster.records["it"]
    assert record.began_at - record.ready_at <= other_s + 1e-6
    assert record.denoised_at - record.began_at == pytest.approx(steps * step_s)  # and it runs to its end


def test_a_batch_job_that_is_old_enough_goes_before_new_interactive_ones():
    loop = EventLoop()
    cluster = VirtualCluster(loop, {}, 1, Times())
    cluster.ask(Ask(id="batch", tenant="a", num_steps=2, step_s=10.0, priority="batch"))
    for number in range(100):  # as many as the gang can make
        ask = Ask(id=f"i{number}", tenant="a", num_steps=2, step_s=10.0)
        loop.at(20.0 * number - 1.0, lambda ask=ask: cluster.ask(ask))
    loop.run()
    ended = cluster.records["batch"].ended_at
    assert PATIENCE_S < ended <= PATIENCE_S + 3 * 20.0


def test_an_urgent_job_interrupts_its_own_tenants_batch_job_only():
    loop = EventLoop()
    cluster = VirtualCluster(loop, {}, 1, Times())
    cluster.ask(Ask(id="batch", tenant="a", num_steps=10, step_s=1.0, priority="batch"))
    loop.at(3.5, lambda: cluster.ask(Ask(id="other", tenant="b", num_steps=10, step_s=1.0)))
    loop.at(5.5, lambda: cluster.ask(Ask(id="urgent", tenant="a", num_steps=2, step_s=1.0)))
    loop.run()
    records = cluster.records
    assert records["urgent"].began_at == pytest.approx(6.0, abs=0.2)
    assert records["batch"].num_interrupted == 1
    # The tenant's own jobs changed places; what they take from the other is what the batch job would have.
    assert records["other"].began_at <= 12.0 + 1e-6


def test_a_tenant_that_always_has_one_job_saves_up_no_claim():
    """On eight gangs it gets less than its share for an hour; then it must not take all of them for as long."""
    loop = EventLoop()

    def next_one(record):
        if record.ask.tenant == "small" and loop.now < 3600:
            cluster.ask(Ask(id=f"s{loop.now}", tenant="small", num_steps=10, step_s=1.0))

    cluster = VirtualCluster(loop, {}, 8, Times(), on_end=next_one)
    for ask in backlog("large", 4000, 10, 1.0):
        cluster.ask(ask)
    cluster.ask(Ask(id="s", tenant="small", num_steps=10, step_s=1.0))
    loop.at(3600.0, lambda: [cluster.ask(ask) for ask in backlog("small", 400, 10, 1.0)])
    loop.run(until=4000.0)
    after = [(tenant, cost) for at, tenant, cost in cluster.delivered if 3600 < at <= 3700]
    large = sum(cost for tenant, cost in after if tenant == "large")
    assert large >= 0.4 * sum(cost for _, cost in after)


def test_a_tenant_that_worked_alone_owes_nothing():
    loop = EventLoop()
    cluster = VirtualCluster(loop, {}, 1, Times())
    for ask in backlog("early", 100, 10, 1.0):
        cluster.ask(ask)
    loop.at(1100.0, lambda: cluster.ask(Ask(id="l", tenant="late", num_steps=10, step_s=1.0)))
    for tenant in ("late", "early"):
        more = [Ask(id=f"{tenant}-{n}", tenant=tenant, num_steps=10, step_s=1.0) for n in range(60)]
        loop.at(1105.0, lambda more=more: [cluster.ask(ask) for ask in more])
    loop.run(until=1400.0)
    got = defaultdict(float)
    for at, tenant, cost in cluster.delivered:
        if at > 1105.0:
            got[tenant] += cost
    assert abs(got["early"] - got["late"]) <= 20.0 + 1e-6


@runs
@given(jobs=arrivals(), limit=st.integers(1, 3), num_gangs=st.integers(1, 4))
def test_a_tenant_never_has_more_jobs_in_progress_than_its_quota(jobs, limit, num_gangs):
    loop = EventLoop()
    times = Times(prepare_s=0.3, decode_s=0.5)
    cluster = VirtualCluster(loop, {}, num_gangs, times, max_running={"a": limit})
    started(cluster, loop, jobs)
    loop.run(until=100_000)
    mine = [record for record in cluster.records.values() if record.ask.tenant == "a"]
    changes = sorted(
        change for one in mine for change in ((one.ready_at - times.prepare_s, 1), (one.ended_at - 1e-9, -1))
    )
    in_progress = 0
    for _, change in changes:
        in_progress += change
        assert in_progress <= limit
    assert in_progress == 0


def test_a_tenant_at_its_quota_does_not_give_a_newcomer_what_others_are_due():
    loop = EventLoop()
    cluster = VirtualCluster(loop, {}, 4, Times(prepare_s=0.3), max_running={"capped": 1})
    for ask in (*backlog("capped", 20, 10, 1.0), *backlog("early", 100, 10, 1.0)):
        cluster.ask(ask)
    started(cluster, loop, [(100.0, ask) for ask in backlog("late", 100, 10, 1.0)])
    loop.run(until=200.0)
    since = [(tenant, cost) for at, tenant, cost in cluster.delivered if at > 110.0]
    got = {name: sum(cost for tenant, cost in since if tenant == name) for name in ("capped", "early", "late")}
    assert got["capped"] == pytest.approx(90.0, abs=10.0)  # one gang all the time
    assert abs(got["early"] - got["late"]) <= 40.0  # the other three, within the jobs in service


def test_the_same_events_give_the_same_run():
    def run():
        loop = EventLoop()
        cluster = VirtualCluster(loop, {"a": 2.0}, 2, Times(prepare_s=0.1))
        for tenant in "abc":
            for ask in backlog(tenant, 9, 3, 1.0):
                cluster.ask(ask)
        loop.run()
        return cluster.delivered

    first, second = run(), run()
    assert first == second
    assert all(before[0] <= after[0] for before, after in pairwise(first))
