"""A scenario against the real service, over HTTP: tenants with keys of their own, and what each was seen to get.

Everything is read through the public API: a job's events say when it ended, its ``stage_seconds`` where
the time went, and ``GET /v1/usage`` what was delivered to whom.
"""

import asyncio
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from cluster.fairness.outcome import Delivery, Observation, Outcome
from cluster.fairness.scenario import Scenario, Stream, Video
from cluster.local_service import running_service, serve_command

SETTINGS: Mapping[str, Any] = {
    "require_keys": True,
    "max_event_streams": 400,
    # One rank: a core for the steps, the other for all else, so that a job is not slower only for being watched.
    "denoiser": {"num_replicas": 1, "ulysses_degree": 1},
}
IDLE_ROUNDS = 3
JOB_TIMEOUT_S = 600.0
USAGE_EVERY_S = 0.5
_ROLES = {"text": "text encoder", "wait": "denoiser", "decode": "VAE"}
_BACKLOG_SCALE = 1 / 2
"""Sides of a video in a scenario of backlogs, where only sums matter: the whole takes minutes, not an hour."""
_BACKLOG_STEPS = 5
"""Times as many steps there, so that the gang is what the jobs wait for: its shares say nothing while it waits for a
VAE, which is shared by what decoding costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """A completed job; instants are of ``time.monotonic``."""

    asked_at: float
    ended_at: float
    seconds: Mapping[str, float]

    @property
    def latency_s(self) -> float:
        return self.ended_at - self.asked_at


@contextmanager
def real_service(tenants: Iterable[str]) -> Iterator["RealService"]:
    """Start a service of one gang that these tenants have keys of, and stop it at the end."""
    with tempfile.TemporaryDirectory(prefix="pusa-fair-") as folder:
        state = Path(folder) / "state"
        keys = {tenant: serve_command(state, "keys", "create", tenant).splitlines()[-1] for tenant in tenants}
        headers = _headers(next(iter(keys.values())))
        with running_service("debug", state, settings=SETTINGS, headers=headers) as service:
            yield RealService(service.url, state, keys)


@dataclass(slots=True)
class RealService:
    """Runs scenarios on a service that asks for keys, one after the other; see ``real_service``."""

    url: str
    state: Path
    keys: Mapping[str, str]
    _idle: dict[Video, list[_Done]] = field(default_factory=dict)

    def observe(self, scenario: Scenario) -> Observation:
        """Run a scenario; see ``cluster.fairness.virtual_run.observe``."""
        for tenant, weight in scenario.weights.items():
            serve_command(self.state, "tenants", "set", tenant, "--weight", str(weight))
        return asyncio.run(self._observe(_scaled(scenario)))

    async def _observe(self, scenario: Scenario) -> Observation:
        async with AsyncExitStack() as stack:
            clients = {
                tenant: await stack.enter_async_context(_client(self.url, self.keys[tenant]))
                for tenant in scenario.weights
            }
            for stream in scenario.streams:
                if stream.video not in self._idle:
                    await make(clients[stream.tenant], stream.video)  # the first of a shape is slow
                    rounds = [await make(clients[stream.tenant], stream.video) for _ in range(IDLE_ROUNDS)]
                    self._idle[stream.video] = rounds
            idle = {one.tenant: self._idle[one.video] for one in scenario.streams}
            idle_s = {tenant: median(one.latency_s for one in rounds) for tenant, rounds in idle.items()}
            began = time.monotonic()
            deliveries: list[Delivery] = []
            watching = asyncio.create_task(_watch_usage(clients, began, deliveries))
            jobs = await _run_streams(clients, scenario.streams, idle_s, began)
            watching.cancel()
            await asyncio.wait([watching])
            if not watching.cancelled():
                watching.result()  # it has failed: what was delivered is not known
        return _observation(scenario, jobs, deliveries, idle, began)


async def make(client: httpx.AsyncClient, video: Video) -> _Done:
    """Ask for a video and follow its events to its end.

    Raises:
        RuntimeError: it was refused or did not complete.
    """
    asked_at = time.monotonic()
    pusa = {"num_frames": video.num_frames, "num_inference_steps": video.num_steps, "seed": 1}
    order = {"prompt": "a red square moves right", "size": f"{video.width}x{video.height}", "pusa": pusa}
    created = await client.post("/v1/videos", json=order)
    if created.is_error:
        raise RuntimeError(f"the service refused a job: {created.status_code} {created.text}")
    job_id = created.json()["id"]
    try:
        async with asyncio.timeout(JOB_TIMEOUT_S):
            await _end_of(client, job_id)
    except TimeoutError as error:
        raise RuntimeError(f"job {job_id} did not end within {JOB_TIMEOUT_S:g} s") from error
    ended_at = time.monotonic()
    job = (await client.get(f"/v1/videos/{job_id}")).raise_for_status().json()
    if job["status"] != "completed":
        raise RuntimeError(f"job {job_id} ended as {job['status']}: {job['error']}")
    return _Done(asked_at=asked_at, ended_at=ended_at, seconds=job["pusa"]["stage_seconds"])


async def _end_of(client: httpx.AsyncClient, job_id: str) -> None:
    async with client.stream("GET", f"/v1/videos/{job_id}/events") as events:
        events.raise_for_status()
        async for line in events.aiter_lines():
            if line.startswith("data:") and json.loads(line[5:]).get("state") not in (None, "queued", "in_progress"):
                return
    raise RuntimeError(f"the events of job {job_id} ended before the job did")


async def _run_streams(
    clients: Mapping[str, httpx.AsyncClient], streams: Sequence[Stream], idle_s: Mapping[str, float], began: float
) -> dict[str, list[_Done]]:
    """Every tenant's completed jobs; where some come one by one, the backlog ends with the last of those."""
    jobs: dict[str, list[_Done]] = {one.tenant: [] for one in streams}

    async def one(stream: Stream, at: float) -> None:
        await asyncio.sleep(began + at - time.monotonic())
        jobs[stream.tenant].append(await make(clients[stream.tenant], stream.video))

    async with asyncio.TaskGroup() as group:
        tasks = {
            stream: [group.create_task(one(stream, at)) for at in stream.times(idle_s[stream.tenant])]
            for stream in streams
        }
        rare = [task for stream, several in tasks.items() if stream.every for task in several]
        if rare:
            await asyncio.gather(*rare)
            for stream in streams:
                if not stream.every:
                    for task in tasks[stream]:
                        task.cancel()
                    await _cancel_all(clients[stream.tenant])
    return jobs


async def _cancel_all(client: httpx.AsyncClient) -> None:
    page = (await client.get("/v1/videos", params={"limit": 100})).raise_for_status().json()
    for job in page["data"]:
        if job["status"] in ("queued", "in_progress"):
            await client.post(f"/v1/videos/{job['id']}/cancel")  # 409: it has just ended


async def _watch_usage(clients: Mapping[str, httpx.AsyncClient], began: float, found: list[Delivery]) -> None:
    last: dict[str, float] = {}
    while True:
        answers = await asyncio.gather(*(client.get("/v1/usage", params={"days": 2}) for client in clients.values()))
        at = time.monotonic() - began
        for tenant, answer in zip(clients, answers, strict=True):
            total = sum(day["gang_seconds"] for day in answer.raise_for_status().json()["days"])
            found.append(Delivery(at=at, tenant=tenant, cost=total - last.get(tenant, total)))
            last[tenant] = total
        await asyncio.sleep(USAGE_EVERY_S)


def _observation(
    scenario: Scenario,
    jobs: Mapping[str, Sequence[_Done]],
    deliveries: Sequence[Delivery],
    idle: Mapping[str, Sequence[_Done]],
    began: float,
) -> Observation:
    steps = {one.tenant: one.video.num_steps for one in scenario.streams}
    return Observation(
        outcomes=[_outcome(tenant, one, idle[tenant], began) for tenant, several in jobs.items() for one in several],
        deliveries=deliveries,
        idle_s={tenant: median(one.latency_s for one in rounds) for tenant, rounds in idle.items()},
        # As they were in the run: what else the machine did made them longer.
        step_s={tenant: median(map(_steps_s, several)) / steps[tenant] for tenant, several in jobs.items()},
    )


def _outcome(tenant: str, job: _Done, idle: Sequence[_Done], began: float) -> Outcome:
    ended_at = job.ended_at - began
    denoised_at = ended_at - job.seconds["decode"]
    ready_at = denoised_at - job.seconds["denoise"]
    usual = {stage: median(one.seconds[stage] for one in idle) for stage in _ROLES}
    usual["wait"] = 0.0
    return Outcome(
        tenant=tenant,
        asked_at=job.asked_at - began,
        ready_at=ready_at,
        began_at=ready_at + job.seconds["wait"],
        denoised_at=denoised_at,
        ended_at=ended_at,
        waits={role: max(0.0, job.seconds[stage] - usual[stage]) for stage, role in _ROLES.items()},
    )


def _steps_s(job: _Done) -> float:
    return job.seconds["denoise"] - job.seconds["wait"]


def _scaled(scenario: Scenario) -> Scenario:
    if any(one.every for one in scenario.streams):
        return scenario
    return replace(scenario, streams=tuple(replace(one, video=_smaller(one.video)) for one in scenario.streams))


def _smaller(video: Video) -> Video:
    width, height = (round(side * _BACKLOG_SCALE / 16) * 16 for side in (video.width, video.height))
    return replace(video, width=width, height=height, num_steps=_BACKLOG_STEPS * video.num_steps)


def _client(url: str, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    timeout = httpx.Timeout(60.0, read=None)
    return httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=timeout, limits=limits)


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}
