"""What a job goes on from when a gang, another process or the dispatcher itself is lost or leaves."""

import asyncio
import errno
import threading
import time
from dataclasses import replace

import pytest
from sqlalchemy.exc import OperationalError

from pusa_dist.errors import CheckpointError, GangError
from pusa_dist.request import Conditioning
from serve.ending import MAX_ATTEMPTS, MAX_GANG_LOSSES
from serve.seats import DOUBT_S
from serve.stages import GangUnavailableError, Progress, ReplicaLostError
from serve.store.artifacts import StorageError
from tests.serve.dispatcher_support import INPUT, REQUEST, FakeGang, add_long, run, stored


def test_a_lost_gang_is_tried_again_once(world):
    world.add("j")

    async def scenario():
        world.stages.faults["j", "denoise"] = [GangError("rank 1 died")]
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt, world.job("j").gang_deaths) == ("completed", 2, 1)
    assert world.metrics.reasons == ["gang_lost"]


def test_a_job_on_a_second_lost_gang_is_failed(world):
    world.add("j")

    async def scenario():
        world.stages.faults["j", "denoise"] = [GangError("one"), GangError("two")]
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    job = world.job("j")
    assert (job.status, job.error_code, job.attempt) == ("failed", "gang_died_twice", 2)
    assert job.error_message.startswith("the gang that held the job was lost 2 times")


def test_a_lost_process_that_was_not_the_jobs_gang_does_not_count_against_it(world):
    world.add("j")

    async def scenario():
        error = ReplicaLostError("the VAE died")
        world.stages.faults["j", "decode"] = [error, error]
        began = time.monotonic()
        async with world.dispatcher(replacement_s=0.3):
            await world.ended("j")
        assert time.monotonic() - began > 2 * 0.3  # each time, its replacement had that long to appear

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt, world.job("j").gang_deaths) == ("completed", 3, 0)


def test_a_job_that_keeps_losing_processes_is_failed_in_the_end(world):
    world.add("j")

    async def scenario():
        world.stages.faults["j", "decode"] = [ReplicaLostError("the VAE died")] * 100
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").error_code, world.job("j").attempt) == ("replica_lost", MAX_ATTEMPTS)


def test_a_job_waits_for_a_gang_that_is_being_replaced_without_losing_its_attempt(world):
    world.add("j")

    async def scenario():
        world.stages.faults["j", "place"] = [GangUnavailableError("being replaced")]
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 1)
    assert [call[0] for call in world.stages.calls].count("denoise") == 2


def test_checkpoints_are_published_acknowledged_and_removed(world):
    add_long(world, "j")

    async def scenario():
        world.gang.step_s = 0.2
        async with world.dispatcher():
            await world.until(lambda: world.job("j").checkpoint_step == 4)
            await world.until(lambda: stored(world, "j") == ["checkpoints/1-4"])
            await world.ended("j")

    run(scenario)
    assert world.gang.acknowledged in ([("j", 2), ("j", 4)], [("j", 2), ("j", 4), ("j", 6)])
    assert stored(world, "j") == ["attempts/1/video.mp4"]
    assert world.job("j").steps_run == 6


def test_an_attempt_after_a_lost_gang_begins_at_the_checkpoint_without_text_and_encoder(world):
    conditioning = (Conditioning(input=0, position=0, noise_multiplier=0.2),)
    request = replace(REQUEST, conditioning=conditioning, num_inference_steps=6)
    world.add("j", request=request, inputs=(INPUT,), num_steps=6)

    async def scenario():
        world.gang.step_s = 0.02
        async with world.dispatcher():
            await world.until(lambda: world.job("j").checkpoint_step == 2)
            world.stages.faults["j", "denoise"] = [GangError("rank 1 died")]
            await world.ended("j")

    run(scenario)
    (_, _, begins) = world.gang.started[1]
    assert begins >= 2
    assert [call[0] for call in world.stages.calls].count("embed") == 2
    assert [call[0] for call in world.stages.calls].count("encode") == 1
    job = world.job("j")
    assert (job.status, job.attempt, job.gang_deaths) == ("completed", 2, 1)
    assert 6 <= job.steps_run <= 6 + 2


def test_a_checkpoint_that_cannot_be_used_costs_the_steps_but_not_the_job(world):
    add_long(world, "j")
    assert world.store.claim("j", "a former one", lease_s=60)
    assert world.store.checkpoint("j", 1, "jobs/j/checkpoints/1-4", 4)
    assert world.store.requeue("j", 1, gang_died=False)

    async def scenario():
        world.stages.faults["j", "admit"] = [CheckpointError("of another revision")]
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert [begins for _, _, begins in world.gang.started] == [4, 0]
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 2)


def test_a_gang_that_falls_silent_is_given_up_and_its_job_goes_on_elsewhere(world, monkeypatch):
    monkeypatch.setattr("serve.gangs.HOLD_S", 0.1)
    monkeypatch.setattr("serve.gangs.ANSWER_S", 0.3)
    add_long(world, "j")
    other = FakeGang(world.stages)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher(gangs={"gang": (world.gang, 2)}) as dispatcher:
            await world.until(lambda: world.job("j").step == 1)
            world.gang.is_silent = True
            dispatcher.register("other", other, 2)
            await world.ended("j")
            world.gang.is_silent = False

    run(scenario)
    assert [job_id for job_id, _, _ in other.started] == ["j"]
    assert (world.job("j").status, world.job("j").attempt, world.job("j").gang_deaths) == ("completed", 2, 1)
    assert world.metrics.reasons == ["gang_lost"]
    assert world.metrics.num_lost == 1


class FallingSilent(FakeGang):
    """Its machine loses its power, or its network, whenever a job has made a step there."""

    async def generate(self, given):
        async for message in super().generate(given):
            yield message
            self.is_silent = bool(self.steps)


def test_a_job_takes_no_more_than_three_gangs_with_it_that_fall_silent(world, monkeypatch):
    monkeypatch.setattr("serve.gangs.HOLD_S", 0.05)
    monkeypatch.setattr("serve.gangs.ANSWER_S", 0.15)
    add_long(world, "poison", steps=50)
    gangs = {f"gang-{number}": (FallingSilent(world.stages), 1) for number in range(MAX_GANG_LOSSES + 2)}

    async def scenario():
        async with world.dispatcher(gangs=gangs):
            await world.ended("poison")
            for gang, _ in gangs.values():
                gang.is_silent = False

    run(scenario)
    assert sum(bool(gang.steps) for gang, _ in gangs.values()) == MAX_GANG_LOSSES == 3
    assert (world.job("poison").error_code, world.job("poison").attempt) == ("gang_died_twice", 3)


def test_a_gang_that_was_silent_before_it_had_the_job_is_none_that_the_job_lost(world, monkeypatch):
    monkeypatch.setattr("serve.gangs.HOLD_S", 0.1)
    monkeypatch.setattr("serve.gangs.ANSWER_S", 0.3)

    async def scenario():
        async with world.dispatcher(gangs={"gang": (world.gang, 2)}) as dispatcher:
            await world.until(lambda: dispatcher._gangs.num_free == 2)
            world.gang.is_silent = True
            world.add("j")
            await world.until(lambda: dispatcher._gangs.num_placed == 1)
            dispatcher.register("other", FakeGang(world.stages), 2)
            await world.ended("j")
            world.gang.is_silent = False

    run(scenario)
    assert (world.job("j").status, world.job("j").gang_deaths) == ("completed", 0)


def test_a_dispatcher_that_stops_gives_its_jobs_back_at_once(world):
    world.add("j")

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.job("j").step == 1)
        assert (world.job("j").status, world.job("j").step, world.job("j").checkpoint_step) == ("queued", 1, 1)
        world.gang.gate.set()
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 2)


def test_a_dispatcher_that_stops_hands_its_jobs_to_another_where_they_stand(world):
    add_long(world, "j", steps=8)
    other = FakeGang(world.stages)

    async def scenario():
        world.gang.step_s = 0.05
        stopping = world.dispatcher()
        await stopping.__aenter__()
        await world.until(lambda: len(world.gang.steps) >= 3)
        async with world.dispatcher(gangs={"other": (other, 2)}):
            await stopping.__aexit__(None, None, None)
            await world.ended("j")

    run(scenario)
    assert other.started == [("j", 2, len(world.gang.steps))]
    assert world.job("j").steps_run == 8


def test_a_job_claimed_while_the_dispatcher_stops_is_given_back(world, monkeypatch):
    world.add("j")
    claim, is_claiming = world.store.claim, threading.Event()

    def claim_slowly(*arguments, **options):
        is_claiming.set()
        time.sleep(0.3)
        return claim(*arguments, **options)

    async def scenario():
        monkeypatch.setattr(world.store, "claim", claim_slowly)
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(is_claiming.is_set)

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("queued", 1)


def test_the_jobs_of_a_dead_dispatcher_are_taken_over_when_its_lease_runs_out(world):
    world.add("j")
    assert world.store.claim("j", "the dead one", lease_s=0.5)

    async def scenario():
        async with world.dispatcher(lease_s=1.0):
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 2)
    assert world.metrics.reasons == ["lease_expired"]


def test_a_job_whose_dispatchers_keep_dying_is_failed_in_the_end(world):
    world.add("j")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert world.store.claim("j", "a dead one", lease_s=60)
        assert world.store.requeue("j", attempt, gang_died=False)

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert world.job("j").error_code == "replica_lost"


def test_every_step_is_charged_once_however_often_others_are_made_again(world):
    add_long(world, "j", steps=10)
    for attempt in (1, 2):  # neither came to a checkpoint
        assert world.store.claim("j", "a former one", lease_s=60)
        assert world.store.progress("j", attempt, "denoise", 4, 10)
        assert world.store.requeue("j", attempt, gang_died=False)

    async def scenario():
        world.gang.step_s = 0.05
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert world.metrics.num_repeated == 4
    (day,) = world.store.usage("local", "2000-01-01")
    assert day.cost == pytest.approx(6 * 0.05, rel=0.2)


@pytest.mark.parametrize("how", ["lost", "closing"])
def test_a_job_whose_owner_cancels_it_as_its_attempt_is_given_up_leaves_no_files(world, monkeypatch, how):
    add_long(world, "j", preview_every=1)
    requeue = world.store.requeue

    def cancelled_and_requeued(*arguments):
        world.store.request_cancel("local", "j")
        return requeue(*arguments)

    monkeypatch.setattr(world.store, "requeue", cancelled_and_requeued)

    async def scenario():
        world.gang.step_s = 0.2
        async with world.dispatcher():
            await world.until(lambda: world.job("j").checkpoint_step == 2 and world.job("j").preview_key is not None)
            assert {path.split("/")[0] for path in stored(world, "j")} == {"attempts", "checkpoints"}
            if how == "lost":
                world.stages.faults["j", "denoise"] = [GangError("rank 1 died")]
                await world.until(lambda: world.metrics.outcomes)

    run(scenario)
    assert (world.job("j").status, world.metrics.outcomes) == ("cancelled", ["cancelled"])
    assert stored(world, "j") == []


def test_a_cancelled_job_of_a_dead_dispatcher_leaves_no_files(world):
    add_long(world, "j")
    assert world.store.claim("j", "a dead one", lease_s=0.1)
    world.artifacts.put("jobs/j/checkpoints/1-4", b"state")
    world.store.checkpoint("j", 1, "jobs/j/checkpoints/1-4", 4)
    world.store.request_cancel("local", "j")

    async def scenario():
        async with world.dispatcher(lease_s=1.0):
            await world.until(lambda: world.job("j").status == "cancelled" and stored(world, "j") == [])

    run(scenario)
    assert world.metrics.reasons == []


def test_an_attempt_that_is_cancelled_after_another_took_over_removes_nothing_of_it(world):
    add_long(world, "j")

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher() as dispatcher:
            await world.until(lambda: world.job("j").step == 1)
            assert world.store.requeue("j", 1, gang_died=False)
            assert world.store.claim("j", "another", lease_s=60)
            world.artifacts.put("jobs/j/attempts/2/video.mp4", b"mp4")
            world.artifacts.put("jobs/j/checkpoints/2-4", b"state")
            dispatcher._attempts["j"].interrupt("cancelled")
            await world.until(lambda: not dispatcher._attempts)

    run(scenario)
    assert stored(world, "j") == ["attempts/2/video.mp4", "checkpoints/2-4"]
    assert world.metrics.outcomes == []


def test_an_attempt_that_was_taken_over_publishes_nothing(world):
    world.add("j")

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.job("j").step == 1)
            assert world.store.requeue("j", 1, gang_died=False)
            assert world.store.claim("j", "another", lease_s=60)
            world.gang.gate.set()
            await world.until(lambda: world.gang.closed == ["j"])
            attempt = world.folder / "artifacts/jobs/j/attempts/1"
            await world.until(lambda: not attempt.exists())
            assert world.job("j").attempt == 2

    run(scenario)
    assert (world.job("j").status, world.metrics.outcomes) == ("in_progress", [])


def test_a_job_whose_end_could_not_be_written_is_tried_again(world, monkeypatch):
    world.add("j")
    complete, outages = world.store.complete, [OSError("the store is gone")]

    def complete_after_outage(*arguments):
        if outages:
            raise outages.pop()
        return complete(*arguments)

    async def scenario():
        monkeypatch.setattr(world.store, "complete", complete_after_outage)
        async with world.dispatcher(lease_s=0.5):
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 2)


NO_ANSWER = StorageError(errno.EIO, "no answer")
DEATHS = [GangError(f"death {number}") for number in range(5)]
CONNECTION_CUT = OperationalError("UPDATE jobs", {}, Exception("server closed the connection unexpectedly"))


def failing(monkeypatch, thing, method, error, which=lambda *arguments: True, times=1):
    """Make a method raise the first few times that it is called with such arguments."""
    real, calls = getattr(thing, method), []

    def fail_at_first(*arguments):
        if which(*arguments) and len(calls) < times:
            calls.append(arguments)
            raise error
        return real(*arguments)

    monkeypatch.setattr(thing, method, fail_at_first)


@pytest.mark.parametrize("stage", ["encode", "admit", "decode"])
def test_a_bucket_that_is_away_costs_a_job_time_and_no_attempt(world, monkeypatch, stage):
    monkeypatch.setattr("serve.patience.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("serve.patience.MAX_PAUSE_S", 0.01)
    conditioning = (Conditioning(input=0, position=0, noise_multiplier=0.2),)
    world.add("j", request=replace(REQUEST, conditioning=conditioning), inputs=(INPUT,))

    async def scenario():
        world.stages.faults["j", stage] = [NO_ANSWER] * (MAX_ATTEMPTS + 1)
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt, world.job("j").gang_deaths) == ("completed", 1, 0)
    assert len(world.gang.steps) == 3


class CutOffGang(FakeGang):
    """Its node alone cannot reach the bucket: it can restore no checkpoint, and all else about it is well."""

    async def generate(self, given):
        self.started.append((given.job_id, given.attempt, given.step))
        yield Progress(step=given.step, num_steps=given.request.num_inference_steps, seconds=0.0)
        raise NO_ANSWER


def test_a_job_leaves_a_gang_that_cannot_reach_the_bucket_for_one_that_can(world, monkeypatch):
    monkeypatch.setattr("serve.patience.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("serve.patience.MAX_PAUSE_S", 0.02)
    world.add("j")
    world.artifacts.put("jobs/j/checkpoints/1-2", b"state")
    assert world.store.claim("j", "a former one", lease_s=60)
    assert world.store.checkpoint("j", 1, "jobs/j/checkpoints/1-2", 2)
    assert world.store.requeue("j", 1, gang_died=False)
    cut_off = CutOffGang(world.stages)

    async def scenario():
        async with world.dispatcher(gangs={"cut-off": (cut_off, 2), "healthy": (world.gang, 2)}):
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt, world.job("j").gang_deaths) == ("completed", 2, 0)
    assert len(cut_off.started) <= 1


def test_a_gang_that_writes_a_checkpoint_is_not_doubted_any_more(world, monkeypatch):
    monkeypatch.setattr("serve.patience.FIRST_PAUSE_S", 0.01)
    add_long(world, "j")

    async def scenario():
        world.stages.faults["j", "admit"] = [NO_ANSWER]
        async with world.dispatcher() as dispatcher:
            gangs = dispatcher._gangs._gangs
            await world.until(lambda: gangs and gangs["gang"].store_failed_at is not None)
            doubted = gangs["gang"]
            assert doubted.seen(doubted.state, doubted.store_failed_at + DOUBT_S - 1.0).is_doubtful
            assert not doubted.seen(doubted.state, doubted.store_failed_at + DOUBT_S).is_doubtful
            await world.ended("j")
            assert doubted.store_failed_at is None

    run(scenario)


def test_a_job_that_waits_for_the_bucket_can_be_cancelled_and_has_its_deadline(world):
    world.add("cancelled")
    world.add("overdue")

    async def scenario():
        for job_id in ("cancelled", "overdue"):
            world.stages.faults[job_id, "decode"] = [NO_ANSWER] * 100
        async with world.dispatcher(job_deadline_s=4.0):
            await world.until(lambda: len(world.stages.faults["cancelled", "decode"]) < 100)
            world.store.request_cancel("local", "cancelled")
            await world.ended("cancelled", "overdue")

    run(scenario)
    assert world.job("cancelled").status == "cancelled"
    assert world.job("overdue").error_code == "deadline_exceeded"


@pytest.mark.parametrize("write", ["record_precision", "progress", "checkpoint", "complete"])
def test_a_database_that_is_away_for_a_moment_costs_a_job_no_attempt(world, monkeypatch, write):
    add_long(world, "j")
    failing(monkeypatch, world.store, write, CONNECTION_CUT)

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt, world.job("j").steps_run) == ("completed", 1, 6)


@pytest.mark.parametrize("write", ["progress", "requeue", "fail"])
def test_every_lost_gang_is_counted_though_the_database_is_away_when_it_is(world, monkeypatch, write):
    monkeypatch.setattr("serve.patience.FIRST_PAUSE_S", 0.01)
    world.add("poison")
    after_a_death = lambda *arguments: world.stages.faults["poison", "denoise"] != DEATHS  # noqa: E731
    failing(monkeypatch, world.store, write, CONNECTION_CUT, after_a_death, times=3)

    async def scenario():
        world.stages.faults["poison", "denoise"] = list(DEATHS)
        async with world.dispatcher(lease_s=1.0):
            await world.ended("poison")

    run(scenario)
    assert len(DEATHS) - len(world.stages.faults["poison", "denoise"]) == 2
    assert (world.job("poison").error_code, world.job("poison").attempt) == ("gang_died_twice", 2)


def test_a_result_whose_publication_was_not_answered_is_kept(world, monkeypatch):
    world.add("j")
    complete, answers = world.store.complete, []

    def complete_and_cut(*arguments):
        answers.append(complete(*arguments))
        if len(answers) == 1:
            raise CONNECTION_CUT
        return answers[-1]

    monkeypatch.setattr(world.store, "complete", complete_and_cut)

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.metrics.outcomes, stored(world, "j")) == (["completed"], ["attempts/1/video.mp4"])
    assert answers == [True, False]


def test_files_that_nobody_needs_and_that_cannot_be_removed_cost_a_job_nothing(world, monkeypatch):
    add_long(world, "j")
    failing(monkeypatch, world.artifacts, "delete", NO_ANSWER, lambda key: "/checkpoints" in key, times=100)

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 1)
    assert world.metrics.outcomes == ["completed"]


def test_a_dispatcher_that_stops_keeps_its_leases_over_a_failure_of_the_database(world, monkeypatch):
    world.add("j")

    async def scenario():
        world.stages.decoding = asyncio.Event()
        stopping = world.dispatcher(lease_s=1.0)
        await stopping.__aenter__()
        await world.until(lambda: world.job("j").stage == "decode")
        failing(monkeypatch, world.store, "renew", CONNECTION_CUT)
        closing = asyncio.create_task(stopping.__aexit__(None, None, None))
        await asyncio.sleep(1.5)
        assert world.store.expired(time.time()) == []
        world.stages.decoding.set()
        await closing

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 1)


def test_a_job_that_cannot_be_given_back_does_not_keep_the_others(world, monkeypatch):
    for job_id in ("one", "two"):
        add_long(world, job_id)
    failing(monkeypatch, world.store, "requeue", CONNECTION_CUT)

    async def scenario():
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: len(world.gang.residents) == 2)

    run(scenario)
    assert sorted(world.job(job_id).status for job_id in ("one", "two")) == ["in_progress", "queued"]
