"""How a job's latents leave their gang: by a call, once, and not for ever; and how a lost gang ends. No Ray runs."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from pusa_dist.errors import GangError
from serve import gang_replica
from serve.config import DenoiserConfig
from serve.denoiser import Denoiser
from serve.gang_replica import Coordinator, DenoiserReplica
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
    return Coordinator(DenoiserConfig(), [], SimpleNamespace(configure=lambda: None))


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


@pytest.mark.parametrize(
    ("error", "ends"), [(GangError("lost"), True), (ActorDiedError(), True), (TimeoutError(), False), (None, False)]
)
def test_a_replica_whose_gang_is_lost_ends_at_the_first_check_and_one_that_is_silent_is_left_to_serve(
    monkeypatch, error, ends
):
    killed = []
    context = SimpleNamespace(current_actor="the replica")
    monkeypatch.setattr(gang_replica.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(gang_replica.ray, "kill", killed.append)

    async def checked():
        if error is not None:
            raise error

    async def scenario():
        replica = SimpleNamespace(
            _name="gang-1",
            _registering=asyncio.get_running_loop().create_future(),
            _coordinator=SimpleNamespace(check_health=SimpleNamespace(remote=checked)),
        )
        await DenoiserReplica.check_health(replica)

    if error is None:
        asyncio.run(scenario())
    else:
        with pytest.raises(type(error)):
            asyncio.run(scenario())
    assert killed == (["the replica"] if ends else [])
