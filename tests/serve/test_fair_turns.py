import asyncio

import pytest

from serve.fair_turns import FairTurns
from serve.policy.fairness import Waiting


def job(name, created_at=0.0, cost=1.0, priority="interactive"):
    """``a1`` is a job of tenant a."""
    return Waiting(id=name, tenant=name[0], priority=priority, created_at=created_at, cost=cost)


def order_of(jobs, weights=None, num_places=1):
    """Names in the order of their turns; the first has it before the others come."""
    turns, had = FairTurns(num_places), []

    async def have(one):
        async with turns.turn(one, (weights or {}).get(one.tenant, 1.0), now=0.0):
            had.append(one.id)
            await asyncio.sleep(0)

    async def scenario():
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for one in jobs:
                group.create_task(have(one))

    asyncio.run(scenario())
    return had


def test_one_job_goes_before_the_backlog_of_another_tenant():
    backlog = [job(f"a{n}", created_at=n) for n in range(5)]
    assert order_of([*backlog, job("b0", created_at=9)]) == ["a0", "b0", "a1", "a2", "a3", "a4"]


def test_backlogs_take_turns_by_weight_and_cost():
    jobs = [job(f"{tenant}{n}", created_at=n, cost=cost) for tenant, cost in (("a", 1.0), ("b", 2.0)) for n in range(6)]
    first = [name[0] for name in order_of(jobs)[:6]]
    assert (first.count("a"), first.count("b")) == (4, 2)
    first = [name[0] for name in order_of(jobs, {"a": 1.0, "b": 2.0})[:6]]
    assert (first.count("a"), first.count("b")) == (3, 3)


def test_of_one_tenant_urgent_ones_go_first_then_the_oldest():
    jobs = [job("a0"), job("a1", 3.0, priority="batch"), job("a2", 2.0), job("a3", 1.0)]
    assert order_of(jobs) == ["a0", "a3", "a2", "a1"]


@pytest.mark.parametrize("is_waiting", [True, False])
def test_who_is_stopped_leaves_its_place_to_the_next(is_waiting):
    async def scenario():
        turns = FairTurns(1)

        async def have(name, seconds):
            async with turns.turn(job(name), 1.0, now=0.0):
                await asyncio.sleep(seconds)

        first = asyncio.create_task(have("a0", 30))
        await asyncio.sleep(0)
        second = asyncio.create_task(have("b0", 0 if not is_waiting else 30))
        third = asyncio.create_task(have("c0", 0))
        await asyncio.sleep(0)
        if is_waiting:
            second.cancel()
        first.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(first, second, third, return_exceptions=True)
        assert not third.cancelled()

    asyncio.run(scenario())


def test_places_come_and_go():
    async def scenario():
        turns, having, let = FairTurns(1), [], asyncio.Event()

        async def have(name):
            async with turns.turn(job(name), 1.0, now=0.0):
                having.append(name)
                await let.wait()

        async def settled():
            for _ in range(5):
                await asyncio.sleep(0)
            return len(having)

        tasks = [asyncio.create_task(have(f"a{n}")) for n in range(6)]
        assert await settled() == 1
        turns.resize(3, now=0.0)
        assert await settled() == 3
        turns.resize(1, now=0.0)
        tasks[0].cancel()  # two are left where one should be: nobody follows
        assert await settled() == 3
        tasks[1].cancel()
        assert await settled() == 3
        tasks[2].cancel()
        assert await settled() == 4
        let.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert having == [f"a{n}" for n in range(6)]

    asyncio.run(scenario())
