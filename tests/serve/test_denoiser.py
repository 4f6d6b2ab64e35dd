"""The coordinator of a gang whose ranks are one stand-in worker in this process: who steps, stays, leaves and when."""

import asyncio
import errno
import pickle
import time
from dataclasses import replace

import pytest
import torch

from pusa_dist.errors import CheckpointError, DeviceMemoryError, GangError, NumericsError
from serve.config import DenoiserConfig
from serve.denoiser import _LINGER_S, Denoiser
from serve.gang import Held
from serve.stages import (
    Checkpoint,
    Checkpointed,
    Finished,
    GangUnavailableError,
    Previewed,
    Progress,
    Released,
    Renewal,
    ReplicaLostError,
)
from serve.store.artifacts import StorageError
from tests.serve import gang_workers
from tests.serve.jobs_on_gangs import assignment, collect, publishing, request_of, steps_of, until_step

CONFIG = DenoiserConfig(checkpoint_every=4)


class OneRank:
    """``serve.gang.Gang`` without Ray: one worker on a thread, checkpoints in a dictionary."""

    def __init__(self):
        self.worker = gang_workers.FakeWorker()
        self.worker.join(0, 1, None, None)
        self.files, self.error, self.node_ids = {}, None, {"here"}
        self.is_full = False
        self.is_there = asyncio.Event()
        self.is_there.set()

    async def call(self, method, *arguments, deadline_s):
        result = await asyncio.to_thread(getattr(self.worker, method), *arguments)
        if method == "admit":
            return [self.held(arguments[0], 0)]
        return [{name: self.held(name, step) for name, step in result.items()} if method == "step" else result]

    def held(self, name, step):
        return Held(step=step, signature=self.worker.signature(name))

    async def fetch(self, key, deadline_s):
        await self.is_there.wait()
        return self.files.get(key)

    async def restore(self, name, data, deadline_s):
        return self.held(name, self.worker.restore(name, data))

    async def finish(self, name, deadline_s):
        return self.worker.finish(name)

    async def checkpoint(self, name, prefix):
        if self.is_full:
            raise StorageError(errno.ENOSPC, "the disk is full")
        step, data = self.worker.checkpoint(name)
        self.files[f"{prefix}-{step}"] = data
        return step, f"{prefix}-{step}"

    async def preview(self, name):
        return self.worker.jobs[name][2], "heading"

    async def discard(self, key):
        del self.files[key]

    async def watch(self):
        await asyncio.Event().wait()

    def check(self):
        pass

    def lose(self, reason):
        raise AssertionError(reason)


@pytest.fixture
def rank():
    return OneRank()


def denoise(denoiser, *args, value=1.0, **options):
    return publishing(denoiser, assignment(torch.full((3,), value), *args, **options))


def test_two_residents_finish_oldest_first(rank):
    order = []

    async def follow(denoiser, prompt):
        async for message in denoise(denoiser, prompt):
            if isinstance(message, Finished):
                order.append(prompt)

    async def both():
        denoiser = Denoiser(CONFIG, rank)
        await asyncio.gather(follow(denoiser, "first"), follow(denoiser, "second"))

    asyncio.run(both())
    assert order == ["first", "second"]


async def at_step(seen, step):
    """Wait until the job has made that step, and a while longer to see that it makes no more."""
    while step not in steps_of(seen):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(4 * gang_workers.STEP_S)
    assert max(steps_of(seen)) == step


def test_a_job_runs_no_further_than_k_steps_beyond_what_is_published(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        given, seen = assignment(torch.ones(3), "unpublished", steps=12), []

        async def read():
            async for message in denoiser.generate(given):
                seen.append(message)

        reading = asyncio.create_task(read())
        await at_step(seen, CONFIG.checkpoint_every)
        saved = [message.checkpoint for message in seen if isinstance(message, Checkpointed)]
        assert saved[0].key == f"jobs/job-unpublished/checkpoints/1-{saved[0].step}"
        renewal = Renewal(attempt=1, published_step=saved[0].step, claim=given.claim)
        await denoiser.hold("dispatcher", {given.job_id: renewal})  # says it as well as published does
        await at_step(seen, saved[0].step + CONFIG.checkpoint_every)
        reading.cancel()

    asyncio.run(scenario())


def test_a_job_waits_while_no_checkpoint_can_be_written_and_goes_on_when_one_can(rank, monkeypatch):
    monkeypatch.setattr("serve.denoiser._RETRY_S", 0.1)

    async def scenario():
        rank.is_full = True
        denoiser, seen = Denoiser(CONFIG, rank), []

        async def read():
            async for message in denoise(denoiser, "unwritable", steps=8):
                seen.append(message)

        reading = asyncio.create_task(read())
        await at_step(seen, CONFIG.checkpoint_every)
        rank.is_full = False
        await reading
        assert isinstance(seen[-1], Finished)

    asyncio.run(scenario())


def test_a_job_that_no_checkpoint_can_be_written_of_goes_on_elsewhere_after_a_while(rank, monkeypatch):
    monkeypatch.setattr("serve.denoiser._RETRY_S", 0.02)
    monkeypatch.setattr("serve.denoiser._STUCK_S", 0.6)

    async def scenario():
        rank.is_full = True
        denoiser, seen = Denoiser(CONFIG, rank), []
        began = time.monotonic()

        async def read():
            async for message in denoise(denoiser, "stuck", steps=12):
                seen.append(message)

        with pytest.raises(StorageError):
            await read()
        assert max(steps_of(seen)) == CONFIG.checkpoint_every
        assert time.monotonic() - began >= 0.6
        assert isinstance((await collect(denoise(denoiser, "short", steps=2)))[-1], Finished)

    asyncio.run(scenario())
    assert rank.worker.jobs == {}


def test_a_job_that_need_not_wait_for_its_checkpoint_stays_however_long_none_could_be_written(rank, monkeypatch):
    monkeypatch.setattr("serve.denoiser._RETRY_S", 0.02)
    monkeypatch.setattr("serve.denoiser._STUCK_S", 0.0)

    async def checkpoint(name, prefix):
        await asyncio.sleep(0.3)
        raise StorageError(errno.EIO, "away")

    async def finish(name, deadline_s):
        await asyncio.sleep(0.6)  # a checkpoint fails meanwhile
        return rank.worker.finish(name)

    async def scenario():
        rank.checkpoint, rank.finish = checkpoint, finish
        return await collect(denoise(Denoiser(CONFIG, rank), "short", steps=CONFIG.checkpoint_every))

    assert isinstance(asyncio.run(scenario())[-1], Finished)


def test_a_job_that_waits_on_its_gang_is_released_in_the_middle_of_the_others_step(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        slow = denoise(denoiser, "slow", steps=2)
        await anext(slow)
        waiting = denoise(denoiser, "waiting", virtual_time=1.0)
        coming = asyncio.create_task(collect(waiting))
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        await denoiser.release("job-waiting", 1)
        assert (await coming)[-1] == Released(checkpoint=None)
        assert time.perf_counter() - began < 0.5 * gang_workers.SLOW_STEP_S

    asyncio.run(scenario())


def test_a_released_job_goes_on_where_it_was(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        messages = denoise(denoiser, "moved", steps=6, value=3.0)
        await until_step(messages, 3)
        await denoiser.release("job-moved", 1)
        rest = await collect(messages)
        checkpoint = rest[-1].checkpoint
        assert checkpoint.step == max([3, *steps_of(rest)]) <= 4
        return checkpoint, await collect(denoise(denoiser, "moved", steps=6, source=checkpoint))

    checkpoint, moved = asyncio.run(scenario())
    assert steps_of(moved)[1:] == list(range(checkpoint.step + 1, 7))
    assert torch.equal(moved[-1].latents.ref, torch.full((4,), 9.0))
    assert rank.worker.jobs == {}


def test_a_job_whose_checkpoint_is_its_end_is_finished_at_once(rank):
    rank.files["end"] = pickle.dumps([request_of("ended"), 2.0, 4])
    messages = asyncio.run(collect(denoise(Denoiser(CONFIG, rank), "ended", source=Checkpoint(key="end", step=4))))
    assert [type(message) for message in messages] == [Progress, Finished]
    assert torch.equal(messages[-1].latents.ref, torch.full((4,), 2.0))


def stored(rank, prompt, step, steps=12):
    """A checkpoint of a job, which the rank can fetch."""
    rank.files[prompt] = pickle.dumps([request_of(prompt, steps), 2.0, step])
    return Checkpoint(key=prompt, step=step)


def test_a_job_whose_checkpoint_is_slow_to_come_keeps_nobody_waiting(rank):
    async def scenario():
        rank.is_there.clear()
        denoiser = Denoiser(CONFIG, rank)
        slow = asyncio.create_task(
            collect(denoise(denoiser, "slow-to-come", source=stored(rank, "slow-to-come", 2, 4)))
        )
        others = [collect(denoise(denoiser, name)) for name in ("second", "third")]
        async with asyncio.timeout(5.0):
            for messages in await asyncio.gather(*others):
                assert isinstance(messages[-1], Finished)
        assert not slow.done()
        rank.is_there.set()
        return await slow

    messages = asyncio.run(scenario())
    assert steps_of(messages) == [2, 3, 4]
    assert isinstance(messages[-1], Finished)


def test_a_job_whose_checkpoint_is_on_its_way_keeps_its_place_before_those_that_came_later(rank):
    async def scenario():
        rank.is_there.clear()
        denoiser = Denoiser(CONFIG, rank)
        running, first = (
            denoise(denoiser, "running", steps=1000),
            denoise(denoiser, "first", source=stored(rank, "first", 2, 4)),
        )
        await until_step(running, 1)
        reading = [asyncio.create_task(collect(one)) for one in (running, first, denoise(denoiser, "later"))]
        await asyncio.sleep(4 * gang_workers.STEP_S)
        assert [one.job_id for one in denoiser._residents if one.is_admitted] == ["job-running"]
        rank.is_there.set()
        await asyncio.sleep(4 * gang_workers.STEP_S)
        assert [one.job_id for one in denoiser._residents if one.is_admitted] == ["job-running", "job-first"]
        for task in reading:
            task.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "error", [CheckpointError("gone"), StorageError(errno.ETIMEDOUT, "no answer"), ReplicaLostError("unread")]
)
def test_a_job_whose_checkpoint_does_not_come_leaves_with_the_reason_in_the_middle_of_anothers_step(rank, error):
    async def fetch(key, deadline_s):
        raise error

    async def scenario():
        rank.fetch = fetch
        denoiser = Denoiser(CONFIG, rank)
        slow = denoise(denoiser, "slow", steps=2)
        await anext(slow)
        began = time.perf_counter()
        with pytest.raises(type(error)):
            await collect(denoise(denoiser, "coming", source=Checkpoint(key="k", step=2)))
        assert time.perf_counter() - began < 0.5 * gang_workers.SLOW_STEP_S
        assert [type(message) for message in await collect(slow)][-1] is Finished

    asyncio.run(scenario())
    assert rank.worker.jobs == {}


def test_a_gang_that_dies_while_a_checkpoint_comes_was_not_brought_down_by_its_job(rank):
    async def fetch(key, deadline_s):
        rank.error = GangError("a rank died while reading a checkpoint")
        raise rank.error

    async def scenario():
        rank.fetch = fetch
        with pytest.raises(GangUnavailableError, match="while reading"):
            await collect(denoise(Denoiser(CONFIG, rank), "coming", source=Checkpoint(key="k", step=2)))

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["released", "dropped", "closed"])
def test_a_job_that_goes_while_its_checkpoint_comes_is_never_given_to_the_ranks(rank, how):
    async def scenario():
        rank.is_there.clear()
        denoiser, source = Denoiser(CONFIG, rank), stored(rank, "going", 2)
        reading = asyncio.create_task(collect(denoise(denoiser, "going", steps=12, source=source)))
        await asyncio.sleep(0.05)
        if how == "released":
            await denoiser.release("job-going", 1)
            assert await reading == [Released(checkpoint=source)]
        elif how == "dropped":
            await denoiser.drop("job-going", 1)
            with pytest.raises(ReplicaLostError, match="does not want it"):
                await reading
        else:
            reading.cancel()
            await asyncio.wait({reading})
        restored, restore = [], rank.restore

        async def noting(name, data, deadline_s):
            restored.append(name)
            return await restore(name, data, deadline_s)

        rank.restore = noting
        rank.is_there.set()
        await asyncio.sleep(0.05)
        assert (restored, denoiser._residents) == ([], [])
        back = await collect(denoise(denoiser, "going", steps=12, source=source, attempt=2))
        assert steps_of(back) == list(range(2, 13))

    asyncio.run(scenario())
    assert rank.worker.jobs == {}


def test_a_job_that_comes_while_the_last_one_ends_does_not_wait_for_a_renewal(rank):
    async def scenario():
        denoiser, restore, coming = Denoiser(CONFIG, rank), rank.restore, []

        async def restore_as_another_comes(name, data, deadline_s):
            coming.append(asyncio.create_task(collect(denoise(denoiser, "coming"))))
            await asyncio.sleep(0.05)
            return await restore(name, data, deadline_s)

        rank.restore = restore_as_another_comes
        await collect(denoise(denoiser, "ended", source=stored(rank, "ended", 4, 4)))
        async with asyncio.timeout(2.0):
            return await coming[0]

    assert isinstance(asyncio.run(scenario())[-1], Finished)


def test_a_checkpoint_that_comes_after_its_job_was_dropped_is_removed(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        messages = denoise(denoiser, "dropped", steps=1000)
        await until_step(messages, 1)
        writing, go_on = asyncio.Event(), asyncio.Event()
        checkpoint = rank.checkpoint

        async def slowly(*arguments):
            writing.set()
            written = await checkpoint(*arguments)
            await go_on.wait()
            return written

        rank.checkpoint = slowly
        reading = asyncio.create_task(collect(messages))
        await writing.wait()
        await denoiser.drop("job-dropped", 1)
        go_on.set()
        while rank.worker.jobs or rank.files:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        reading.cancel()

    asyncio.run(scenario())


def test_the_stream_of_a_dropped_job_ends_by_itself(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        given, seen = assignment(torch.ones(3), "dropped", steps=1000), []

        async def read():  # as Ray does: to the end, whether or not anybody takes what comes
            async for message in denoiser.generate(given):
                seen.append(message)

        reading = asyncio.create_task(read())
        while not seen:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await denoiser.drop(given.job_id, given.attempt)
        with pytest.raises(ReplicaLostError, match="does not want it"):
            async with asyncio.timeout(2.0):
                await reading
        assert denoiser.state("another").num_others == 0
        while rank.worker.jobs:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_a_job_that_is_dropped_before_its_turn_to_be_admitted_is_not_left_on_the_ranks(rank):
    async def scenario():
        denoiser, call = Denoiser(CONFIG, rank), rank.call

        async def call_and_drop(method, *arguments, deadline_s):
            if method == "admit" and arguments[0].startswith("job-first"):
                await denoiser.drop("job-second", 1)
            return await call(method, *arguments, deadline_s=deadline_s)

        rank.call = call_and_drop
        first, second = (asyncio.create_task(collect(denoise(denoiser, name))) for name in ("first", "second"))
        with pytest.raises(ReplicaLostError):
            await second
        await first
        assert rank.worker.jobs == {}

    asyncio.run(scenario())


def test_previews_come_every_so_many_steps_to_whom_they_were_promised(rank):
    given = replace(assignment(torch.ones(3), "shown", steps=6), preview_every=2)

    async def scenario():
        return await collect(publishing(Denoiser(CONFIG, rank), given))

    messages = asyncio.run(scenario())
    assert [message.step for message in messages if isinstance(message, Previewed)] == [2, 4]


def test_a_newer_attempt_at_a_job_puts_out_the_former(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        former = denoise(denoiser, "again", steps=1000)
        await until_step(former, 1)
        newer = denoise(denoiser, "again", steps=2, attempt=2)
        await anext(newer)
        with pytest.raises(ReplicaLostError, match="another attempt"):
            await collect(former)
        return await collect(newer)

    assert isinstance(asyncio.run(scenario())[-1], Finished)


def test_a_job_is_dropped_when_its_dispatcher_is_silent_or_does_not_hold_it(rank, monkeypatch):
    monkeypatch.setattr("serve.denoiser._GRACE_S", 0.0)

    async def scenario():
        denoiser = Denoiser(CONFIG.model_copy(update={"resident_lease_s": 1.0}), rank)
        silent, let_go = denoise(denoiser, "silent", steps=1000), denoise(denoiser, "let-go", steps=1000)
        await until_step(silent, 1)
        going = asyncio.create_task(collect(let_go))
        await asyncio.sleep(0.1)
        given = assignment(torch.ones(3), "silent")
        renewal = Renewal(attempt=1, published_step=0, claim=given.claim)
        state = await denoiser.hold("dispatcher", {given.job_id: renewal})
        assert (state.num_others, state.is_closed) == (0, False)
        with pytest.raises(ReplicaLostError, match="does not hold it"):
            await going
        began = time.perf_counter()
        with pytest.raises(ReplicaLostError, match="silent for 1 s"):
            await collect(silent)
        assert time.perf_counter() - began < 2.0

    asyncio.run(scenario())


def test_a_gang_that_leaves_hands_over_its_jobs_within_a_step_and_takes_no_more(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        streams = [denoise(denoiser, name, steps=1000) for name in ("one", "two")]
        await until_step(streams[0], 2)
        reading = [asyncio.create_task(collect(stream)) for stream in streams]
        await asyncio.sleep(0.02)
        assert await denoiser.leave("another node") == 0
        began, before = time.perf_counter(), sum(one.step for one in denoiser._residents)
        assert await denoiser.leave(next(iter(rank.node_ids))) == 2
        assert time.perf_counter() - began < gang_workers.STEP_S + _LINGER_S + 0.3
        after = 0
        for messages in await asyncio.gather(*reading):
            assert isinstance(messages[-1], Released)
            if (checkpoint := messages[-1].checkpoint) is not None:
                assert checkpoint.step == max(steps_of(messages))
                after += checkpoint.step
        # Nothing of what was done is lost, and nothing is done beyond the step that was under way.
        assert before <= after <= before + 1
        with pytest.raises(GangUnavailableError, match="leaving"):
            await collect(denoise(denoiser, "late"))
        assert denoiser.state("anybody").is_closed

    asyncio.run(scenario())


def test_a_more_urgent_job_of_the_tenant_interrupts_at_a_step_boundary(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG, rank)
        batch = denoise(denoiser, "batch", steps=8, is_urgent=False)
        await until_step(batch, 2)
        order = []

        async def follow(name, messages):
            async for message in messages:
                if isinstance(message, Finished):
                    order.append(name)

        await asyncio.gather(follow("batch", batch), follow("urgent", denoise(denoiser, "urgent", steps=2)))
        return order

    assert asyncio.run(scenario()) == ["urgent", "batch"]


@pytest.mark.parametrize(("limit", "num_sharing"), [(20, 2), (19, 1)])
def test_jobs_of_one_signature_share_forwards_up_to_the_limit(rank, limit, num_sharing):
    async def scenario():
        denoiser = Denoiser(CONFIG.model_copy(update={"shared_forward_max_tokens": limit}), rank)
        first = denoise(denoiser, "first", steps=8)
        await until_step(first, 1)
        second, _ = await asyncio.gather(collect(denoise(denoiser, "second", steps=3)), collect(first))
        return second

    messages = asyncio.run(scenario())
    steps = [message for message in messages if isinstance(message, Progress) and message.seconds]
    assert {message.num_sharing for message in steps} == {num_sharing}


def test_of_jobs_that_share_forwards_one_leads(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG.model_copy(update={"shared_forward_max_tokens": 100}), rank)
        first = denoise(denoiser, "first", steps=6)
        await until_step(first, 1)
        return await asyncio.gather(collect(first), collect(denoise(denoiser, "second", steps=6)))

    first, second = (
        [message.is_guest for message in messages if isinstance(message, Progress) and message.num_sharing == 2]
        for messages in asyncio.run(scenario())
    )
    assert first
    assert (set(first), set(second)) == ({False}, {True})


@pytest.mark.parametrize(("prompt", "kind"), [("nan", NumericsError), ("too-large", DeviceMemoryError)])
def test_a_job_that_cannot_make_its_step_does_not_take_along_those_that_share_its_forward(rank, prompt, kind):
    async def scenario():
        denoiser = Denoiser(CONFIG.model_copy(update={"shared_forward_max_tokens": 100}), rank)
        good = [asyncio.create_task(collect(denoise(denoiser, name))) for name in ("good", "better")]
        with pytest.raises(kind):
            await collect(denoise(denoiser, prompt, virtual_time=-1.0))
        return await asyncio.gather(*good)

    for messages in asyncio.run(scenario()):
        assert steps_of(messages) == [0, 1, 2, 3, 4]
        assert isinstance(messages[-1], Finished)


def test_jobs_that_fit_only_alone_are_tried_together_once(rank):
    async def scenario():
        denoiser = Denoiser(CONFIG.model_copy(update={"shared_forward_max_tokens": 100}), rank)
        return await asyncio.gather(*(collect(denoise(denoiser, name)) for name in ("large", "other")))

    for messages in asyncio.run(scenario()):
        assert isinstance(messages[-1], Finished)
    assert rank.worker.num_forwards == 1 + 2 * 4
