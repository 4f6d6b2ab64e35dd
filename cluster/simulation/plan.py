"""The question that a capacity simulation answers, as values: what is asked for, and what could serve it."""

import math
import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cluster.autoscaling import Settings
from serve.policy.priority import Priority

_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who asks."""

    name: str
    share: float
    """Of all jobs."""
    weight: float = 1.0
    priority: Priority = "interactive"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobClass:
    """What is asked for."""

    name: str
    share: float
    """Of every tenant's jobs."""
    shape: str
    """Key of a pool's ``forward_s``."""
    steps: int
    forwards: int = 1
    """In a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One way to serve it: gangs of so many GPUs of a type."""

    name: str
    gpus_per_gang: int
    dollars_per_gpu_hour: float
    forward_s: Mapping[str, float]
    """Seconds of a forward, by shape."""
    cold_start_s: float = 0.0
    gpu_hours_between_failures: float = math.inf

    def step_s(self, job: JobClass) -> float:
        """Seconds of a step."""
        return self.forward_s[job.shape] * job.forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """All that is not steps."""

    prepare_s: float = 0.5
    decode_s: float = 3.0
    release_s: float = 1.0
    checkpoint_every: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A job that is asked for."""

    at: float
    tenant: Tenant
    job: JobClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A day, or several, of jobs; an objective; and pools to choose from."""

    latency_s: float
    """What ``part`` of the jobs must not exceed."""
    part: float
    hours: float
    jobs_per_hour: float
    tenants: tuple[Tenant, ...]
    classes: tuple[JobClass, ...]
    pools: tuple[Pool, ...]
    swing: float = 0.0
    """The day's peak above the average, and the night's depth below it, as a part of the average."""
    burst_every_h: float = math.inf
    burst_jobs: int = 0
    seed: int = 0
    stages: Stages = field(default_factory=Stages)
    autoscaling: Settings = field(default_factory=Settings)

    def arrivals(self) -> Iterator[Arrival]:
        """Jobs in order of time: Poisson, thinned to the time of day, and the bursts."""
        rng = random.Random(self.seed)
        peak = self.jobs_per_hour / _HOUR_S * (1 + self.swing)
        times = []
        at = rng.expovariate(peak)
        while at < self.hours * _HOUR_S:
            if rng.random() * (1 + self.swing) < 1 - self.swing * math.cos(2 * math.pi * at / _DAY_S):
                times.append(at)
            at += rng.expovariate(peak)
        if self.burst_jobs:
            num_bursts = math.floor(self.hours / self.burst_every_h + 0.5)  # each in the middle of its time
            times += [
                (number + 0.5) * self.burst_every_h * _HOUR_S
                for number in range(num_bursts)
                for _ in range(self.burst_jobs)
            ]
        tenants, classes = [one.share for one in self.tenants], [one.share for one in self.classes]
        for at in sorted(times):
            (tenant,), (job,) = rng.choices(self.tenants, tenants), rng.choices(self.classes, classes)
            yield Arrival(at=at, tenant=tenant, job=job)


def load_plan(path: Path) -> Plan:
    """A plan from its YAML.

    Raises:
        ValueError: what is in it cannot be a plan; the message says what and where.
    """
    given = yaml.safe_load(path.read_text())
    try:
        objective = _only("objective", given.pop("objective"), ("latency_s", "part"))
        bursts = _only("bursts", given.pop("bursts", {"every_h": math.inf, "jobs": 0}), ("every_h", "jobs"))
        plan = Plan(
            latency_s=objective["latency_s"],
            part=objective["part"],
            burst_every_h=bursts["every_h"],
            burst_jobs=bursts["jobs"],
            tenants=tuple(_made(Tenant, one) for one in given.pop("tenants")),
            classes=tuple(_made(JobClass, one) for one in given.pop("classes")),
            pools=tuple(_made(Pool, one) for one in given.pop("pools")),
            stages=_made(Stages, given.pop("stages", {})),
            autoscaling=_made(Settings, given.pop("autoscaling", {})),
            **given,
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    missing = [
        f"{pool.name} has no forward_s of {one.shape}"
        for pool in plan.pools
        for one in plan.classes
        if one.shape not in pool.forward_s
    ]
    if missing:
        raise ValueError(f"{path}: {'; '.join(missing)}")
    return plan


def _made(kind: Any, given: Mapping[str, Any]) -> Any:
    return kind(**_only(kind.__name__, given, [one.name for one in fields(kind)]))


def _only(what: str, given: Mapping[str, Any], known: Collection[str]) -> Mapping[str, Any]:
    unknown = given.keys() - set(known)
    if unknown:
        raise TypeError(f"{what} has no {', '.join(sorted(unknown))}")
    return given
