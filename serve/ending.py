"""What an error that ended an attempt means for its job: another attempt, or a failure with a code for its owner."""

from dataclasses import dataclass

from pusa_dist.errors import DeviceMemoryError, GangError, NumericsError, RequestError
from serve.moderation import UNAVAILABLE, ModerationUnavailableError
from serve.stages import ReplicaLostError
from serve.store.jobs import Job

MAX_GANG_DEATHS = 2
"""A job that was on a gang this many times when it died is failed."""
MAX_ATTEMPTS = 10
"""A job whose processes were lost this many times, for whatever reason, is failed."""


@dataclass(frozen=True, slots=True)
class Again:
    """The job goes back to the queue."""

    reason: str
    gang_died: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """The job is given up."""

    code: str
    message: str
    """For its owner."""


def ending(job: Job, error: Exception) -> Again | Failed | None:
    """How the attempt at a job ends; None: the error is none that an attempt is known to end with."""
    match error:
        case GangError() if job.gang_deaths + 1 >= MAX_GANG_DEATHS:
            message = f"the gang that held the job was lost {MAX_GANG_DEATHS} times, last: {error}"
            return Failed("gang_died_twice", message)
        case GangError():
            return Again("gang_lost", gang_died=True)
        case ReplicaLostError() if job.attempt >= MAX_ATTEMPTS:
            return Failed("replica_lost", f"processes were lost in {job.attempt} attempts, last: {error}")
        case ReplicaLostError():
            return Again("replica_lost", gang_died=False)
        case NumericsError():
            return Failed("numerics_error", str(error))
        case DeviceMemoryError():
            return Failed("out_of_memory", str(error))
        case RequestError():
            return Failed(error.code, error.message)
        case ModerationUnavailableError():
            return Failed(UNAVAILABLE, str(error))
    return None
