"""How Ray's failures become ours; the handles are stand-ins that raise what Ray raises."""

import asyncio
import errno

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError, TaskCancelledError

from pusa_dist.errors import GangError, NumericsError
from serve.serve_stages import ActorGang, ServeStages
from serve.stages import (
    Assignment,
    Finished,
    GangUnavailableError,
    Kept,
    Progress,
    Released,
    ReplicaLostError,
    TensorRef,
)
from serve.store.artifacts import StorageError

STEP = Progress(step=0, num_steps=4, seconds=0.0)
GIVEN = Assignment(job_id="job", attempt=3, owner="me", request=None, source=None, claim=None)


def task_error(cause):
    """As Ray delivers an exception that an actor raised."""
    return RayTaskError("generate", f"traceback: {cause}", cause).as_instanceof_cause()


class Method:
    """What ``actor.method`` is: ``options`` and ``remote``."""

    def __init__(self, call):
        self.remote = call

    def options(self, num_returns):
        assert num_returns == "streaming"
        return self


class FakeCoordinator:
    """An actor handle whose stream is given, each item behind a reference."""

    def __init__(self, messages=(), error=None):
        self.messages, self.error, self.dropped = messages, error, []
        self.generate = Method(lambda assignment: self.stream())
        self.drop = Method(lambda *job: self.dropped.append(job))
        self.hold = Method(lambda *arguments: self.answer())
        self.take = Method(lambda *job: self.answer(TensorRef(job)))

    async def stream(self):
        for message in self.messages:
            yield self.answer(message)

    async def answer(self, message=None):
        message = self.error if message is None else message
        if isinstance(message, Exception):
            raise message
        return message


async def drain(coordinator):
    return [message async for message in ActorGang(coordinator).generate(GIVEN)]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([STEP, task_error(GangError("rank 1 died"))], GangError),
        ([STEP, ActorDiedError()], GangError),
        ([ActorDiedError()], GangUnavailableError),
        ([task_error(GangUnavailableError("being replaced"))], GangUnavailableError),
        ([STEP, task_error(NumericsError("step 2"))], NumericsError),
        ([task_error(StorageError(errno.EIO, "no answer"))], StorageError),
        ([STEP, task_error(OwnerDiedError("00" * 28, "owner", ""))], ReplicaLostError),
        ([STEP, TaskCancelledError()], ReplicaLostError),
    ],
    ids=[
        "gang lost",
        "coordinator died",
        "died before",
        "unavailable",
        "numerics",
        "bucket away",
        "tensor lost",
        "stopped",
    ],
)
def test_a_failure_of_denoising_is_translated_once(messages, expected):
    with pytest.raises(expected) as caught:
        asyncio.run(drain(FakeCoordinator(messages)))
    assert type(caught.value) is expected


def test_the_latents_of_a_finished_job_are_asked_for():
    coordinator = FakeCoordinator([STEP, Kept()])
    assert asyncio.run(drain(coordinator)) == [STEP, Finished(latents=TensorRef(("job", 3)))]
    assert coordinator.dropped == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ActorDiedError(), GangError), (task_error(ReplicaLostError("not kept")), ReplicaLostError)],
)
def test_latents_that_cannot_be_had_are_a_lost_attempt(error, expected):
    coordinator = FakeCoordinator([STEP, Kept()])
    coordinator.take = Method(lambda *job: coordinator.answer(error))
    with pytest.raises(expected):
        asyncio.run(drain(coordinator))


def test_a_bug_keeps_its_own_type():
    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(drain(FakeCoordinator([task_error(ValueError("a bug"))])))


@pytest.mark.parametrize("last", [Finished(latents=TensorRef(None)), Released(checkpoint=None)])
def test_a_stream_that_ended_drops_nothing(last):
    coordinator = FakeCoordinator([STEP, last])
    assert asyncio.run(drain(coordinator)) == [STEP, last]
    assert coordinator.dropped == []


def test_a_stream_that_is_given_up_drops_its_job():
    coordinator = FakeCoordinator([STEP, STEP])

    async def scenario():
        stream = ActorGang(coordinator).generate(GIVEN)
        await anext(stream)
        await stream.aclose()

    asyncio.run(scenario())
    assert coordinator.dropped == [("job", 3)]


def test_a_dead_coordinator_is_a_lost_replica_to_whoever_calls_it():
    with pytest.raises(ReplicaLostError, match="ActorDiedError"):
        asyncio.run(ActorGang(FakeCoordinator(error=ActorDiedError())).hold("me", {}))


def test_a_dead_text_encoder_is_a_lost_replica():
    class Response:
        def __await__(self):
            raise ActorDiedError
            yield

        def cancel(self):
            pass

    encoder = type("Handle", (), {"embed": Method(lambda prompt: Response())})()
    with pytest.raises(ReplicaLostError):
        asyncio.run(ServeStages(encoder, None).embed("a"))
