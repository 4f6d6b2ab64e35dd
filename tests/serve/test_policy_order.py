"""The order of waiting jobs, and the virtual clock."""

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.policy.fairness import InHand, Standing, Waiting, idle_clock, in_order, virtual_clock
from serve.policy.priority import PATIENCE_S, is_urgent


def job(name, tenant=None, *, cost=10.0, priority="interactive", created_at=0.0, started=False):
    return Waiting(
        id=name, tenant=tenant or name[0], priority=priority, created_at=created_at, cost=cost, is_started=started
    )


def standings(weight=None, **virtual_times):
    return {
        name: Standing(weight=(weight or {}).get(name, 1.0), virtual_time=time) for name, time in virtual_times.items()
    }


def order(jobs, standing, in_hand=(), clock=0.0, now=0.0, **more):
    return [(one.job_id, one.virtual_time) for one in in_order(jobs, standing, in_hand, clock=clock, now=now, **more)]


def names(*arguments, **more):
    return [name for name, _ in order(*arguments, **more)]


def test_tenants_take_turns_by_cost_and_weight():
    jobs = [job(f"a{n}", created_at=n) for n in range(4)] + [job(f"b{n}", created_at=9) for n in range(2)]
    assert names(jobs, standings(a=0.0, b=0.0)) == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert order(jobs, standings(a=0.0, b=0.0, weight={"a": 2.0}))[:4] == [("a0", 0), ("b0", 0), ("a1", 5), ("a2", 10)]


def test_the_one_that_got_less_goes_first():
    assert names([job("a"), job("b")], standings(a=3.0, b=2.0)) == ["b", "a"]


def test_jobs_in_hand_count_in_advance():
    in_hand = [InHand(tenant="a", cost=5.0, is_urgent=True)]
    assert order([job("a"), job("b")], standings(a=0.0, b=2.0), in_hand) == [("b", 2.0), ("a", 5.0)]


def test_a_tenants_batch_jobs_in_hand_delay_its_batch_jobs_only():
    in_hand = [InHand(tenant="a", cost=5.0, is_urgent=False)]
    jobs = [job("a0"), job("a1", priority="batch")]
    assert order(jobs, standings(a=0.0), in_hand) == [("a0", 0.0), ("a1", 15.0)]


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([job("a1", priority="batch"), job("a2", created_at=5.0)], ["a2", "a1"]),  # class
        ([job("a1", created_at=2.0), job("a2", created_at=1.0)], ["a2", "a1"]),  # age
        ([job("a1", created_at=1.0), job("a2", created_at=2.0, started=True)], ["a2", "a1"]),  # what has begun
        ([job("a1", priority="batch", created_at=-PATIENCE_S - 1), job("a2", created_at=-3.0)], ["a1", "a2"]),
        ([job("a2"), job("a1")], ["a1", "a2"]),
    ],
)
def test_within_a_tenant(jobs, expected):
    assert names(jobs, standings(a=0.0)) == expected


def test_between_tenants_with_equal_shares_class_and_age_decide():
    jobs = [job("a", priority="batch"), job("b", created_at=2.0), job("c", created_at=1.0)]
    assert names(jobs, standings(a=0.0, b=0.0, c=0.0)) == ["c", "b", "a"]


def test_a_tenant_that_lagged_is_lifted_to_one_job_before_the_clock():
    (first, second) = in_order([job("a0"), job("a1", created_at=1.0)], standings(a=3.0), clock=100.0, now=0.0)
    assert (first.virtual_time, first.lifted_to) == (90.0, 90.0)
    assert second.virtual_time == 100.0
    in_hand = [InHand(tenant="a", cost=4.0, is_urgent=True)]
    (only,) = in_order([job("a0")], standings(a=3.0), in_hand, clock=100.0, now=0.0)
    assert (only.virtual_time, only.lifted_to) == (90.0, 86.0)
    # The credit covers a change of strength there and back, and counts by weight.
    light = standings(a=3.0, weight={"a": 0.5})
    assert order([job("a0")], light, clock=100.0, switch_s=1.0) == [("a0", 100.0 - 24.0)]


def test_one_that_is_not_behind_is_not_lifted():
    (turn,) = in_order([job("a")], standings(a=95.0), clock=100.0, now=0.0)
    assert (turn.virtual_time, turn.lifted_to) == (95.0, 95.0)


waiting = st.lists(
    st.tuples(
        st.sampled_from("abcd"), st.floats(0.1, 50.0), st.sampled_from(["interactive", "batch"]), st.floats(-2000, 0)
    ),
    max_size=20,
)


@settings(max_examples=100)
@given(
    waiting=waiting,
    times=st.lists(st.floats(0, 200), min_size=4, max_size=4),
    weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
    in_hand=st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 50), st.booleans()), max_size=6),
    clock=st.floats(0, 300),
)
def test_every_job_gets_one_turn_and_turns_go_forward(waiting, times, weights, in_hand, clock):
    jobs = [
        job(f"{tenant}{n}", tenant, cost=cost, priority=priority, created_at=at)
        for n, (tenant, cost, priority, at) in enumerate(waiting)
    ]
    standing = {
        name: Standing(weight=weight, virtual_time=time)
        for name, weight, time in zip("abcd", weights, times, strict=True)
    }
    held = [InHand(tenant=tenant, cost=cost, is_urgent=urgent) for tenant, cost, urgent in in_hand]
    turns = list(in_order(jobs, standing, held, clock=clock, now=0.0))
    assert sorted(turn.job_id for turn in turns) == sorted(one.id for one in jobs)
    assert [turn.virtual_time for turn in turns] == sorted(turn.virtual_time for turn in turns)
    by_id = {one.id: one for one in jobs}
    of_tenant = defaultdict(list)
    for turn in turns:
        of_tenant[turn.tenant].append(turn)
        assert turn.lifted_to >= standing[turn.tenant].virtual_time
    for mine in of_tenant.values():
        urgent = [is_urgent(by_id[turn.job_id].priority, by_id[turn.job_id].created_at, 0.0) for turn in mine]
        assert urgent == sorted(urgent, reverse=True)
        weight = standing[mine[0].tenant].weight
        for before, after in pairwise(mine):
            assert after.virtual_time >= before.virtual_time + by_id[before.job_id].cost / weight - 1e-6
        # Nobody waits with more than one job's claim on the clock.
        assert mine[0].virtual_time >= clock - by_id[mine[0].job_id].cost / weight - 1e-6


def test_placing_a_lifted_job_gives_the_next_one_the_same_turn_as_before():
    standing, jobs = standings(a=3.0), [job("a0"), job("a1", created_at=1.0)]
    first, second = in_order(jobs, standing, clock=100.0, now=0.0)
    placed = standings(a=first.lifted_to)
    in_hand = [InHand(tenant="a", cost=10.0, is_urgent=True)]
    (again,) = in_order(jobs[1:], placed, in_hand, clock=100.0, now=0.0)
    assert again.virtual_time == second.virtual_time


@pytest.mark.parametrize(
    ("before", "starts", "at", "turns", "expected"),
    [
        (5.0, [], [], [], 5.0),
        (5.0, [7.0, 9.0], [7.5, 9.5], [], 9.0),  # the largest start tag in service
        (5.0, [0.0], [8.0], [], 8.0),  # or where all of them are past
        (5.0, [7.0, 9.0], [7.5, 9.5], [8.0], 8.0),  # never past one that waits
        (5.0, [7.0], [7.5], [2.0], 5.0),  # and never back
    ],
)
def test_the_virtual_clock(before, starts, at, turns, expected):
    assert virtual_clock(before, starts, at, turns) == expected


def test_an_idle_clock_stands_at_the_largest_virtual_time_of_all():
    assert idle_clock(standings(a=3.0, b=7.0).values()) == 7.0
    assert idle_clock([]) == 0.0
