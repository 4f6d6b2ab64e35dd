"""How Ray's failures become ours; the handles are stand-ins that raise what Ray raises."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, OwnerDiedError, RayTaskError, TaskCancelledError

from pusa_dist.errors import GangError, NumericsError
from serve.serve_stages import ServeStages
from serve.stages import GangUnavailableError, Progress, ReplicaLostError

STEP = Progress(step=0, num_steps=4, seconds=0.0)


def task_error(cause):
    """As Ray delivers an exception that a replica raised."""
    return RayTaskError("generate", f"traceback: {cause}", cause).as_instanceof_cause()


class FakeDenoiser:
    def __init__(self, messages):
        self.messages, self.is_cancelled = list(messages), False
        self.generate = self

    def options(self, stream):
        return self

    def remote(self, *arguments):
        return self

    async def __aiter__(self):
        for message in self.messages:
            if isinstance(message, Exception):
                raise message
            yield message

    def cancel(self):
        self.is_cancelled = True


async def drain(denoiser):
    async for _ in ServeStages(None, None, denoiser).denoise("job", None, None, None, None):
        pass


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([STEP, task_error(GangError("rank 1 died"))], GangError),
        ([STEP, ActorDiedError()], GangError),
        ([ActorDiedError()], GangUnavailableError),
        ([task_error(GangUnavailableError("being replaced"))], GangUnavailableError),
        ([STEP, task_error(NumericsError("step 2"))], NumericsError),
        ([STEP, task_error(OwnerDiedError("00" * 28, "owner", ""))], ReplicaLostError),
        ([STEP, TaskCancelledError()], ReplicaLostError),
    ],
    ids=["gang lost", "coordinator died", "died before", "unavailable", "numerics", "tensor lost", "stopped"],
)
def test_a_failure_of_denoising_is_translated_once_and_the_call_cancelled(messages, expected):
    denoiser = FakeDenoiser(messages)
    with pytest.raises(expected) as caught:
        asyncio.run(drain(denoiser))
    assert type(caught.value) is expected
    assert denoiser.is_cancelled


def test_a_bug_keeps_its_own_type():
    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(drain(FakeDenoiser([task_error(ValueError("a bug"))])))
