"""Whether every job is there once: what the clients were told, against what the service lists and bills."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from cluster.loadtest.drive import Target
from cluster.loadtest.orders import number_of
from cluster.loadtest.rows import Row

_REQUEST_S = 30.0
_CLOCKS_S = 600.0
"""How far the service's clock may be behind ours: jobs that are older than the run end the search for its own."""
_LEDGER_S = 3.0
"""The service writes its ledger about once a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A job as the service lists it."""

    job_id: str
    number: int
    state: str
    has_video: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """What the tenants' usage grew by, of all together."""

    completed: int
    gang_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Jobs by number."""

    lost: Sequence[int]
    """Accepted, and the service does not have them, or has not ended them, or has no video of what it completed."""
    doubled: Sequence[int]
    """More than one job of one order, or more completions billed than jobs completed (number -1)."""


def audit(rows: Iterable[Row], listed: Iterable[Listed], billed: int | None) -> Audit:
    """Compare.

    Args:
        rows: what the clients saw.
        listed: the run's jobs in the service.
        billed: completions that the tenants were billed for, by nobody else's jobs; None: not known.
    """
    rows, listed = list(rows), list(listed)
    by_id = {one.job_id: one for one in listed}
    lost = [row.number for row in rows if row.job_id is not None and not _is_kept(row, by_id.get(row.job_id))]
    doubled = [number for number, count in Counter(one.number for one in listed).items() if count > 1]
    num_completed = sum(one.state == "completed" for one in listed)
    if billed is not None and billed > num_completed:
        doubled.append(-1)
    return Audit(lost=sorted(lost), doubled=sorted(doubled))


def list_jobs(target: Target, run: str, since: float) -> list[Listed]:
    """The jobs of a run that the service has.

    Args:
        target: the service.
        run: its name.
        since: Unix seconds of its beginning; older jobs are not looked at.
    """
    found: list[Listed] = []
    for tenant in target.accounts:
        with _client(target, tenant) as http:
            for job in _jobs(http, since):
                number = number_of(run, job["prompt"])
                if number is not None:
                    state = job["pusa"]["state"]
                    has_video = state == "completed" and _has_video(http, job["id"])
                    found.append(Listed(job_id=job["id"], number=number, state=state, has_video=has_video))
    return found


def read_usage(target: Target) -> Used:
    """What the tenants have used yesterday and today: a difference of two is a run's, over midnight, too."""
    days: list[Mapping[str, Any]] = []
    for tenant in target.accounts:
        with _client(target, tenant) as http:
            days += http.get("/v1/usage", params={"days": 2}).raise_for_status().json()["days"]
    return Used(completed=sum(one["completed"] for one in days), gang_seconds=sum(one["gang_seconds"] for one in days))


def usage_since(target: Target, before: Used) -> Used:
    """What was used since, when the service has written it down."""
    time.sleep(_LEDGER_S)
    after = read_usage(target)
    return Used(completed=after.completed - before.completed, gang_seconds=after.gang_seconds - before.gang_seconds)


def _is_kept(row: Row, listed: Listed | None) -> bool:
    if listed is None or listed.state not in ("completed", "failed", "cancelled"):
        return False
    return listed.has_video or row.outcome != "completed"


def _client(target: Target, tenant: str) -> httpx.Client:
    key = target.keys[tenant]
    headers = {"Authorization": f"Bearer {key}"} if key else None
    transport = httpx.HTTPTransport(retries=2)
    return httpx.Client(base_url=target.url, headers=headers, timeout=_REQUEST_S, transport=transport)


def _jobs(http: httpx.Client, since: float) -> Iterable[dict[str, Any]]:
    after: dict[str, str] = {}
    while True:
        parameters: dict[str, Any] = {"limit": 100, "order": "desc", **after}
        page = http.get("/v1/videos", params=parameters).raise_for_status().json()
        for job in page["data"]:
            if job["created_at"] < since - _CLOCKS_S:
                return
            yield job
        if not page["has_more"]:
            return
        after = {"after": page["last_id"]}


def _has_video(http: httpx.Client, job_id: str) -> bool:
    """Whether it can be downloaded; a redirect to where it lies counts."""
    with http.stream("GET", f"/v1/videos/{job_id}/content", headers={"Range": "bytes=0-0"}) as answer:
        return not answer.is_error
