"""The service's own metrics, read where Prometheus reads them."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.processes import command_of, roles

JOBS = "ray_video_jobs_total"
REQUEUED = "ray_video_jobs_requeued_total"
LATENCY = "ray_video_job_seconds"
STAGE = "ray_video_stage_seconds"
STEPS = "ray_video_step_seconds"
_PREFIX = "ray_video_"
_OURS = ("outcome", "stage", "reason", "status", "le")
"""Labels that mean something; Ray adds those of the process, which are summed over."""
_TIMEOUT_S = 10.0
REPORTED_S = 12.0
"""Ray's workers report every ten seconds."""
_MAX_READINGS = 5

Sample = tuple[str, tuple[tuple[str, str], ...]]
"""A name with its labels in order."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """Samples summed over processes."""

    samples: Mapping[Sample, float]

    def of(self, name: str, **labels: str) -> float | None:
        """The sum of all samples of a name with these labels, among others; None: there is none."""
        wanted = set(labels.items())
        found = [value for (one, its), value in self.samples.items() if one == name and wanted <= set(its)]
        return sum(found) if found else None

    def since(self, before: "Scrape") -> "Scrape":
        """What was counted between two scrapes."""
        return Scrape({key: value - before.samples.get(key, 0.0) for key, value in self.samples.items()})

    def buckets(self, name: str, **labels: str) -> list[tuple[float, float]]:
        """Upper bounds of a histogram and how many values are not above each, ascending; the last is infinite."""
        wanted = set(labels.items())
        found: Counter[float] = Counter()
        for (one, its), value in self.samples.items():
            if one == f"{name}_bucket" and wanted <= set(its):
                found[float(dict(its)["le"])] += value  # type: ignore[assignment]
        return sorted(found.items())


def parse(text: str) -> Scrape:
    """Our samples of an exposition."""
    samples: dict[Sample, float] = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name.startswith(_PREFIX) and not math.isnan(one.value):
                labels = tuple(sorted((key, value) for key, value in one.labels.items() if key in _OURS))
                samples[one.name, labels] = samples.get((one.name, labels), 0.0) + one.value
    return Scrape(samples)


def scrape(url: str) -> Scrape:
    """Read the metrics at a URL.

    Raises:
        httpx.HTTPError: they cannot be read.
    """
    return parse(httpx.get(url, timeout=_TIMEOUT_S).raise_for_status().text)


def scrape_settled(url: str, pause_s: float = REPORTED_S) -> Scrape:
    """Read the metrics of a service whose work is done, when everything it counted has been reported.

    That is when two readings, ``pause_s`` apart, count the same jobs and steps. A service that others use meanwhile
    may never come to rest: what the last of a few readings counted is returned then.

    Raises:
        httpx.HTTPError: the metrics cannot be read.
    """
    last = scrape(url)
    for _ in range(_MAX_READINGS):
        time.sleep(pause_s)
        before, last = last, scrape(url)
        if all(last.of(name) == before.of(name) for name in (JOBS, f"{STEPS}_count")):
            break
    return last


def metrics_url(service: int) -> str:
    """Where the Ray below a process shows its metrics: Ray takes any port, and writes it down."""
    (raylet,) = roles(service)["raylet"]
    named = dict(one.removeprefix("--").partition("=")[::2] for one in command_of(raylet) if one.startswith("--"))
    session = Path(named["raylet_socket_name"]).parents[1]
    port = (session / f"metrics_export_port_{named['node_id']}").read_text().strip()
    return f"http://127.0.0.1:{port}/metrics"
