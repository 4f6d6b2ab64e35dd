"""The way of a job through the dispatcher, on a real job store; the rest of the cluster is a stand-in."""

import asyncio
import sqlite3
import time
from dataclasses import replace

import pytest
from sqlalchemy.exc import OperationalError

from pusa_dist.errors import NumericsError, RequestError
from pusa_dist.request import Conditioning
from serve.stages import Conditions, ReplicaLostError, TensorRef
from serve.watched import StuckError
from tests.serve.dispatcher_support import INPUT, REQUEST, add_long, run, stored


def test_a_job_goes_through_its_stages_by_reference(world):
    conditioning = (Conditioning(input=0, position=0, noise_multiplier=0.2),)
    world.add("j", request=replace(REQUEST, conditioning=conditioning), inputs=(INPUT,))

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    job = world.job("j")
    assert job.status == "completed"
    assert job.precision == "fp32"
    assert world.artifacts.read(job.results["video"].key) == b"mp4"
    assert set(job.seconds) == {"text", "encode", "wait", "denoise", "decode"}
    conditions = Conditions(context=TensorRef("a"), negative=TensorRef("b"), given=TensorRef("given"))
    assert ("denoise", "j", conditions) in world.stages.calls
    assert ("decode", "j", "latents") in world.stages.calls
    assert world.metrics.outcomes == ["completed"]
    assert world.metrics.stages == ["text", "encode", "place", "denoise", "decode"]
    assert world.metrics.num_waited == 1
    assert world.metrics.cost == pytest.approx(3 * world.gang.step_s)


def test_without_guidance_or_inputs_nothing_needless_is_computed(world):
    world.add("j", request=replace(REQUEST, guidance_scale=1.0))

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert [call[0] for call in world.stages.calls] == ["embed", "denoise", "decode"]
    conditions = Conditions(context=TensorRef("a"), negative=None, given=None)
    assert ("denoise", "j", conditions) in world.stages.calls


def test_progress_is_written_while_the_job_runs(world):
    world.add("j")

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.job("j").step == 1)
            assert (world.job("j").status, world.job("j").stage) == ("in_progress", "denoise")
            world.gang.gate.set()
            await world.ended("j")

    run(scenario)


@pytest.mark.parametrize("how", ["request_cancel", "delete"])
def test_a_cancelled_or_deleted_job_stops_and_leaves_nothing(world, how):
    world.add("j")

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.job("j").step == 1)
            started = time.monotonic()
            getattr(world.store, how)("local", "j")
            await world.until(lambda: world.gang.closed == ["j"])
            assert time.monotonic() - started < 1.0
            await world.until(lambda: world.metrics.outcomes == ["cancelled"])

    run(scenario)
    assert stored(world, "j") == []
    assert world.job("j") is None if how == "delete" else world.job("j").status == "cancelled"


@pytest.mark.parametrize(
    ("stage", "error", "code"),
    [
        ("denoise", NumericsError("step 2 is not finite"), "numerics_error"),
        ("decode", ValueError("a bug"), "internal_error"),
        ("decode", RequestError("the clip is broken", "input", "invalid_clip"), "invalid_clip"),
        ("decode", TimeoutError("some socket"), "internal_error"),
    ],
)
def test_every_failure_has_a_stable_code(world, stage, error, code):
    world.add("j")

    async def scenario():
        world.stages.faults["j", stage] = [error]
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    job = world.job("j")
    assert (job.status, job.error_code, job.attempt) == ("failed", code, 1)
    assert "bug" not in job.error_message
    assert world.metrics.outcomes == [code]


def test_a_job_past_its_deadline_is_failed_wherever_it_is(world):
    world.add("running")
    world.add("old", created_at=time.time() - 3600)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher(job_deadline_s=1.0):
            await world.ended("running", "old")

    run(scenario)
    for job_id in ("running", "old"):
        assert world.job(job_id).error_code == "deadline_exceeded"
    assert world.gang.residents == {}


def test_an_overdue_job_is_failed_though_more_urgent_ones_keep_coming(world):
    world.add("old", priority="batch", created_at=time.time() - 3600)
    world.add("urgent")

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher(job_deadline_s=60.0):
            await world.ended("old")

    run(scenario)
    assert world.job("old").error_code == "deadline_exceeded"


def test_jobs_of_a_model_that_is_not_served_are_no_demand_and_end_when_they_are_overdue(world):
    world.add("foreign", model="another", cost=5_000.0)
    world.add("old", model="another", cost=5_000.0, created_at=time.time() - 3600)

    async def scenario():
        async with world.dispatcher() as dispatcher:
            await world.ended("old")
            await asyncio.sleep(1.2)
            assert (dispatcher.demand.num_jobs, dispatcher.demand.backlog_s) == (0, 0.0)

    run(scenario)
    assert world.job("old").error_code == "deadline_exceeded"
    assert world.job("foreign").status == "queued"


def test_a_row_that_cannot_be_read_keeps_no_other_waiting_and_is_failed_when_it_is_overdue(world):
    for number in range(9):
        world.add(f"unreadable-{number}")
    world.add("overdue", created_at=time.time() - 3600)
    with sqlite3.connect(world.folder / "jobs.sqlite") as connection:
        connection.execute("UPDATE jobs SET request = 'no JSON'")
    world.add("good")
    world.add("good-too", tenant="other")

    async def scenario():
        async with world.dispatcher(job_deadline_s=60.0):
            await world.until(lambda: len(world.metrics.outcomes) == 3)

    run(scenario)
    assert sorted(world.metrics.outcomes) == ["completed", "completed", "unreadable_job"]
    assert world.store.counts() == {"queued": 9, "completed": 2, "failed": 1}


def test_a_cancellation_that_comes_while_the_end_is_written_does_not_interrupt_it(world, monkeypatch):
    world.add("j")
    complete = world.store.complete

    async def scenario():
        def complete_slowly(*arguments):
            loop.call_soon_threadsafe(dispatcher._attempts["j"].interrupt, "cancelled")
            time.sleep(0.2)
            return complete(*arguments)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(world.store, "complete", complete_slowly)
        async with world.dispatcher() as dispatcher:
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.metrics.outcomes) == ("completed", ["completed"])


def test_a_job_deleted_while_its_inputs_are_read_is_no_internal_error(world, caplog):
    conditioning = (Conditioning(input=0, position=0, noise_multiplier=0.2),)
    world.add("j", request=replace(REQUEST, conditioning=conditioning), inputs=(INPUT,))

    async def scenario():
        world.stages.encoding = asyncio.Event()
        world.stages.faults["j", "encode"] = [FileNotFoundError("jobs/j/inputs/0")]
        async with world.dispatcher():
            await world.until(lambda: ("encode", "j") in world.stages.calls)
            world.store.delete("local", "j")
            world.stages.encoding.set()
            await world.until(lambda: world.metrics.outcomes == ["cancelled"])

    run(scenario)
    assert "internal error" not in caplog.text


def test_previews_are_published_one_after_the_other_and_a_lost_one_costs_nothing(world):
    add_long(world, "j", preview_every=2)

    async def scenario():
        world.gang.step_s = 0.1
        world.stages.faults["j", "preview"] = [ReplicaLostError("the VAE died")]
        async with world.dispatcher():
            await world.until(lambda: world.job("j").preview_step == 4)
            await world.ended("j")

    run(scenario)
    assert world.job("j").status == "completed"
    assert [name for name in stored(world, "j") if "preview" in name] in (
        ["attempts/1/preview-4.webp"],
        ["attempts/1/preview-6.webp"],
    )


def test_a_busy_vae_is_given_one_preview_of_a_job_at_a_time(world):
    add_long(world, "j", preview_every=1)

    async def scenario():
        world.stages.drawing = asyncio.Event()
        async with world.dispatcher():
            await world.ended("j")
            world.stages.drawing.set()

    run(scenario)
    assert world.job("j").status == "completed"
    assert [call for call in world.stages.calls if call[0] == "preview"] == [("preview", 1)]


def test_a_loop_that_stands_still_is_noticed_and_one_whose_database_is_away_is_well(world, monkeypatch):
    monkeypatch.setattr("serve.dispatcher.STUCK_AFTER_S", 2.5)
    tenants, is_away = world.store.tenants, [True]

    def tenants_if_there():
        if is_away:
            raise OperationalError("SELECT", {}, Exception("connection refused"))
        return tenants()

    async def scenario():
        monkeypatch.setattr(world.store, "tenants", tenants_if_there)
        async with world.dispatcher() as dispatcher:
            for _ in range(4):
                await asyncio.sleep(1.0)
                dispatcher.check()
            is_away.clear()
            go_on = asyncio.Event()
            monkeypatch.setattr(dispatcher, "_report_and_stop", go_on.wait)
            await asyncio.sleep(4.5)
            with pytest.raises(StuckError, match=r"stood still for more than 2\.5 s"):
                dispatcher.check()
            go_on.set()
            await asyncio.sleep(0.5)
            dispatcher.check()
        dispatcher.check()

    run(scenario)
