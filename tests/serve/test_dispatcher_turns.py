"""Whose turn it is: places on gangs, urgent jobs, several tenants and several dispatchers."""

import asyncio
import time

import pytest

from pusa_dist.errors import GangError
from serve.seats import Seat
from tests.serve.dispatcher_support import REQUEST, FakeGang, add_long, run


def test_a_gang_holds_no_more_than_it_may_and_priority_comes_first(world):
    for n in range(4):
        world.add(f"batch-{n}", priority="batch", created_at=1.0 + n + time.time() - 20)
    world.add("urgent")

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: len(world.gang.residents) >= 2)
            # Which of the two was embedded first is chance; no other may be on the gang before them.
            assert {job_id for job_id, _, _ in world.gang.started[:2]} == {"urgent", "batch-0"}
            world.gang.gate.set()
            await world.ended("urgent", *(f"batch-{n}" for n in range(4)))

    run(scenario)
    assert world.gang.max_held <= 2 + 1  # one may wait beside those that the ranks hold


def test_a_gang_is_told_what_it_holds_and_how_far_that_is_safe(world, monkeypatch):
    monkeypatch.setattr("serve.gangs.HOLD_S", 0.05)
    add_long(world, "j")

    async def scenario():
        world.gang.step_s = 0.1
        async with world.dispatcher():
            await world.until(lambda: world.gang.renewals and world.gang.renewals["j"].published_step == 2)
            assert world.gang.renewals["j"].attempt == 1
            await world.ended("j")
            await world.until(lambda: not world.gang.renewals)

    run(scenario)


def test_a_gang_that_is_closed_gets_no_job_and_what_it_releases_goes_on_elsewhere(world, monkeypatch):
    monkeypatch.setattr("serve.gangs.HOLD_S", 0.05)
    monkeypatch.setattr("serve.gangs.ANSWER_S", 1.0)
    add_long(world, "j")
    other = FakeGang(world.stages)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher() as dispatcher:
            await world.until(lambda: world.job("j").step == 1)
            world.gang.is_closed = True
            dispatcher.register("other", other, 2)
            await world.ended("j")
            await world.until(lambda: world.metrics.states == {"leaving": 1, "open": 1})
            world.gang.is_silent = True
            await world.until(lambda: world.metrics.states == {"open": 1})
            world.gang.is_silent = False

    run(scenario)
    assert world.metrics.num_lost == 0  # it had said that it would leave
    assert world.job("j").attempt == 1  # the same attempt, so that nothing was given up
    assert other.started == [("j", 1, 1)]
    assert (world.metrics.num_released, world.metrics.num_repeated) == (1, 0)
    assert world.job("j").steps_run == 6


def test_an_idle_gang_takes_over_a_job_that_waits_on_another(world):
    add_long(world, "first")
    add_long(world, "second", created_at=time.time() + 0.1)
    other = FakeGang(world.stages)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher() as dispatcher:
            await world.until(lambda: len(world.gang.residents) == 2)
            dispatcher.register("other", other, 2)
            await world.until(lambda: other.started)
            world.gang.gate.set()
            await world.ended("first", "second")

    run(scenario)
    assert other.started == [("second", 1, 0)]


def test_an_idle_gang_takes_over_a_job_that_was_interrupted_and_goes_on_where_it_stands(world):
    add_long(world, "first")
    add_long(world, "second", created_at=time.time() + 0.1)
    other = FakeGang(world.stages)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher() as dispatcher:
            await world.until(lambda: world.job("first").step == 1 and len(world.gang.residents) == 2)
            world.gang.running = "second"
            await world.until(lambda: world.job("second").step == 1)
            dispatcher.register("other", other, 2)
            await world.until(lambda: other.started)
            world.gang.gate.set()
            await world.ended("first", "second")

    run(scenario)
    assert other.started == [("first", 1, 1)]
    assert world.gang.started == [("first", 1, 0), ("second", 1, 0)]
    assert world.metrics.num_repeated == 0
    assert [world.job(job_id).steps_run for job_id in ("first", "second")] == [6, 6]


def test_a_job_that_is_stopped_in_the_moment_in_which_it_gets_its_place_leaves_the_place_free(world, monkeypatch):
    for number, job_id in enumerate(("running", "following", "stopped")):
        add_long(world, job_id, created_at=time.time() + 0.1 * number)
    other = FakeGang(world.stages)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher(gangs={"gang": (world.gang, 1)}) as dispatcher:
            await world.until(lambda: len(world.gang.residents) == 2 and world.job("stopped").stage == "denoise")
            place = Seat.place

            def place_and_stop(seat, gang, claim):
                place(seat, gang, claim)
                if seat.job.id == "stopped":
                    world.store.request_cancel("local", "stopped")
                    seat.attempt.interrupt("cancelled")

            monkeypatch.setattr(Seat, "place", place_and_stop)
            dispatcher.register("other", other, 1)
            await world.until(lambda: world.metrics.outcomes == ["cancelled"])
            monkeypatch.undo()
            await world.until(lambda: other.started)  # it is not taken for busy
            world.gang.gate.set()
            await world.until(lambda: len(world.metrics.outcomes) == 3)
            assert dispatcher._gangs.num_placed == 0

    run(scenario)
    assert other.started == [("following", 1, 0)]


def test_an_urgent_job_takes_the_place_of_a_waiting_batch_job_of_its_tenant(world):
    for n in range(3):
        add_long(world, f"batch-{n}", priority="batch", created_at=time.time() - 30 + n)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: len(world.gang.residents) >= 2)
            add_long(world, "urgent")
            await world.until(lambda: "urgent" in world.gang.residents)
            world.gang.gate.set()
            await world.ended("urgent", *(f"batch-{n}" for n in range(3)))

    run(scenario)
    assert world.gang.max_held <= 2 + 1  # one may wait beside those that the ranks hold
    assert all(world.job(f"batch-{n}").attempt == 1 for n in range(3))


def test_a_tenant_that_comes_late_is_not_behind_the_whole_queue_of_another(world):
    for n in range(6):
        add_long(world, f"a-{n}", tenant="a", created_at=time.time() - 30 + n)

    async def scenario():
        world.gang.step_s = 0.03
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.gang.steps)
            add_long(world, "b", tenant="b")
            await world.until(lambda: world.store.get("b", "b").attempt == 1)
            world.gang.gate.set()
            await world.until(lambda: world.store.get("b", "b").is_final)
            num_done = sum(world.store.get("a", f"a-{n}").is_final for n in range(6))
            assert num_done <= 3

    run(scenario)


def test_jobs_that_may_not_run_do_not_give_a_newcomer_what_others_are_due(world):
    world.store.set_tenant("stuck", limits={"max_running": 0})
    add_long(world, "stuck", tenant="stuck", created_at=time.time() - 10)
    for n in range(40):
        add_long(world, f"early-{n}", tenant="early", created_at=time.time() - 9 + n / 10)

    def steps_of(tenant):
        return sum(job_id.startswith(tenant) for job_id, _ in world.gang.steps)

    async def scenario():
        world.gang.step_s = 0.05  # a job takes longer than it takes to claim the next
        async with world.dispatcher():
            await world.until(lambda: steps_of("early") >= 48)
            for n in range(20):
                add_long(world, f"late-{n}", tenant="late")
            await world.until(lambda: steps_of("late") >= 1)
            before = steps_of("early")
            await world.until(lambda: steps_of("late") >= 30)
            assert steps_of("early") - before >= 12

    run(scenario)
    assert world.store.get("stuck", "stuck").status == "queued"


def test_a_tenant_runs_no_more_jobs_than_its_quota_whatever_the_number_of_dispatchers(world):
    world.store.set_tenant("local", limits={"max_running": 1})
    names = [f"j-{n}" for n in range(3)]
    for name in names:
        add_long(world, name)
    gangs = [world.gang, FakeGang(world.stages)]

    async def scenario():
        for gang in gangs:
            gang.gate.clear()
        async with world.dispatcher(), world.dispatcher(gangs={"other": (gangs[1], 2)}):
            await world.until(lambda: gangs[0].steps or gangs[1].steps)
            await asyncio.sleep(0.5)
            assert world.store.counts() == {"in_progress": 1, "queued": 2}
            for gang in gangs:
                gang.gate.set()
            await world.ended(*names)

    run(scenario)
    assert all(world.job(name).status == "completed" for name in names)


def test_what_a_quota_keeps_waiting_asks_for_no_gangs(world):
    world.store.set_tenant("local", limits={"max_running": 2})
    for n in range(5):
        add_long(world, f"j-{n}", cost=10.0)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher() as dispatcher:
            await world.until(lambda: len(world.gang.residents) == 2)
            await world.until(lambda: dispatcher.demand.num_jobs == 2)
            world.store.set_tenant("local", limits={"max_running": None})
            await world.until(lambda: dispatcher.demand.num_jobs == 5)
            world.gang.gate.set()

    run(scenario)


def test_what_was_delivered_is_charged_to_the_tenant_once(world):
    add_long(world, "j")

    async def scenario():
        world.gang.step_s = 0.05
        async with world.dispatcher():
            await world.until(lambda: world.job("j").checkpoint_step == 2)
            world.stages.faults["j", "denoise"] = [GangError("rank 1 died")]
            await world.ended("j")

    run(scenario)
    (day,) = world.store.usage("local", "2000-01-01")
    assert day.cost == pytest.approx(6 * 0.05, rel=0.4)  # six new steps, though eight may have run
    assert world.store.tenant("local").virtual_time == pytest.approx(day.cost)
    (shape, seconds) = next(iter(world.store.step_seconds("debug").items()))
    assert (shape.num_tokens, seconds) == (REQUEST.num_tokens, pytest.approx(0.05))


def test_two_dispatchers_share_a_store_and_neither_runs_the_others_jobs(world):
    names = [f"j-{n}" for n in range(6)]
    for name in names:
        add_long(world, name)
    other = FakeGang(world.stages)
    gangs = (world.gang, other)

    async def scenario():
        for gang in gangs:
            gang.gate.clear()
        async with world.dispatcher(), world.dispatcher(gangs={"other": (other, 2)}):
            await world.until(lambda: all(gang.started for gang in gangs))  # neither may end what is left for the other
            for gang in gangs:
                gang.gate.set()
            await world.ended(*names)

    run(scenario)
    began = [job_id for gang in gangs for job_id, _, _ in gang.started]
    assert sorted(began) == names
    assert world.store.usage("local", "2000-01-01")[0].cost == pytest.approx(world.store.tenant("local").virtual_time)


def test_a_backlog_at_the_vae_keeps_no_other_tenant_out(world):
    for number in range(3):
        world.add(f"a{number}", created_at=time.time() + number)

    async def scenario():
        world.stages.decoding = asyncio.Event()
        async with world.dispatcher(num_decoders=1, max_decoding=1):
            await world.until(lambda: world.job("a0").stage == "decode")
            await world.until(lambda: world.job("a1").stage == "decode")
            world.add("b0", tenant="other")
            await world.until(lambda: world.store.get("other", "b0").stage == "decode")
            world.stages.decoding.set()
            await world.until(lambda: len(world.metrics.outcomes) == 4)

    run(scenario)
    decoded = [call[1] for call in world.stages.calls if call[0] == "decode"]
    assert decoded[:2] == ["a0", "b0"]
    assert set(world.metrics.outcomes) == {"completed"}


def test_more_vaes_are_given_more_jobs(world):
    names = [f"a{n}" for n in range(4)]
    for number, name in enumerate(names):
        world.add(name, created_at=time.time() + number)

    def num_given():
        return sum(call[0] == "decode" for call in world.stages.calls)

    async def scenario():
        world.stages.decoding = asyncio.Event()
        async with world.dispatcher(num_decoders=1) as dispatcher:
            await world.until(lambda: all(world.job(name).stage == "decode" for name in names))
            assert num_given() == 1
            dispatcher.resize_decoders(3)
            await world.until(lambda: num_given() == 3)
            world.stages.decoding.set()
            await world.ended(*names)

    run(scenario)


def test_what_is_asked_for_says_of_which_dispatcher_it_is_and_how_old(world):
    async def scenario():
        told = []
        for _ in range(2):
            async with world.dispatcher() as dispatcher:
                await world.until(lambda: dispatcher.demand.age_s > 0)
                told.append(dispatcher.demand)
                await world.until(lambda: dispatcher.demand.age_s > told[-1].age_s)
                assert dispatcher.demand.started_at == told[-1].started_at
        assert told[0].started_at < told[1].started_at

    run(scenario)
