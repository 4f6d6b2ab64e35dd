"""What tests of the dispatcher share: a real job store, and a cluster that obeys the contract of the real one."""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace

from pusa_dist.request import GenerationRequest
from serve.dispatcher import Dispatcher
from serve.stages import Checkpoint, Checkpointed, Finished, GangState, Previewed, Progress, Released, TensorRef
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import Artifact, Job, JobStore, StoredInput

REQUEST = GenerationRequest(
    model="debug", prompt="a", negative_prompt="b", width=64, height=64, num_frames=5, fps=8,
    num_inference_steps=3, guidance_scale=5.0, shift=5.0, seed=0, lora_alpha={},
)  # fmt: skip
INPUT = StoredInput(key="jobs/x/inputs/0", kind="image", width=8, height=8, num_frames=1)


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


def run(scenario):
    asyncio.run(scenario())


def add_long(world, job_id, steps=6, **values):
    world.add(job_id, request=replace(REQUEST, num_inference_steps=steps), num_steps=steps, **values)


def stored(world, job_id):
    """Files of a job, relative to its folder."""
    folder = world.folder / "artifacts/jobs" / job_id
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
