"""What the service has written down of the jobs, read beside it: its database, read-only, and its files.

The API does not tell how many steps ran; these figures are the operator's, from the store itself.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_COLUMNS = "idempotency_key, id, status, stage, step, num_steps, steps_run, attempt, gang_deaths, lease_until"
_STATE_FILES = {"artifacts", "jobs.sqlite", "jobs.sqlite-shm", "jobs.sqlite-wal", "service.log"}


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job's row."""

    idempotency_key: str
    id: str
    status: str
    stage: str | None
    step: int
    num_steps: int
    steps_run: int
    attempt: int
    gang_deaths: int
    lease_until: float | None

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.status not in ("queued", "in_progress")

    def lease_s(self) -> float:
        """Seconds for which somebody still answers for it; infinite for a job that nobody needs to."""
        if self.status != "in_progress" or self.lease_until is None:
            return float("inf")
        return self.lease_until - time.time()


def read_jobs(state: Path, run: str) -> dict[str, JobRecord]:
    """Jobs of a run, by ``Idempotency-Key``."""
    query = f"SELECT {_COLUMNS} FROM jobs WHERE idempotency_key LIKE ? ORDER BY idempotency_key"
    return {row["idempotency_key"]: JobRecord(**row) for row in _rows(state, query, f"{run}-%")}


def count_completions(state: Path) -> int:
    """How often any job was completed, as the tenants' usage has it: counted where a result is published."""
    (row,) = _rows(state, "SELECT COALESCE(SUM(completed), 0) AS completed FROM usage")
    return int(row["completed"])


def stray_files(state: Path) -> list[str]:
    """Files that no job publishes: checkpoints, files of dead attempts, half written ones, anything else."""
    kept = {"database"}
    for row in _rows(state, "SELECT inputs, results, preview_key FROM jobs"):
        kept |= {one["key"] for one in json.loads(row["inputs"])}
        kept |= {one["key"] for one in json.loads(row["results"]).values()}
        kept |= {row["preview_key"]}
    artifacts = state / "artifacts"
    stored = (str(path.relative_to(artifacts)) for path in artifacts.rglob("*") if path.is_file())
    beside = (path.name for path in state.iterdir())
    return sorted({*(set(stored) - kept), *(set(beside) - _STATE_FILES)})


def _rows(state: Path, query: str, *values: Any) -> Iterator[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{state / 'jobs.sqlite'}?mode=ro", uri=True, timeout=20)) as connection:
        connection.row_factory = sqlite3.Row
        yield from (dict(row) for row in connection.execute(query, values).fetchall())
