"""When the ranks of a gang fail a call one after the other: whose fault it was, and how long the last is waited for.

Ray is not started: futures stand for its references.
"""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from pusa_dist.errors import GangError, NumericsError
from serve.gang import Gang
from serve.stages import ReplicaLostError

LOST = ObjectLostError("00" * 28, None, "")


@pytest.fixture
def gang(monkeypatch):
    monkeypatch.setattr("serve.gang.AGREEMENT_S", 0.1)
    gang = Gang.__new__(Gang)
    gang.error, gang._ranks = None, []
    return gang


async def settle(gang, *ends, deadline_s):
    """Outcome of a call that ends so on every rank; each is the seconds after which, and the error or None."""

    async def rank(seconds, error):
        await asyncio.sleep(seconds)
        if error is not None:
            raise error

    return await gang._settle("admit", [rank(*end) for end in ends], deadline_s)


@pytest.mark.parametrize("error", [LOST, RayTaskError("admit", "", LOST)])
@pytest.mark.parametrize("last", [LOST, None])
def test_a_tensor_whose_loss_the_ranks_notice_far_apart_is_not_the_end_of_the_gang(gang, error, last):
    with pytest.raises(ReplicaLostError, match="a tensor of the job is lost"):
        asyncio.run(settle(gang, (0.0, error), (0.5, last), deadline_s=30.0))
    assert gang.error is None


def test_a_rank_that_does_not_notice_within_the_deadline_is(gang):
    with pytest.raises(GangError, match="admit on rank 1"):
        asyncio.run(settle(gang, (0.0, LOST), (30.0, LOST), deadline_s=0.5))


def test_a_rank_that_dies_before_it_notices_is(gang):
    with pytest.raises(GangError, match="a rank died in admit"):
        asyncio.run(settle(gang, (0.0, LOST), (0.3, ActorDiedError()), deadline_s=30.0))


def test_ranks_that_raise_an_error_of_the_job_far_apart_have_come_apart(gang):
    with pytest.raises(GangError, match="admit on rank 1"):
        asyncio.run(settle(gang, (0.0, NumericsError("nan")), (1.0, NumericsError("nan")), deadline_s=30.0))
