"""Who asks for what, and how often: a YAML file as a value."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from cluster.loadtest.settings import SettingsError, made, mapping, read_yaml, require

Task = Literal["text_to_video", "image_to_video", "start_end", "keyframes", "extension"]
Process = Literal["poisson", "bursts", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobClass:
    """Jobs that are alike, and judged by one objective."""

    task: Task
    size: str
    """As ``WIDTHxHEIGHT``."""
    num_frames: int
    num_inference_steps: int
    guidance_scale: float = 5.0
    priority: Literal["interactive", "batch"] = "interactive"
    share: float = 1.0
    """Of the jobs, relative to the other classes'."""

    def __post_init__(self) -> None:
        require(self.task in get_args(Task), f"task={self.task!r} is none of {', '.join(get_args(Task))}")
        width, _, height = self.size.partition("x")
        require(width.isdecimal() and height.isdecimal(), f"size={self.size!r} is not WIDTHxHEIGHT")
        require(self.share >= 0, f"share={self.share} is negative")

    @property
    def sides(self) -> tuple[int, int]:
        """Width and height."""
        width, _, height = self.size.partition("x")
        return int(width), int(height)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Somebody with a key."""

    share: float = 1.0
    """Of the jobs, relative to the other tenants'."""
    weight: float = 1.0
    """Of the gangs under contention; set in a service of our own, taken as it is elsewhere."""
    classes: Mapping[str, float] = field(default_factory=dict)
    """Shares of its own; empty: those of the classes."""

    def __post_init__(self) -> None:
        require(self.share >= 0, f"share={self.share} is negative")
        require(self.weight > 0, f"weight={self.weight} is not positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How the jobs come."""

    process: Process = "poisson"
    burstiness: float = 1.0
    """Shape of the gamma distribution of the gaps: 1 is Poisson, less is burstier, more is steadier."""
    burst_size: int = 10
    """``bursts``: jobs that come at once."""
    trace: str = ""
    """``trace``: a JSONL file of ``{"at", "tenant", "job_class"}``, beside the workload; any run's schedule is one."""

    def __post_init__(self) -> None:
        require(self.process in get_args(Process), f"process={self.process!r} is none of {get_args(Process)}")
        require(self.burstiness > 0, f"burstiness={self.burstiness} is not positive")
        require(self.burst_size >= 1, f"burst_size={self.burst_size} is less than 1")
        require(bool(self.trace) == (self.process == "trace"), "trace names a file for process=trace, and only then")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked of the service."""

    tenants: Mapping[str, Tenant]
    classes: Mapping[str, JobClass]
    request_rate: float
    """Jobs a second, offered."""
    num_jobs: int
    seed: int = 0
    arrivals: Arrivals = field(default_factory=Arrivals)

    def __post_init__(self) -> None:
        require(self.request_rate > 0, f"request_rate={self.request_rate} is not positive")
        require(self.num_jobs >= 1, f"num_jobs={self.num_jobs} is less than 1")
        require(sum(one.share for one in self.tenants.values()) > 0, "tenants: no share is positive")
        for name, tenant in self.tenants.items():
            unknown = tenant.classes.keys() - self.classes.keys()
            require(not unknown, f"tenants.{name}.classes: {', '.join(sorted(unknown))} are not in classes")
            require(sum(self.shares_of(name).values()) > 0, f"tenants.{name}: no class has a positive share")

    def shares_of(self, tenant: str) -> dict[str, float]:
        """What a tenant asks for, by class."""
        own = self.tenants[tenant].classes
        return dict(own) if own else {name: one.share for name, one in self.classes.items()}


def write_workload(path: Path, workload: Workload) -> None:
    """Keep a workload beside the schedule that was made of it, as one that sends the same schedule again."""
    kept = asdict(replace(workload, arrivals=Arrivals(process="trace", trace="schedule.jsonl")))
    path.write_text(yaml.safe_dump(kept, sort_keys=False))


def read_workload(path: Path, changes: Mapping[str, Any] | None = None) -> Workload:
    """The workload of a file.

    Args:
        path: of the YAML file.
        changes: fields that are not as in the file.

    Raises:
        SettingsError: it cannot be meant.
    """
    given = {**read_yaml(path), **(changes or {})}
    for name, cls in (("tenants", Tenant), ("classes", JobClass)):
        several = mapping(given.get(name), f"{path}: {name}")
        given[name] = {
            key: made(cls, mapping({} if one is None else one, f"{path}: {name}.{key}"), f"{path}: {name}.{key}")
            for key, one in several.items()
        }
    arrivals = made(Arrivals, mapping(given.get("arrivals", {}), f"{path}: arrivals"), f"{path}: arrivals")
    if arrivals.trace:
        trace = path.parent / arrivals.trace
        if not trace.is_file():
            raise SettingsError(f"{path}: arrivals.trace: there is no file {trace}")
    return made(Workload, {**given, "arrivals": arrivals}, str(path))
