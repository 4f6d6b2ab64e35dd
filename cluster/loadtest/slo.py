"""What the service is to reach: a YAML file as a value."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.loadtest.settings import made, mapping, read_yaml, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Of a class: so many of its jobs complete within so long after they were due."""

    latency_s: float
    attainment: float = 0.95

    def __post_init__(self) -> None:
        require(self.latency_s > 0, f"latency_s={self.latency_s} is not positive")
        require(0 <= self.attainment <= 1, f"attainment={self.attainment} is not within 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Of a run; what is None is told and not judged. Lost and doubled jobs are always judged: there may be none."""

    classes: Mapping[str, Objective] = field(default_factory=dict)
    max_error_rate: float | None = 0.0
    """Of the jobs that were due: failed, timed out, or refused for another reason than load."""
    max_reject_rate: float | None = None
    min_jain: float | None = None
    """Of the served parts of what the tenants asked for."""
    max_p99_lag_s: float | None = 0.5
    """Of the load generator: above it, its machine was too busy, and the figures say little of the service."""
    min_saturation_ratio: float | None = 0.9
    """Throughput at saturation by that of a plain loop; judged where it is measured."""


NO_OBJECTIVES = Slo(max_error_rate=None, max_p99_lag_s=None, min_saturation_ratio=None)


def read_slo(path: Path, known: Collection[str]) -> Slo:
    """The objectives of a file.

    Args:
        path: of the YAML file.
        known: the workload's classes, which the objectives must be of.

    Raises:
        SettingsError: it cannot be meant.
    """
    given = dict(read_yaml(path))
    classes = mapping(given.get("classes", {}), f"{path}: classes")
    unknown = sorted(classes.keys() - set(known))
    require(not unknown, f"{path}: classes: {', '.join(unknown)} are not in the workload; it has {', '.join(known)}")
    given["classes"] = {
        name: made(Objective, mapping(one, f"{path}: classes.{name}"), f"{path}: classes.{name}")
        for name, one in classes.items()
    }
    return made(Slo, given, str(path))
