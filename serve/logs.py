"""How every process of the service writes its log: a line an event, for people or for machines.

What a line is about (job, tenant, request) is set where the work on it begins and travels with the task,
so that no call in between has to pass it on. What is secret never comes here: prompts, keys and URLs are
kept out of the messages themselves.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["text", "json"]

_LOGGERS = ("serve", "pusa_dist")
_NOTHING: Mapping[str, str] = {}
# asyncio and anyio copy the context into every task and thread that they start.
_ABOUT: ContextVar[Mapping[str, str]] = ContextVar("about", default=_NOTHING)


@contextmanager
def about(**facts: str) -> Iterator[None]:
    """Lines that are written inside, and in tasks that are started inside, carry these facts."""
    token = _ABOUT.set({**_ABOUT.get(), **facts})
    try:
        yield
    finally:
        _ABOUT.reset(token)


@dataclass(frozen=True, slots=True)
class Logs:
    """How a process writes its log, and what it is; sent to it by whoever starts it."""

    format: LogFormat = "text"
    process: Mapping[str, str | int] = field(default_factory=dict)
    """In every line: role, gang, rank."""

    def of(self, **process: str | int) -> "Logs":
        """The same for a process that is more."""
        return replace(self, process={**self.process, **process})

    def configure(self) -> None:
        """Write this process's log to its standard error, from INFO on; Ray's own lines stay as they are."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines(self.process) if self.format == "json" else TextLines(self.process))
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.handlers[:] = [handler]
            logger.setLevel(logging.INFO)
            logger.propagate = False


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, process: Mapping[str, str | int]) -> None:
        super().__init__()
        self._process = dict(process)

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **self._process,
            **_ABOUT.get(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """Time, level, who says it, and what; messages name their job themselves."""

    def __init__(self, process: Mapping[str, str | int]) -> None:
        who = " ".join(str(value) if key == "role" else f"{key} {value}" for key, value in process.items())
        super().__init__(f"%(asctime)s %(levelname)s {who.replace('%', '%%')}: %(message)s")
