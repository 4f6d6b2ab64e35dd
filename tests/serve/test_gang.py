"""A real gang of Ray actors with a stand-in worker: what is an error of a job, what is the end of a gang."""

import asyncio
import errno
import os
import signal
import time

import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from pusa_dist.errors import CheckpointError, DeviceMemoryError, GangError, NumericsError
from serve.config import DenoiserConfig
from serve.denoiser import Denoiser
from serve.gang import Gang, rank_actors
from serve.stages import Checkpoint, Checkpointed, Finished, GangUnavailableError, Progress, Released
from serve.store.artifacts import ArtifactStore, StorageError
from tests.ray_cluster import local_ray
from tests.serve import gang_workers
from tests.serve.jobs_on_gangs import assignment, collect, publishing, steps_of, until_step

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(120),
    # Ray hands tensors over without a copy, read-only.
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]

CONFIG = DenoiserConfig(step_deadline_floor_s=1.5, first_step_allowance_s=1.0, ping_timeout_s=1.5, checkpoint_every=4)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.cloudpickle.register_pickle_by_value(gang_workers)
    with local_ray():
        yield
    ray.cloudpickle.unregister_pickle_by_value(gang_workers)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return f"file://{tmp_path_factory.mktemp('artifacts')}"


def started(config, artifacts):
    gang = Gang(config, rank_actors(config, gang_workers.FakeWorker, artifacts, None))
    asyncio.run(gang.start())
    return gang


@pytest.fixture(scope="module")
def shared(artifacts):
    """A gang that no test of this fixture's users may break."""
    gang = started(CONFIG, artifacts)
    yield gang
    gang.kill()


@pytest.fixture
def fresh(artifacts):
    gang = started(CONFIG, artifacts)
    yield gang
    gang.kill()


def denoise(denoiser, *args, value=1.0, **options):
    return publishing(denoiser, assignment(ray.put(torch.full((3,), value)), *args, **options))


def test_a_job_reports_every_step_and_ends_with_a_reference_to_its_latents(shared):
    messages = asyncio.run(collect(denoise(Denoiser(CONFIG, shared), "plain", value=2.0)))
    assert steps_of(messages) == [0, 1, 2, 3, 4]
    assert all(message.num_steps == 4 for message in messages if isinstance(message, Progress))
    assert isinstance(messages[-1], Finished)
    assert torch.equal(ray.get(messages[-1].latents.ref), torch.full((4,), 6.0))


def test_a_cancelled_job_leaves_at_its_next_step_and_the_gang_goes_on(shared):
    async def scenario():
        denoiser = Denoiser(CONFIG, shared)
        messages = denoise(denoiser, "long", steps=1000)
        await until_step(messages, 2)
        started = time.perf_counter()
        await messages.aclose()
        waiting = denoise(denoiser, "next", steps=1)
        await anext(waiting)
        held_after = time.perf_counter() - started
        return held_after, await collect(waiting)

    held_after, rest = asyncio.run(scenario())
    assert held_after < 0.5
    assert isinstance(rest[-1], Finished)


@pytest.mark.parametrize(
    ("prompt", "kind", "words"), [("nan", NumericsError, "not finite"), ("too-large", DeviceMemoryError, "smaller")]
)
def test_an_error_that_all_ranks_raise_is_the_jobs_own(shared, prompt, kind, words):
    async def scenario():
        denoiser = Denoiser(CONFIG, shared)
        with pytest.raises(kind, match=words):
            await collect(denoise(denoiser, prompt))
        return await collect(denoise(denoiser, "after"))

    assert isinstance(asyncio.run(scenario())[-1], Finished)


@pytest.mark.parametrize(("prompt", "reason"), [("nan-on-0", "not finite"), ("bug", "a bug")])
def test_ranks_that_disagree_or_have_a_bug_end_the_gang(fresh, monkeypatch, prompt, reason):
    monkeypatch.setattr("serve.gang.AGREEMENT_S", 1.0)

    async def scenario():
        denoiser = Denoiser(CONFIG, fresh)
        with pytest.raises(GangError, match=reason):
            await collect(denoise(denoiser, prompt))
        with pytest.raises(GangError):
            await denoiser.check_health()
        with pytest.raises(GangUnavailableError, match="being replaced"):
            await collect(denoise(denoiser, "late"))

    asyncio.run(scenario())


def test_a_rank_killed_in_a_step_fails_every_resident_at_once(fresh):
    async def scenario():
        denoiser = Denoiser(CONFIG, fresh)
        held = denoise(denoiser, "held", steps=1000)
        second = denoise(denoiser, "second", steps=1000)
        await until_step(held, 2)
        await anext(second)
        os.kill(fresh.pids[1], signal.SIGKILL)
        started = time.perf_counter()
        for messages in (held, second):
            with pytest.raises(GangError, match="died"):
                await collect(messages)
        return time.perf_counter() - started

    assert asyncio.run(scenario()) < 2.0
    assert_gone(fresh.pids)


def test_a_rank_asleep_in_its_forward_is_found_by_the_step_deadline(fresh):
    async def scenario():
        with pytest.raises(GangError, match=r"step on rank 1: not finished within its deadline of 1\.5 s"):
            await collect(denoise(Denoiser(CONFIG, fresh), "sleep"))

    started = time.perf_counter()
    asyncio.run(scenario())
    assert time.perf_counter() - started < 4.0
    assert_gone(fresh.pids)


def test_a_long_healthy_step_is_not_taken_for_a_hang(artifacts):
    config = DenoiserConfig(step_deadline_floor_s=20.0, ping_timeout_s=0.5)
    assert config.ping_timeout_s + 1.0 < gang_workers.SLOW_STEP_S  # a ping in between would have gone unanswered
    gang = started(config, artifacts)
    try:
        messages = asyncio.run(collect(denoise(Denoiser(config, gang), "slow", steps=1)))
        assert isinstance(messages[-1], Finished)
        assert gang.error is None
    finally:
        gang.kill()


def test_a_stopped_idle_rank_is_found_by_its_silence(fresh):
    async def scenario():
        denoiser = Denoiser(CONFIG, fresh)
        await collect(denoise(denoiser, "warm"))
        os.kill(fresh.pids[0], signal.SIGSTOP)
        started = time.perf_counter()
        await asyncio.gather(*denoiser._tasks)  # they end with the gang
        return time.perf_counter() - started

    assert asyncio.run(scenario()) < 5.0
    assert "ping_timeout_s=1.5" in str(fresh.error)
    assert_gone(fresh.pids)


def test_a_stopped_busy_rank_is_found_by_its_silence_long_before_its_deadline(artifacts):
    gang = started(DenoiserConfig(step_deadline_floor_s=60.0, ping_timeout_s=1.0), artifacts)

    async def scenario():
        messages = denoise(Denoiser(CONFIG, gang), "slow", steps=1000)
        await anext(messages)
        os.kill(gang.pids[1], signal.SIGSTOP)
        with pytest.raises(GangError, match="1 of 2 ranks did not answer"):
            await collect(messages)

    started_at = time.perf_counter()
    asyncio.run(scenario())
    assert time.perf_counter() - started_at < 6.0
    assert_gone(gang.pids)


def test_checkpoints_come_as_the_job_runs_and_can_be_read(shared, artifacts):
    messages = asyncio.run(collect(denoise(Denoiser(CONFIG, shared), "saved", steps=9)))
    saved = [message.checkpoint for message in messages if isinstance(message, Checkpointed)]
    assert len(saved) >= 2
    assert all(2 <= one.step <= 9 for one in saved)
    assert saved[0].key == f"jobs/job-saved/checkpoints/1-{saved[0].step}"
    assert ArtifactStore(artifacts).read(saved[0].key)


def test_a_released_job_goes_on_where_it_was(shared):
    async def scenario():
        denoiser = Denoiser(CONFIG, shared)
        messages = denoise(denoiser, "moved", steps=6, value=3.0)
        await until_step(messages, 3)
        await denoiser.release("job-moved", 1)
        rest = await collect(messages)
        checkpoint = rest[-1].checkpoint
        assert isinstance(rest[-1], Released)
        assert checkpoint.step == max([3, *steps_of(rest)]) <= 4
        moved = await collect(denoise(denoiser, "moved", steps=6, source=checkpoint))
        return checkpoint, moved

    checkpoint, moved = asyncio.run(scenario())
    assert steps_of(moved)[1:] == list(range(checkpoint.step + 1, 7))
    assert torch.equal(ray.get(moved[-1].latents.ref), torch.full((4,), 9.0))


@pytest.mark.parametrize(
    ("prompt", "checkpoint"), [("foreign", None), ("gone", Checkpoint(key="jobs/j/checkpoints/1-2", step=2))]
)
def test_a_checkpoint_that_cannot_be_used_is_the_jobs_error(shared, artifacts, prompt, checkpoint):
    async def scenario():
        denoiser = Denoiser(CONFIG, shared)
        source = checkpoint
        if source is None:
            messages = denoise(denoiser, prompt, steps=9)
            await until_step(messages, 3)
            await denoiser.release(f"job-{prompt}", 1)
            source = (await collect(messages))[-1].checkpoint
        with pytest.raises(CheckpointError):
            await collect(denoise(denoiser, prompt, steps=9, source=source))

    asyncio.run(scenario())
    assert shared.error is None


@pytest.mark.parametrize(
    ("error", "number"),
    [(TimeoutError(), errno.ETIMEDOUT), (RayTaskError("read", "", StorageError(errno.EIO, "away")), errno.EIO)],
)
def test_a_checkpoint_that_the_store_does_not_give_is_no_fault_of_a_process(error, number):
    found = Gang.__new__(Gang)._unwritten("reading a checkpoint", error)
    assert (type(found), found.errno) == (StorageError, number)


def assert_gone(pids):
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and any(is_running(pid) for pid in pids):
        time.sleep(0.1)
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
