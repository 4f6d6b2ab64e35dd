"""What an error means for a job, as a table."""

import pytest

from pusa_dist.errors import CheckpointError, DeviceMemoryError, GangError, NumericsError, RequestError
from serve.ending import MAX_ATTEMPTS, Again, Failed, ending
from serve.moderation import ModerationUnavailableError
from serve.stages import GangSilentError, GangUnavailableError, ReplicaLostError
from tests.serve.store_support import new_job


@pytest.mark.parametrize(
    ("error", "job", "expected"),
    [
        (GangError("rank 1"), {}, Again("gang_lost", gang_died=True)),
        (GangError("rank 1"), {"gang_deaths": 1}, "gang_died_twice"),
        (GangSilentError("gang-1"), {}, Again("gang_lost", gang_died=True)),
        (GangSilentError("gang-1"), {"gang_deaths": 1}, Again("gang_lost", gang_died=True)),
        (GangSilentError("gang-1"), {"gang_deaths": 2, "attempt": MAX_ATTEMPTS}, "gang_died_twice"),
        (ReplicaLostError("the VAE"), {}, Again("replica_lost", gang_died=False)),
        (GangUnavailableError("leaving"), {}, Again("replica_lost", gang_died=False)),
        (ReplicaLostError("the VAE"), {"attempt": MAX_ATTEMPTS - 1}, Again("replica_lost", gang_died=False)),
        (ReplicaLostError("the VAE"), {"attempt": MAX_ATTEMPTS}, "replica_lost"),
        (NumericsError("step 2"), {}, "numerics_error"),
        (DeviceMemoryError("size=832x480"), {}, "out_of_memory"),
        (RequestError("too short", "input", "clip_too_short"), {}, "clip_too_short"),
        (ModerationUnavailableError("no answer"), {}, "moderation_unavailable"),
        (CheckpointError("a bug of ours"), {}, None),
        (ValueError("a bug of ours"), {}, None),
    ],
)
def test_an_error_is_another_attempt_or_a_failure_with_a_code(error, job, expected):
    found = ending(new_job(**job), error)
    assert (found.code if isinstance(found, Failed) else found) == expected
