"""A gang under virtual time: the jobs it holds, the steps under way, and what it will do next.

Steps of one job that nothing which the gang holds can come between are a stretch: taken as one event, charged
in part when somebody looks. A day of 200,000 jobs takes seconds because of it.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf

from cluster.virtual.job import Job
from serve.policy import placement
from serve.policy.tick import Resident, next_step


@dataclass(slots=True, eq=False, kw_only=True)
class Gang:
    """What it holds and does; the cluster moves it on."""

    name: str
    max_resident: int
    switch_s: float
    share_tokens: int
    """See ``serve.policy.tick.next_step``."""
    jobs: dict[str, Job] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    running: str | None = None
    stepping: tuple[str, ...] = ()
    """Jobs whose step is under way."""
    lora: Hashable = None
    is_draining: bool = False
    began_at: float = 0.0
    """When the step under way began."""
    step_s: float = 0.0
    """What a step of those under way takes."""
    uncharged: int = 0
    """Steps under way: more than one in a stretch."""
    turn: int = 0
    """Of the steps under way; the end of former ones means nothing any more."""
    progress: float = -inf
    """Virtual time of the running job at ``began_at``."""
    pace: float = 0.0
    """By which it grows in a step."""
    ends_at: float = 0.0
    """When the running job will have made its last step, as predicted."""

    @property
    def has_place(self) -> bool:
        """For one more job; the last to come waits until its ranks have let go of another."""
        return len(self.jobs) <= self.max_resident and not self.is_draining

    def take(self, job: Job) -> None:
        """Hold a job."""
        self.jobs[job.ask.id] = job

    def drop(self, job: Job) -> None:
        """Hold it no more."""
        del self.jobs[job.ask.id]
        self.leaving.discard(job.ask.id)
        job.resident = None
        if not self.jobs:
            self.progress, self.ends_at = -inf, 0.0

    def view(self) -> placement.Gang:
        """As placement sees it."""
        return placement.Gang(
            name=self.name,
            residents=tuple(job.resident for job in self.jobs.values() if job.resident is not None),
            running=self.running,
            leaving=frozenset(self.leaving),
            lora=self.lora,
            max_resident=self.max_resident,
            is_draining=self.is_draining,
        )

    def next_step(self) -> tuple[str, ...]:
        """Jobs that advance next; empty: none can."""
        return self._choose(self._held())

    def begin(self, stepping: tuple[str, ...], now: float, crowded: float, is_coarse: bool) -> None:
        """Begin a step, or a stretch of them where ``is_coarse``.

        Args:
            stepping: the jobs.
            now: virtual seconds.
            crowded: what a step takes longer.
            is_coarse: whether many may be taken as one.
        """
        self.stepping, self.running = stepping, stepping[0]
        jobs = [self.jobs[name] for name in stepping]
        first, resident = jobs[0], jobs[0].resident
        assert resident is not None
        self.progress, self.ends_at = resident.virtual_time, now + resident.cost
        self.pace = resident.claim.step_cost / resident.claim.weight
        self.step_s = max(job.ask.step_s * job.ask.slowness for job in jobs) * len(jobs) * crowded
        self.began_at = now
        if first.ask.lora != self.lora:
            self.lora = first.ask.lora
            self.began_at += self.switch_s
        is_stretch = is_coarse and not self.is_draining and self.is_undisturbed()
        self.uncharged = resident.claim.num_steps - resident.step if is_stretch else 1

    def is_undisturbed(self) -> bool:
        """Whether the job under way still is chosen for its last step, when it has come furthest."""
        held = self._held()
        if len(held) == 1:
            return True
        (name,) = self.stepping
        last = [replace(one, step=one.claim.num_steps - 1) if one.job_id == name else one for one in held]
        return self._choose(last) == (name,)

    def done(self, now: float) -> int:
        """Steps of a stretch that are done and not charged; never its last."""
        if self.uncharged <= 1 or now < self.began_at + self.step_s:
            return 0
        return min(self.uncharged - 1, int((now - self.began_at) / self.step_s + 1e-9))

    def charged(self, num_steps: int) -> None:
        """The first steps of a stretch have been charged."""
        self.uncharged -= num_steps
        self.began_at += num_steps * self.step_s
        self.progress += num_steps * self.pace

    def progress_at(self, now: float) -> float:
        """Virtual time of the running job, those steps of a stretch counted that have not been charged."""
        if self.uncharged <= 1:
            return self.progress
        return self.progress + (now - self.began_at) / self.step_s * self.pace

    def is_ending(self, now: float) -> bool:
        """Whether it makes the last step of its running job."""
        job = self.jobs.get(self.running or "")
        if job is None or not self.stepping:
            return False
        done = int((now - self.began_at) / self.step_s) if self.uncharged > 1 else 0
        return job.ask.num_steps - job.step - done <= 1

    def _held(self) -> list[Resident]:
        held = islice(self.jobs.items(), self.max_resident)
        return [job.resident for name, job in held if name not in self.leaving and job.resident is not None]

    def _choose(self, residents: Iterable[Resident]) -> tuple[str, ...]:
        return next_step(
            residents,
            running=self.running,
            lora=self.lora,
            switch_s=self.switch_s,
            share_tokens=self.share_tokens,
        )
