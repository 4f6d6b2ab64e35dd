"""What a tenant may ask for: its limits, what it uses of them, and why a job is refused."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

_QUEUE_RETRY_S = 10
_DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """A tenant's limits; None is no limit."""

    requests_per_minute: int | None = None
    """Jobs asked for in a minute of the clock, accepted or not."""
    max_queued: int | None = None
    """Jobs that wait."""
    max_running: int | None = None
    """Jobs in progress at once, whoever runs them. It refuses nothing: the others wait (``JobStore.claim``)."""
    cost_per_day: float | None = None
    """Gang-seconds in a UTC day."""
    max_tokens: int | None = None
    """Tokens of one forward: the largest shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What a tenant uses of its quota, without the job that it asks for now."""

    requests: int
    """Asked for in this minute (``minute_of``)."""
    queued: int
    """Jobs that wait."""
    cost: float
    """Gang-seconds delivered on this day (``day_of``) and predicted to be left of its unfinished jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a job is not accepted: the body and headers of a 429."""

    code: str
    message: str
    retry_after_s: int | None
    """Seconds until it may succeed; None: it never will."""
    should_retry: bool
    """Whether a client should try again by itself."""
    param: str | None
    """The part of the request that is too large, if one is."""


def check(quota: Quota, use: Use, *, cost: float, num_tokens: int, now: float) -> Refusal | None:
    """Why a job is refused; None: it is accepted.

    Args:
        quota: of its tenant.
        use: at the moment the job would be written, in the same transaction.
        cost: predicted gang-seconds of the job.
        num_tokens: of one forward of it.
        now: Unix seconds.
    """
    return (
        _never_fits(quota, cost, num_tokens)
        or _requests(quota.requests_per_minute, use.requests, now)
        or _cost(quota.cost_per_day, use.cost, cost, now)
        or _queued(quota.max_queued, use.queued)
    )


def minute_of(now: float) -> int:
    """The minute of the clock that requests are counted in."""
    return int(now // 60)


def day_of(now: float) -> str:
    """The UTC day that cost is counted in, as ``2026-11-20``."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def _never_fits(quota: Quota, cost: float, num_tokens: int) -> Refusal | None:
    if quota.max_tokens is not None and num_tokens > quota.max_tokens:
        return _never(
            "shape_over_quota",
            f"the video has {num_tokens} tokens and this tenant may use {quota.max_tokens}: "
            "use a smaller size or fewer frames",
            "size",
        )
    if quota.cost_per_day is not None and cost > quota.cost_per_day:
        return _never(
            "cost_over_quota",
            f"the job needs about {cost:.3g} s of a gang and this tenant has {quota.cost_per_day:g} s a day: "
            "use fewer steps, a smaller size or fewer frames",
            "pusa.num_inference_steps",
        )
    if quota.requests_per_minute == 0:
        return _never("rate_limit_exceeded", "this tenant may create no jobs; ask the operator for a quota")
    if quota.max_queued == 0:
        return _never("too_many_queued", "this tenant may queue no jobs; ask the operator for a quota")
    return None


def _requests(limit: int | None, used: int, now: float) -> Refusal | None:
    if limit is None or used < limit:
        return None
    wait = math.floor(60 - now % 60) + 1
    message = f"{limit} requests a minute are allowed; try again in {wait} s"
    return Refusal(code="rate_limit_exceeded", message=message, retry_after_s=wait, should_retry=True, param=None)


def _cost(limit: float | None, used: float, cost: float, now: float) -> Refusal | None:
    if limit is None or used + cost <= limit:
        return None
    wait = math.floor(_DAY_S - now % _DAY_S) + 1
    message = (
        f"the job needs about {cost:.3g} s of a gang and {max(0.0, limit - used):.3g} s of this tenant's {limit:g} s "
        "a day are left; try again after midnight UTC, or with a smaller job"
    )
    return Refusal(code="daily_cost_exceeded", message=message, retry_after_s=wait, should_retry=False, param=None)


def _queued(limit: int | None, used: int) -> Refusal | None:
    if limit is None or used < limit:
        return None
    message = f"{used} jobs are waiting and {limit} may; try again when one has begun, or cancel one"
    return Refusal(code="too_many_queued", message=message, retry_after_s=_QUEUE_RETRY_S, should_retry=True, param=None)


def _never(code: str, message: str, param: str | None = None) -> Refusal:
    return Refusal(code=code, message=message, retry_after_s=None, should_retry=False, param=param)
