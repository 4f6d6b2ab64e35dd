"""The dispatcher on a real job store; the rest of the cluster is a stand-in that obeys the same contract."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from pusa_dist.errors import CheckpointError, GangError, NumericsError, RequestError
from pusa_dist.request import Conditioning, GenerationRequest
from serve.dispatcher import MAX_ATTEMPTS, Dispatcher
from serve.stages import (
    Checkpoint,
    Checkpointed,
    Conditions,
    Finished,
    GangState,
    GangUnavailableError,
    Previewed,
    Progress,
    Released,
    ReplicaLostError,
    TensorRef,
)
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
        self.encoding = self.drawing = self.decoding = None

    def fail(self, job_id, stage):
        errors = self.faults.get((job_id, stage))
        if errors:
            raise errors.pop(0)

    async def embed(self, prompt):
        self.calls.append(("embed", prompt))
        return TensorRef(prompt)

    async def encode(self, job):
        self.calls.append(("encode", job.id))
        if self.encoding is not None:
            await self.encoding.wait()
        self.fail(job.id, "encode")
        return TensorRef("given")

    async def preview(self, job, step, latents):
        self.fail(job.id, "preview")
        self.calls.append(("preview", step))
        if self.drawing is not None:
            await self.drawing.wait()
        key = f"jobs/{job.id}/attempts/{job.attempt}/preview-{step}.webp"
        self.artifacts.put(key, b"webp")
        return key

    async def decode(self, job, latents):
        self.calls.append(("decode", job.id, latents.ref))
        if self.decoding is not None:
            await self.decoding.wait()
        self.fail(job.id, "decode")
        key = f"jobs/{job.id}/attempts/{job.attempt}/video.mp4"
        self.artifacts.put(key, b"mp4")
        return {"video": Artifact(key=key, content_type="video/mp4", num_bytes=3)}


class FakeGang:
    """A gang that runs one job after the other, first come first served, and obeys ``GangHandle``.

    ``gate`` holds it before step 2.
    """

    def __init__(self, stages, step_s=0.005, checkpoint_every=2):
        self.stages, self.artifacts = stages, stages.artifacts
        self.step_s, self.every = step_s, checkpoint_every
        self.gate = asyncio.Event()
        self.gate.set()
        self.residents = {}
        self.max_held = 0
        self.started, self.closed, self.steps, self.acknowledged = [], [], [], []
        self.renewals = {}
        self.is_silent = self.is_closed = False
        self.running = None

    async def generate(self, given):
        job_id = given.job_id
        await self.answer()
        self.stages.calls.append(("denoise", job_id, given.source))
        self.stages.fail(job_id, "place")
        self.started.append((job_id, given.attempt, given.step))
        num_steps, step = given.request.num_inference_steps, given.step
        self.residents[job_id] = asking = asyncio.Event()
        self.max_held = max(self.max_held, len(self.residents))
        try:
            yield Progress(step=step, num_steps=num_steps, seconds=0.0)
            self.stages.fail(job_id, "admit")
            while self.running not in (None, job_id) and not asking.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            while step < num_steps:
                if not asking.is_set():
                    self.running = job_id
                    if step == 1:
                        await self.first(self.gate.wait(), asking.wait())
                if asking.is_set():
                    yield Released(checkpoint=self.checkpoint(given, step))
                    return
                await asyncio.sleep(self.step_s)
                await self.answer()
                step += 1
                self.steps.append((job_id, step))
                yield Progress(step=step, num_steps=num_steps, seconds=self.step_s, num_tokens=given.claim.num_tokens)
                if step % self.every == 0:
                    yield Checkpointed(checkpoint=self.checkpoint(given, step))
                if given.preview_every and step % given.preview_every == 0:
                    yield Previewed(step=step, latents=TensorRef("heading"))
                self.stages.fail(job_id, "denoise")
            yield Finished(latents=TensorRef("latents"))
        finally:
            del self.residents[job_id]
            if self.running == job_id:
                self.running = next(iter(self.residents), None)
            self.closed.append(job_id)

    async def answer(self):
        while self.is_silent:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def first(self, *waits):
        tasks = [asyncio.ensure_future(one) for one in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def checkpoint(self, given, step):
        key = f"jobs/{given.job_id}/checkpoints/{given.attempt}-{step}"
        self.artifacts.put(key, b"state")
        return Checkpoint(key=key, step=step)

    async def release(self, job_id, attempt):
        await self.answer()
        if job_id in self.residents:
            self.residents[job_id].set()

    async def published(self, job_id, attempt, step):
        self.acknowledged.append((job_id, step))

    async def hold(self, owner, renewals):
        await self.answer()
        self.renewals = dict(renewals)
        return GangState(num_others=0, is_closed=self.is_closed, lora=None, switch_s=0.0)


class CountingMetrics:
    def __init__(self):
        self.outcomes, self.reasons, self.stages = [], [], []
        self.num_released = self.num_repeated = self.num_lost = self.num_waited = 0
        self.cost, self.states = 0.0, {}

    def waited(self, seconds, priority, weight):
        self.num_waited += 1

    def ended(self, code, seconds, priority):
        self.outcomes.append(code)

    def requeued(self, reason):
        self.reasons.append(reason)

    def stage(self, stage, seconds):
        self.stages.append(stage)

    def round(self, backlog, weight_of):
        self.backlog = [(one.status, one.num, weight_of(one.tenant)) for one in backlog]

    def gangs(self, states, num_free):
        self.states = dict(states)

    def checkpointed(self):
        pass

    def released(self):
        self.num_released += 1

    def repeated(self):
        self.num_repeated += 1

    def delivered(self, cost, weight):
        self.cost += cost

    def spread(self, seconds):
        pass

    def gang_lost(self):
        self.num_lost += 1


class World:
    def __init__(self, folder):
        self.folder = folder
        self.store = JobStore(f"sqlite:///{folder / 'jobs.sqlite'}")
        self.store.create_tables()
        self.artifacts = ArtifactStore(f"file://{folder / 'artifacts'}")
        self.stages = FakeStages(self.artifacts)
        self.gang = FakeGang(self.stages)
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
        gangs = options.pop("gangs", {"gang": (self.gang, 2)})
        options = {"model": "debug", "precision": "fp32", "job_deadline_s": 60.0, "replacement_s": 0.0, **options}
        dispatcher = Dispatcher(self.store, self.artifacts, self.stages, self.metrics, **options)
        running = asyncio.create_task(dispatcher.run())
        for name, (gang, max_resident) in gangs.items():
            dispatcher.register(name, gang, max_resident)
        yield dispatcher
        await dispatcher.close()
        await running

    async def until(self, condition, timeout_s=40.0):
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
        world.gang.gate.clear()
        async with world.dispatcher():
            await world.until(is_claiming.is_set)

    run(scenario)
    assert (world.job("j").status, world.job("j").attempt) == ("queued", 1)


def add_long(world, job_id, steps=6, **values):
    world.add(job_id, request=replace(REQUEST, num_inference_steps=steps), num_steps=steps, **values)


def stored(world, job_id):
    """Files of a job, relative to its folder."""
    folder = world.folder / "artifacts/jobs" / job_id
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_checkpoints_are_published_acknowledged_and_removed(world):
    add_long(world, "j")

    async def scenario():
        world.gang.step_s = 0.2
        async with world.dispatcher():
            await world.until(lambda: world.job("j").checkpoint_step == 4)
            await world.until(lambda: stored(world, "j") == ["checkpoints/1-4"])
            await world.ended("j")

    run(scenario)
    assert world.gang.acknowledged == [("j", 2), ("j", 4), ("j", 6)][: len(world.gang.acknowledged)]
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
    assert (world.job("j").status, world.job("j").attempt, world.job("j").gang_deaths) == ("completed", 2, 0)
    assert world.metrics.reasons == ["replica_lost"]
    assert world.metrics.num_lost == 1


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

    async def scenario():
        async with world.dispatcher(), world.dispatcher(gangs={"other": (other, 2)}):
            await world.ended(*names)

    run(scenario)
    began = [job_id for gang in (world.gang, other) for job_id, _, _ in gang.started]
    assert sorted(began) == names
    assert world.gang.started
    assert other.started
    assert world.store.usage("local", "2000-01-01")[0].cost == pytest.approx(world.store.tenant("local").virtual_time)


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
