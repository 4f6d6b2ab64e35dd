"""Forgetting: what is past its time, what dead attempts left behind, and what belongs to nothing any more.

Files go before the row that names them, so whatever stops half way is found again by its row. Files that
no row names are found by listing the store, once an hour. Any number of processes may sweep at once, and
a bucket that is away delays a sweep and ends nothing.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from sqlalchemy.exc import DBAPIError

from serve.store.artifacts import ArtifactStore, StorageError, job_prefix
from serve.store.jobs import JOB_ID_PATTERN, JobStore

logger = logging.getLogger(__name__)

PERIOD_S = 30.0
ORPHANS_PERIOD_S = 3600.0
ORPHAN_AGE_S = 3600.0
"""A create may take this long between storing its inputs and its row."""
LEFTOVERS_AGE_S = 600.0
"""A stale attempt may go on writing this long after its job has ended."""
DELIVERIES_AGE_S = 30 * 86400.0
"""Webhooks that arrived, or never will, are kept this long for those who ask."""
_PAGE = 200
_MAX_FAILURES = 5
"""Jobs in a row whose files cannot be removed, before the rest of a sweep is left to the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What one sweep did."""

    forgotten: int = 0
    """Jobs removed with their files."""
    tidied: int = 0
    """Ended jobs whose leftovers were looked for."""
    failed: frozenset[str] = frozenset()
    """Jobs whose files could not be removed; they are tried again."""


async def keep_sweeping(
    store: JobStore,
    artifacts: ArtifactStore,
    period_s: float = PERIOD_S,
    clock: Callable[[], float] = time.time,
    leftovers_age_s: float = LEFTOVERS_AGE_S,
) -> None:
    """Sweep again and again until cancelled, whatever fails.

    Args:
        store: of the jobs.
        artifacts: of their files.
        period_s: between the end of one sweep and the next.
        clock: Unix seconds.
        leftovers_age_s: see ``sweep``.

    Jobs whose files could not be removed are left alone until the next hour.
    """
    next_orphans = 0.0
    put_off: frozenset[str] = frozenset()
    while True:
        try:
            swept = await asyncio.to_thread(sweep, store, artifacts, clock(), leftovers_age_s, put_off)
            put_off |= swept.failed
            if time.monotonic() >= next_orphans:
                await asyncio.to_thread(sweep_orphans, store, artifacts, clock())
                next_orphans = time.monotonic() + ORPHANS_PERIOD_S
                put_off = frozenset()
        except (StorageError, DBAPIError) as error:  # it may be back the next time
            logger.warning("the sweep is put off: %s", error)
        except Exception:  # the outermost loop: a bug here must not end the service's own loop
            logger.exception("the sweep failed")
        await asyncio.sleep(period_s)


def sweep(
    store: JobStore,
    artifacts: ArtifactStore,
    now: float,
    leftovers_age_s: float = LEFTOVERS_AGE_S,
    but_not: Collection[str] = (),
) -> Swept:
    """Remove jobs whose time is over, leftovers of jobs that have ended, and old deliveries. Blocks.

    Args:
        store: of the jobs.
        artifacts: of their files.
        now: Unix seconds.
        leftovers_age_s: what dead attempts left is removed this long after their job has ended.
        but_not: jobs whose files could not be removed a moment ago, which must not keep the others' from it.
    """

    def forget(job_id: str) -> None:
        artifacts.delete(job_prefix(job_id))
        store.forget(job_id)

    def tidy(job_id: str) -> None:
        kept = published[job_id]
        if kept is None:
            logger.warning("job %s: its row cannot be read, so all its files are kept until it expires", job_id)
        else:
            artifacts.delete_others(job_prefix(job_id), kept)
        store.mark_swept(job_id)

    forgotten, failures = _each(store.expired_jobs(now, _PAGE, but_not), forget)
    published = {job.id: job.published for job in store.unswept_jobs(now - leftovers_age_s, _PAGE, but_not)}
    tidied, more_failures = _each(published, tidy)
    store.forget_deliveries(now - DELIVERIES_AGE_S)
    if forgotten:
        logger.info("%d jobs were past their time and are forgotten", forgotten)
    return Swept(forgotten=forgotten, tidied=tidied, failed=failures | more_failures)


def remove_unneeded(artifacts: ArtifactStore, job_id: str, *prefixes: str) -> None:
    """Remove files of a job that nobody will need; what cannot be removed now is left to ``sweep``. Blocks.

    Args:
        artifacts: of the job.
        job_id: for the log.
        prefixes: keys of files, or of folders of them.
    """
    for prefix in prefixes:
        try:
            artifacts.delete(prefix)
        except StorageError as error:
            logger.warning("job %s: files that nobody needs cannot be removed now: %s", job_id, error)


def sweep_orphans(store: JobStore, artifacts: ArtifactStore, now: float) -> int:
    """Remove the files of jobs that the database does not know, if they are older than an hour. Blocks.

    Nothing is removed where the files belong to another database (see ``is_ours``).

    Returns:
        Jobs whose files were removed.
    """
    job_ids = artifacts.jobs()
    if not is_ours(store, artifacts, job_ids):
        logger.error(
            "the artifact store holds files of another database, and none of them is swept; "
            "give every database an artifacts_url of its own"
        )
        return 0
    old = (job_id for job_id in job_ids if _age(job_id, now) > ORPHAN_AGE_S)
    removed = 0
    for page in _pages(old):
        for job_id in sorted(set(page) - store.known(page)):
            artifacts.delete(job_prefix(job_id))
            removed += 1
    if removed:
        logger.info("files of %d jobs that do not exist are removed", removed)
    return removed


def is_ours(store: JobStore, artifacts: ArtifactStore, job_ids: list[str]) -> bool:
    """Whether the files are this database's.

    Where nobody has said so yet, it is said, unless there are files and the database knows none of them: then
    it is probably new, and these are all that is left of another.

    Args:
        store: of the jobs.
        artifacts: of their files.
        job_ids: that have files.
    """
    owner = artifacts.owner()
    if owner is not None:
        return owner == store.identity()
    if job_ids and not any(store.known(page) for page in _pages(iter(job_ids))):
        return False
    artifacts.own(store.identity())
    return True


def _each(job_ids: Iterable[str], do: Callable[[str], None]) -> tuple[int, frozenset[str]]:
    """Do it to each job; returns for how many it worked, and for which it did not."""
    done = in_a_row = 0
    failed = set[str]()
    for job_id in job_ids:
        try:
            do(job_id)
        except StorageError as error:
            logger.warning("files of job %s cannot be removed now: %s", job_id, error)
            failed.add(job_id)
            in_a_row += 1
            if in_a_row == _MAX_FAILURES:
                break
        else:
            done, in_a_row = done + 1, 0
    return done, frozenset(failed)


def _pages(job_ids: Iterator[str]) -> Iterator[list[str]]:
    while page := list(islice(job_ids, _PAGE)):
        yield page


def _age(job_id: str, now: float) -> float:
    """Seconds since the id was made; negative for what is no id of ours, which is left alone."""
    match = re.match(JOB_ID_PATTERN, job_id)
    return now - int(job_id[6:20], 16) / 1e6 if match else -1.0
