"""How a job's latents leave their gang: by a call, once, and not for ever. No Ray runs."""

import asyncio
from types import SimpleNamespace

import pytest

from serve import gang_replica
from serve.config import DenoiserConfig
from serve.denoiser import Denoiser
from serve.gang_replica import Coordinator
from serve.stages import Assignment, Finished, Kept, Progress, ReplicaLostError, TensorRef

STEP = Progress(step=1, num_steps=1, seconds=0.1)
JOB = Assignment(job_id="job", attempt=3, owner="me", request=None, source=None, claim=None)
LATENTS = TensorRef("latents")


@pytest.fixture
def coordinator(monkeypatch):
    async def generate(_self, _assignment):
        yield STEP
        yield Finished(latents=LATENTS)

    monkeypatch.setattr(Denoiser, "generate", generate)
    monkeypatch.setattr(gang_replica, "Gang", lambda *_: None)
    monkeypatch.setattr(gang_replica, "GangMetrics", lambda: SimpleNamespace(step=None))
    return Coordinator(DenoiserConfig(), None, "", None, SimpleNamespace(configure=lambda: None))


async def finish(coordinator):
    """Read to ``Kept``, as a dispatcher does, while Ray goes on to drive the stream."""
    stream = coordinator.generate(JOB)
    assert [await anext(stream), await anext(stream)] == [STEP, Kept()]
    return asyncio.ensure_future(anext(stream, "ended"))


def test_latents_are_taken_once(coordinator):
    async def scenario():
        ending = await finish(coordinator)
        await asyncio.sleep(0)
        assert await coordinator.take("job", 3) == LATENTS
        assert await ending == "ended"
        with pytest.raises(ReplicaLostError):
            await coordinator.take("job", 3)

    asyncio.run(scenario())


def test_another_attempt_gets_nothing(coordinator):
    async def scenario():
        ending = await finish(coordinator)
        with pytest.raises(ReplicaLostError):
            await coordinator.take("job", 2)
        ending.cancel()

    asyncio.run(scenario())


def test_latents_that_nobody_asks_for_are_let_go(coordinator, monkeypatch):
    monkeypatch.setattr(gang_replica, "_KEPT_S", 0.01)

    async def scenario():
        assert await (await finish(coordinator)) == "ended"
        with pytest.raises(ReplicaLostError):
            await coordinator.take("job", 3)

    asyncio.run(scenario())
