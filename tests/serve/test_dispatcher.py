"""The dispatcher on a real job store; the rest of the cluster is a stand-in that obeys the same contract."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from pusa_dist.errors import GangError, NumericsError, RequestError
from pusa_dist.request import Conditioning, GenerationRequest
from serve.dispatcher import Dispatcher
from serve.stages import Finished, GangUnavailableError, Progress, ReplicaLostError, TensorRef
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import Artifact, Job, JobStore, StoredInput

REQUEST = GenerationRequest(
    model="debug", prompt="a", negative_prompt="b", width=64, height=64, num_frames=5, fps=8,
    num_inference_steps=3, guidance_scale=5.0, shift=5.0, seed=0, lora_alpha={},
)  # fmt: skip
INPUT = StoredInput(key="jobs/x/inputs/0", content_type="image/png", kind="image", width=8, height=8, num_frames=1)


class FakeStages:
    """Numbers for tensors. ``faults`` holds, per job and stage, errors to raise one after the other."""

    def __init__(self, artifacts):
        self.artifacts = artifacts
        self.faults = {}
        self.calls = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_denoising = self.max_denoising = 0
        self.closed = []

    def fail(self, job_id, stage):
        errors = self.faults.get((job_id, stage))
        if errors:
            raise errors.pop(0)

    async def embed(self, prompt):
        self.calls.append(("embed", prompt))
        return TensorRef(prompt)

    async def encode(self, job):
        self.calls.append(("encode", job.id))
        self.fail(job.id, "encode")
        return TensorRef("given")

    async def denoise(self, job_id, request, context, negative, given):
        self.calls.append(("denoise", job_id, context.ref, negative and negative.ref, given and given.ref))
        self.num_denoising += 1
        self.max_denoising = max(self.max_denoising, self.num_denoising)
        try:
            yield Progress(step=0, num_steps=3, seconds=0.0)
            self.fail(job_id, "denoise")
            for step in (1, 2, 3):
                if step == 2:
                    await self.gate.wait()
                yield Progress(step=step, num_steps=3, seconds=0.01)
            yield Finished(latents=TensorRef("latents"))
        finally:
            self.num_denoising -= 1
            self.closed.append(job_id)

    async def decode(self, job, latents):
        self.calls.append(("decode", job.id, latents.ref))
        self.fail(job.id, "decode")
        key = f"jobs/{job.id}/attempts/{job.attempt}/video.mp4"
        self.artifacts.put(key, b"mp4")
        return {"video": Artifact(key=key, content_type="video/mp4", num_bytes=3)}


class CountingMetrics:
    def __init__(self):
        self.outcomes, self.reasons, self.stages = [], [], []

    def ended(self, outcome, seconds):
        self.outcomes.append(outcome)

    def requeued(self, reason):
        self.reasons.append(reason)

    def stage(self, stage, seconds):
        self.stages.append(stage)

    def depth(self, counts):
        pass


class World:
    def __init__(self, folder):
        self.folder = folder
        self.store = JobStore(f"sqlite:///{folder / 'jobs.sqlite'}")
        self.store.create_tables()
        self.artifacts = ArtifactStore(f"file://{folder / 'artifacts'}")
        self.stages = FakeStages(self.artifacts)
        self.metrics = CountingMetrics()

    def add(self, job_id, **values):
        job = Job(
            id=job_id, tenant="local", model="debug", revision="1", request=REQUEST, created_at=time.time(),
            num_steps=3,
        )  # fmt: skip
        self.store.create(replace(job, **values))

    def job(self, job_id):
        return self.store.get("local", job_id)

    @asynccontextmanager
    async def dispatcher(self, **options):
        options = {"window": 3, "precision": "fp32", "job_deadline_s": 60.0, "replacement_s": 0.0, **options}
        dispatcher = Dispatcher(self.store, self.artifacts, self.stages, self.metrics, **options)
        running = asyncio.create_task(dispatcher.run())
        yield dispatcher
        await dispatcher.close()
        await running

    async def until(self, condition, timeout_s=8.0):
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition never came true"
            await asyncio.sleep(0.02)

    async def ended(self, *job_ids):
        await self.until(lambda: all(self.job(job_id).is_final for job_id in job_ids))
        await self.until(lambda: len(self.metrics.outcomes) == len(job_ids))


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.store.close()


def run(scenario):
    asyncio.run(scenario())


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
    assert set(job.seconds) == {"text", "encode", "denoise", "decode"}
    assert ("denoise", "j", "a", "b", "given") in world.stages.calls
    assert ("decode", "j", "latents") in world.stages.calls
    assert world.metrics.outcomes == ["completed"]


def test_without_guidance_or_inputs_nothing_needless_is_computed(world):
    world.add("j", request=replace(REQUEST, guidance_scale=1.0))

    async def scenario():
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert [call[0] for call in world.stages.calls] == ["embed", "denoise", "decode"]
    assert ("denoise", "j", "a", None, None) in world.stages.calls


def test_progress_is_written_while_the_job_runs(world):
    world.add("j")

    async def scenario():
        world.stages.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.job("j").step == 1)
            assert (world.job("j").status, world.job("j").stage) == ("in_progress", "denoise")
            world.stages.gate.set()
            await world.ended("j")

    run(scenario)


def test_the_window_bounds_the_jobs_in_flight_and_priority_comes_first(world):
    for n in range(4):
        world.add(f"batch-{n}", priority="batch", created_at=1.0 + n + time.time() - 20)
    world.add("urgent")

    async def scenario():
        world.stages.gate.clear()
        async with world.dispatcher(window=2):
            await world.until(lambda: world.stages.num_denoising == 2)
            assert {call[1] for call in world.stages.calls if call[0] == "denoise"} == {"urgent", "batch-0"}
            world.stages.gate.set()
            await world.ended("urgent", *(f"batch-{n}" for n in range(4)))

    run(scenario)
    assert world.stages.max_denoising == 2


@pytest.mark.parametrize("how", ["request_cancel", "delete"])
def test_a_cancelled_or_deleted_job_stops_and_leaves_nothing(world, how):
    world.add("j")

    async def scenario():
        world.stages.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.job("j").step == 1)
            started = time.monotonic()
            getattr(world.store, how)("local", "j")
            await world.until(lambda: world.stages.closed == ["j"])
            assert time.monotonic() - started < 0.5
            await world.until(lambda: world.metrics.outcomes == ["cancelled"])

    run(scenario)
    assert world.job("j") is None if how == "delete" else world.job("j").status == "cancelled"


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
    assert "two" in job.error_message


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
    assert (world.job("j").error_code, world.job("j").attempt) == ("replica_lost", 6)


def test_a_job_waits_for_a_gang_that_is_being_replaced_without_losing_its_attempt(world):
    world.add("j")

    async def scenario():
        world.stages.faults["j", "denoise"] = [GangUnavailableError("being replaced")]
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 1)
    assert [call[0] for call in world.stages.calls].count("denoise") == 2


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
        world.stages.gate.clear()
        async with world.dispatcher(job_deadline_s=1.0):
            await world.ended("running", "old")

    run(scenario)
    for job_id in ("running", "old"):
        assert world.job(job_id).error_code == "deadline_exceeded"
    assert world.stages.num_denoising == 0


def test_an_overdue_job_is_failed_though_more_urgent_ones_keep_coming(world):
    world.add("old", priority="batch", created_at=time.time() - 3600)
    world.add("urgent")

    async def scenario():
        world.stages.gate.clear()
        async with world.dispatcher(window=1, job_deadline_s=60.0):
            await world.ended("old")

    run(scenario)
    assert world.job("old").error_code == "deadline_exceeded"


def test_a_dispatcher_that_stops_gives_its_jobs_back_at_once(world):
    world.add("j")

    async def scenario():
        world.stages.gate.clear()
        async with world.dispatcher():
            await world.until(lambda: world.job("j").step == 1)
        assert (world.job("j").status, world.job("j").step) == ("queued", 0)
        world.stages.gate.set()
        async with world.dispatcher():
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 2)


def test_the_jobs_of_a_dead_dispatcher_are_taken_over_when_its_lease_runs_out(world):
    world.add("j")
    assert world.store.claim("j", "the dead one", lease_s=0.5)

    async def scenario():
        async with world.dispatcher(lease_s=1.0):
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("completed", 2)
    assert world.metrics.reasons == ["lease_expired"]


def test_an_attempt_that_was_taken_over_publishes_nothing(world):
    world.add("j")

    async def scenario():
        world.stages.gate.clear()
        async with world.dispatcher(window=1):
            await world.until(lambda: world.job("j").step == 1)
            assert world.store.requeue("j", 1, gang_died=False)
            assert world.store.claim("j", "another", lease_s=60)
            world.stages.gate.set()
            await world.until(lambda: world.stages.closed == ["j"])
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


def test_a_cancellation_that_comes_while_the_end_is_written_does_not_interrupt_it(world, monkeypatch):
    world.add("j")
    complete = world.store.complete

    async def scenario():
        def complete_slowly(*arguments):
            loop.call_soon_threadsafe(dispatcher._stop, dispatcher._attempts["j"], "cancelled")
            time.sleep(0.2)
            return complete(*arguments)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(world.store, "complete", complete_slowly)
        async with world.dispatcher() as dispatcher:
            await world.ended("j")

    run(scenario)
    assert (world.job("j").status, world.metrics.outcomes) == ("completed", ["completed"])


def test_a_job_claimed_while_the_dispatcher_stops_is_given_back(world, monkeypatch):
    world.add("j")
    claim, is_claiming = world.store.claim, threading.Event()

    def claim_slowly(*arguments):
        is_claiming.set()
        time.sleep(0.3)
        return claim(*arguments)

    async def scenario():
        monkeypatch.setattr(world.store, "claim", claim_slowly)
        world.stages.gate.clear()
        async with world.dispatcher():
            await world.until(is_claiming.is_set)

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("queued", 1)
