"""What became of every job, one JSON line each: the record from which the whole report is made."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ALONE, TOGETHER = "alone", "together"
"""Runs of single jobs, and of two at a time, that measure the service: ``jobs-alone.jsonl``."""
Outcome = Literal["completed", "failed", "cancelled", "rejected", "error", "timeout"]
"""``rejected``: refused for load (429). ``error``: no job was made otherwise. ``timeout``: its end was not seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One job; instants are seconds from the beginning of the run."""

    number: int
    tenant: str
    job_class: str
    task: str
    intended_s: float
    """When it was due: latency counts from here, whatever the client was doing then."""
    sent_s: float
    accepted_s: float | None = None
    ended_s: float
    """When its end was seen, whatever it was."""
    outcome: Outcome
    http_status: int | None = None
    code: str | None = None
    """Of the error, in the service's words."""
    job_id: str | None = None
    tries: int = 1
    """How often it was sent, always with one ``Idempotency-Key``."""
    attempt: int = 0
    """How often the service had to begin."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    """As the service tells; ``wait`` is the part of ``denoise`` before the first step."""

    @property
    def latency_s(self) -> float:
        """From the intended arrival to the end."""
        return self.ended_s - self.intended_s

    @property
    def lag_s(self) -> float:
        """How late it was sent: the load generator's own fault."""
        return self.sent_s - self.intended_s

    @property
    def wait_s(self) -> float:
        """For a place on a gang, when all before it was done."""
        return self.stage_seconds.get("wait", 0.0)

    @property
    def service_s(self) -> float:
        """In the stages of the last attempt, one after the other, without that wait."""
        return sum(seconds for stage, seconds in self.stage_seconds.items() if stage != "wait") - self.wait_s

    @property
    def rest_s(self) -> float:
        """What is left of the latency: HTTP, the queue before the first stage, and attempts that were lost."""
        return max(0.0, self.latency_s - self.wait_s - self.service_s)


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Keep rows as JSONL."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in rows))


def read_rows(path: Path) -> list[Row]:
    """Rows that were kept."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return [Row(**one) for one in lines]
