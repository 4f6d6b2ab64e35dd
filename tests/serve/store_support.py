"""What the tests of the store share: a clock that is set by hand, and jobs."""

from typing import Any

from sqlalchemy import update

from pusa_dist.request import Conditioning, GenerationRequest
from serve.store.jobs import Job, JobStore, StoredInput, new_job_id
from serve.store.tables import jobs

LEASE_S = 10.0


class Clock:
    """Unix seconds, set by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def new_job(tenant: str = "a", created_at: float = 1_000.0, **values: Any) -> Job:
    """A job of 96 tokens in two latent frames' time and four steps, with one input."""
    request = GenerationRequest(
        model="debug",
        prompt="a cat \u732b",
        negative_prompt="",
        width=128,
        height=96,
        num_frames=17,
        fps=8,
        num_inference_steps=4,
        guidance_scale=5.0,
        shift=5.0,
        seed=2**63 - 1,
        lora_alpha={"main": 1.4},
        conditioning=(Conditioning(input=0, position=0, noise_multiplier=0.2),),
    )
    job_id = new_job_id(created_at)
    stored = StoredInput(key=f"jobs/{job_id}/inputs/0", kind="image", width=4, height=3, num_frames=1)
    defaults: dict[str, Any] = {
        "id": job_id,
        "tenant": tenant,
        "model": "debug",
        "revision": "1",
        "request": request,
        "inputs": (stored,),
        "num_steps": 4,
        "created_at": created_at,
    }
    return Job(**{**defaults, **values})


def created(store: JobStore, tenant: str = "a", **values: Any) -> Job:
    """A job that is queued."""
    job = new_job(tenant, **values)
    store.create(job)
    return job


def claimed(store: JobStore, tenant: str = "a", owner: str = "me", **values: Any) -> Job:
    """A job whose first attempt is in progress."""
    running = store.claim(created(store, tenant, **values).id, owner, LEASE_S)
    assert running is not None
    return running


def job_of(store: JobStore, job: Job) -> Job:
    """The job as it is now."""
    found = store.get(job.tenant, job.id)
    assert found is not None
    return found


def made_by_another_version(store: JobStore, job_id: str, **values: Any) -> None:
    """Have the job's row say what this version cannot read."""
    foreign = {"request": {"of": "another version"}, **values}
    with store._engine.begin() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(foreign))
