"""Finding a tenant's job: what is another tenant's, what never was and what cannot be an id all look alike."""

import re

from serve.http.errors import video_not_found
from serve.store.jobs import JOB_ID_PATTERN, Job, JobStore


def find_job(store: JobStore, tenant: str, video_id: str) -> Job:
    """A tenant's job.

    Raises:
        ServeError: 404, it does not exist.
    """
    check_id(video_id)
    return found(store.get(tenant, video_id), video_id)


def check_id(video_id: str) -> None:
    """What cannot be an id is not looked up: a database may refuse some characters altogether.

    Raises:
        ServeError: 404.
    """
    if not re.fullmatch(JOB_ID_PATTERN, video_id):
        raise video_not_found(video_id)


def found(job: Job | None, video_id: str) -> Job:
    """The job, if there is one.

    Raises:
        ServeError: 404.
    """
    if job is None:
        raise video_not_found(video_id)
    return job
