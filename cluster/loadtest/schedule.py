"""Every arrival, decided before the first: what the service answers cannot change when the next job comes.

Gaps and contents are drawn apart, and gaps for one job a second: runs at several rates of one seed ask for
the same jobs in the same order, only faster.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from pathlib import Path

from cluster.loadtest.settings import SettingsError
from cluster.loadtest.workload import Arrivals, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A job that is to be asked for."""

    number: int
    at: float
    """Seconds from the beginning."""
    tenant: str
    job_class: str
    seed: int


def schedule(workload: Workload, rate: float, num_jobs: int, trace: Sequence[Arrival] = ()) -> list[Arrival]:
    """The arrivals of a run.

    Args:
        workload: that they are of.
        rate: jobs a second.
        num_jobs: of all tenants together; a trace may have fewer.
        trace: recorded arrivals, for a workload that replays them.
    """
    if workload.arrivals.process == "trace":
        return _replayed(trace, rate, num_jobs)
    dice = random.Random(f"{workload.seed} contents")
    tenants = {name: one.share for name, one in workload.tenants.items()}
    arrivals = []
    for number, at in enumerate(islice(_times(workload.arrivals, workload.seed), num_jobs)):
        tenant = _one_of(tenants, dice)
        job_class = _one_of(workload.shares_of(tenant), dice)
        arrivals.append(
            Arrival(number=number, at=at / rate, tenant=tenant, job_class=job_class, seed=dice.randrange(2**31))
        )
    return arrivals


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Jobs a second of a schedule: gaps by the time that they take."""
    span_s = arrivals[-1].at - arrivals[0].at if arrivals else 0.0
    return (len(arrivals) - 1) / span_s if span_s > 0 else float("inf")


def write_schedule(path: Path, arrivals: Iterable[Arrival]) -> None:
    """Keep a schedule as JSONL."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in arrivals))


def read_trace(path: Path, workload: Workload) -> list[Arrival]:
    """A recorded schedule, whose order is that of its times.

    Raises:
        SettingsError: a line that is no arrival of this workload.
    """
    arrivals = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            given = json.loads(line)
            arrival = Arrival(
                number=0,
                at=float(given["at"]),
                tenant=str(given["tenant"]),
                job_class=str(given["job_class"]),
                seed=int(given.get("seed", number)),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{path}, line {number}: {error!r}; it needs at, tenant and job_class") from error
        if arrival.tenant not in workload.tenants or arrival.job_class not in workload.classes:
            raise SettingsError(
                f"{path}, line {number}: tenant {arrival.tenant} or class {arrival.job_class} is not in the workload"
            )
        arrivals.append(arrival)
    if not arrivals:
        raise SettingsError(f"{path}: it holds no arrivals")
    return sorted(arrivals, key=lambda one: one.at)


def _replayed(trace: Sequence[Arrival], rate: float, num_jobs: int) -> list[Arrival]:
    kept = trace[:num_jobs]
    natural = mean_rate(kept)
    scale = natural / rate if natural != float("inf") else 1.0
    return [
        Arrival(
            number=number,
            at=(one.at - kept[0].at) * scale,
            tenant=one.tenant,
            job_class=one.job_class,
            seed=one.seed,
        )
        for number, one in enumerate(kept)
    ]


def _times(arrivals: Arrivals, seed: int) -> Iterator[float]:
    """Endless, of one job a second on average."""
    dice = random.Random(f"{seed} gaps")
    shape = arrivals.burstiness
    size = arrivals.burst_size if arrivals.process == "bursts" else 1
    at = 0.0
    while True:
        at += size * dice.gammavariate(shape, 1 / shape)
        yield from repeat(at, size)


def _one_of(shares: dict[str, float], dice: random.Random) -> str:
    return dice.choices(list(shares), weights=list(shares.values()))[0]
