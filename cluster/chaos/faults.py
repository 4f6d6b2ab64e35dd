"""The faults, one after the other: when each is made, to whom, and when the service is whole again."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import httpx

from cluster.chaos.records import JobRecord
from cluster.processes import command_of, roles

MOMENT_S = 150.0
"""Longest wait for the moment of a fault."""
WHOLE_S = 240.0
"""Longest wait until the service is whole again."""
_RENEWED_S = 5.0
"""A lease with less left than this has nobody who renews it: a dispatcher does so every two of ten seconds."""
_GLANCE_S = 3.0

Jobs = Callable[[], Mapping[str, JobRecord]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One process, or all of them, killed or stopped."""

    role: str
    """``service``: the driver and everything it has started."""
    number: signal.Signals = signal.SIGKILL
    moment: Literal["denoise", "decode"] = "denoise"
    """``denoise``: both gangs make steps; ``decode``: the VAE writes a video."""
    is_gang_death: bool = False
    """A job that was on two gangs that died is failed on purpose, so none may have one behind it."""
    must_hit: bool = True
    """Whether jobs on their way are sure to be interrupted by it."""

    @property
    def name(self) -> str:
        """As people say it."""
        return f"{self.number.name} {self.role}"


FAULTS = (
    Fault(role="Rank", number=signal.SIGSTOP, is_gang_death=True),
    Fault(role="Dispatcher"),
    Fault(role="Gateway", must_hit=False),
    Fault(role="TextEncoder", must_hit=False),
    Fault(role="Denoiser", is_gang_death=True),
    Fault(role="Controller", must_hit=False),
    Fault(role="Proxy", must_hit=False),
    Fault(role="Vae", moment="decode"),
    Fault(role="Coordinator", is_gang_death=True),
    Fault(role="service"),
    Fault(role="Rank", is_gang_death=True),
)
"""A gang's death must wait while a job of the last one that died is on a gang: meanwhile the others are made."""


class TimedOutError(RuntimeError):
    """Something did not come true in time; the message says what."""


class NoJobsLeftError(RuntimeError):
    """All jobs have ended before the fault could hit one."""


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float, pause_s: float = 0.2) -> float:
    """Wait until a condition holds; returns for how many seconds.

    Raises:
        TimedOutError: it did not hold within ``timeout_s``.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise TimedOutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(pause_s)
    return time.monotonic() - began


def wait_for_moment(fault: Fault, jobs: Jobs) -> None:
    """Wait until the fault will hit jobs in the middle of what it disturbs.

    Raises:
        TimedOutError: the moment did not come.
        NoJobsLeftError: it never will.
    """

    def may_be() -> bool:
        if all(one.is_final for one in jobs().values()) and jobs():
            raise NoJobsLeftError(fault.name)
        return not (fault.is_gang_death and any(_may_not_meet_another(one) for one in jobs().values()))

    wait_for(f"{fault.name}: no job on a gang that was on one that died", may_be, MOMENT_S)
    if fault.moment == "decode":
        wait_for(f"{fault.name}: a job that is decoded", lambda: may_be() and _is_decoding(jobs()), MOMENT_S, 0.02)
    else:
        steps = _both_gangs_step(jobs)
        wait_for(f"{fault.name}: two jobs that make steps", lambda: may_be() and next(steps), MOMENT_S)


def strike(fault: Fault, service: int) -> int:
    """Signal a process of the fault's role below the service's own; returns its id."""
    pids = roles(service)[fault.role]
    # A rank in a step rather than one of a gang that waits.
    (pid, *_) = sorted(pids, key=lambda pid: ".step" not in command_of(pid)[0])
    os.kill(pid, fault.number)
    return pid


def wait_until_whole(fault: Fault, struck: int, service: int, whole: Mapping[str, int], url: str, key: str,
                     jobs: Jobs) -> None:  # fmt: skip
    """Wait until every process is there again and every job in hand has somebody who answers for it.

    Args:
        fault: that was made.
        struck: id of the process that it hit.
        service: id of the service's first process.
        whole: how many processes there are of every role.
        url: of the service.
        key: for it.
        jobs: in it.

    Raises:
        TimedOutError: it did not become whole.
    """
    missing: list[str] = []

    def is_whole() -> bool:
        missing[:] = _missing(struck, roles(service), whole)
        if not missing and not is_ready(url, key):
            missing[:] = ["an answer that it is ready"]
        if not missing:
            missing[:] = [one.id for one in jobs().values() if one.lease_s() < _RENEWED_S]
        return not missing

    try:
        wait_for("whole again", is_whole, WHOLE_S)
    except TimedOutError as error:
        raise TimedOutError(f"{fault.name}: {error}; missing: {missing}") from error


def is_ready(url: str, key: str | None) -> bool:
    """Whether the service says that it is ready; a service without keys is asked with None."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = httpx.get(f"{url}/health", headers=headers, timeout=5)
    except httpx.TransportError:
        return False
    return response.status_code == httpx.codes.OK


def _missing(struck: int, now: Mapping[str, list[int]], whole: Mapping[str, int]) -> list[str]:
    missing = [f"{role}: {len(now.get(role, []))} of {count}" for role, count in whole.items()
               if len(now.get(role, [])) != count]  # fmt: skip
    return missing + [f"end of process {struck}" for pids in now.values() if struck in pids]


def _may_not_meet_another(job: JobRecord) -> bool:
    """Whether it was on a gang that died and may be on one again: not done, with the VAE, or back in the queue."""
    return job.gang_deaths > 0 and job.status == "in_progress" and job.stage != "decode"


def _is_decoding(jobs: Mapping[str, JobRecord]) -> bool:
    return any(one.stage == "decode" for one in jobs.values())


def _both_gangs_step(jobs: Jobs) -> Iterator[bool]:
    """Whether two jobs have moved since a moment ago: a gang advances one at a time."""
    while True:
        since, then = time.monotonic(), jobs()
        while time.monotonic() - since < _GLANCE_S:
            yield sum(_has_moved(then.get(name), now) for name, now in jobs().items()) >= 2


def _has_moved(then: JobRecord | None, now: JobRecord) -> bool:
    in_denoise = now.status == "in_progress" and now.stage == "denoise"
    return then is not None and in_denoise and now.attempt == then.attempt and now.step > then.step
