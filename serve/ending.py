"""What an error that ended an attempt means for its job: another attempt, or a failure with a code for its owner.

What a lost process said of its end names hosts, files and other jobs' faults: it is for the log, not for the owner.
"""

from dataclasses import dataclass

from pusa_dist.errors import DeviceMemoryError, GangError, NumericsError, RequestError
from serve.moderation import UNAVAILABLE, ModerationUnavailableError
from serve.stages import GangSilentError, ReplicaLostError
from serve.store.jobs import Job

MAX_GANG_DEATHS = 2
"""A job whose gang dies is failed if that is the second gang that it lost."""
MAX_GANG_LOSSES = 3
"""A job whose gang falls silent is failed if that is the third gang that it lost. A machine that lost its power says no
more than one that is cut off, whose jobs are innocent: so silence counts, but is forgiven once more than a death."""
MAX_ATTEMPTS = 10
"""A job whose processes were lost this many times, for whatever reason, is failed."""


@dataclass(frozen=True, slots=True)
class Again:
    """The job goes back to the queue."""

    reason: str
    gang_died: bool
    """Or fell silent: it counts against the job."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job is given up."""

    code: str
    message: str
    """For its owner."""


def ending(job: Job, error: Exception) -> Again | Failed | None:
    """How the attempt at a job ends; None: the error is none that an attempt is known to end with."""
    match error:
        case GangError() | GangSilentError():
            num_lost = job.gang_deaths + 1
            if num_lost < (MAX_GANG_DEATHS if isinstance(error, GangError) else MAX_GANG_LOSSES):
                return Again("gang_lost", gang_died=True)
            message = f"the gang that held the job was lost {num_lost} times; ask the operator before you send it again"
            return Failed("gang_died_twice", message)
        case ReplicaLostError() if job.attempt >= MAX_ATTEMPTS:
            return replica_lost(job.attempt)
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


def replica_lost(num_attempts: int) -> Failed:
    """The end of a job that has lost its processes in so many attempts."""
    return Failed("replica_lost", f"processes were lost in {num_attempts} attempts; send it again later")
