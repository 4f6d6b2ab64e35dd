from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.policy.quota import Quota, Use, check, day_of, minute_of

NOON = datetime(2026, 11, 20, 12, 0, 15, tzinfo=UTC).timestamp()
NOTHING = Use(requests=0, queued=0, cost=0.0)


def ask(quota, use=NOTHING, cost=10.0, num_tokens=100):
    return check(quota, use, cost=cost, num_tokens=num_tokens, now=NOON)


def test_no_limits_refuse_nothing():
    assert ask(Quota(), Use(requests=10**6, queued=10**6, cost=1e9), cost=1e9, num_tokens=10**9) is None


@pytest.mark.parametrize(
    ("quota", "use", "cost", "num_tokens", "code", "retry_after_s", "should_retry", "param"),
    [
        (Quota(max_tokens=99), NOTHING, 10.0, 100, "shape_over_quota", None, False, "size"),
        (
            Quota(requests_per_minute=3),
            Use(requests=3, queued=0, cost=0),
            10.0,
            1,
            "rate_limit_exceeded",
            46,
            True,
            None,
        ),
        (Quota(requests_per_minute=0), NOTHING, 10.0, 1, "rate_limit_exceeded", None, False, None),
        (Quota(max_queued=2), Use(requests=0, queued=2, cost=0), 10.0, 1, "too_many_queued", 10, True, None),
        (Quota(max_queued=0), NOTHING, 10.0, 1, "too_many_queued", None, False, None),
        (
            Quota(cost_per_day=100),
            Use(requests=0, queued=0, cost=95),
            10.0,
            1,
            "daily_cost_exceeded",
            43_186,
            False,
            None,
        ),
        (Quota(cost_per_day=9), NOTHING, 10.0, 1, "cost_over_quota", None, False, "pusa.num_inference_steps"),
    ],
)
def test_over_a_limit(quota, use, cost, num_tokens, code, retry_after_s, should_retry, param):
    refusal = ask(quota, use, cost, num_tokens)
    assert (refusal.code, refusal.retry_after_s, refusal.should_retry, refusal.param) == (
        code,
        retry_after_s,
        should_retry,
        param,
    )


@pytest.mark.parametrize(
    ("quota", "use"),
    [
        (Quota(max_tokens=100), NOTHING),
        (Quota(requests_per_minute=3), Use(requests=2, queued=0, cost=0)),
        (Quota(max_queued=2), Use(requests=0, queued=1, cost=0)),
        (Quota(cost_per_day=100), Use(requests=0, queued=0, cost=90)),
        (Quota(max_running=0), NOTHING),  # bounds what is claimed, refuses nothing
    ],
)
def test_exactly_at_a_limit_is_allowed(quota, use):
    assert ask(quota, use) is None


def test_what_can_never_be_accepted_is_said_first():
    used_up = Use(requests=9, queued=9, cost=99.0)
    everything = Quota(requests_per_minute=1, max_queued=1, cost_per_day=1.0, max_tokens=1)
    assert ask(everything, used_up).code == "shape_over_quota"


def test_minutes_and_days_are_of_the_utc_clock():
    assert minute_of(59.9) == 0
    assert minute_of(60.0) == 1
    assert day_of(NOON) == "2026-11-20"


asked = st.tuples(st.floats(0.0, 40.0), st.floats(0.5, 60.0), st.integers(1, 200))
quotas = st.builds(
    Quota,
    requests_per_minute=st.none() | st.integers(0, 4),
    max_queued=st.none() | st.integers(0, 4),
    cost_per_day=st.none() | st.floats(0.0, 200.0),
    max_tokens=st.none() | st.integers(0, 200),
)


@settings(max_examples=60)
@given(quota=quotas, jobs=st.lists(asked, max_size=30), ends=st.integers(1, 4))
def test_limits_are_never_exceeded_and_retry_after_is_enough(quota, jobs, ends):
    """Requests at random times; every few of them a queued job begins."""
    now, queued, cost_of_day, requests = NOON, 0, {}, {}
    for number, (later, cost, num_tokens) in enumerate(jobs):
        now += later
        minute, day = minute_of(now), day_of(now)
        use = Use(requests=requests.get(minute, 0), queued=queued, cost=cost_of_day.get(day, 0.0))
        refusal = check(quota, use, cost=cost, num_tokens=num_tokens, now=now)
        requests[minute] = use.requests + 1
        if refusal is None:
            queued += 1
            cost_of_day[day] = use.cost + cost
            assert quota.max_tokens is None or num_tokens <= quota.max_tokens
            assert quota.requests_per_minute is None or requests[minute] <= quota.requests_per_minute
            assert quota.max_queued is None or queued <= quota.max_queued
            assert quota.cost_per_day is None or cost_of_day[day] <= quota.cost_per_day
        elif refusal.retry_after_s is not None:
            assert refusal.retry_after_s >= 1
            fresh = Use(requests=0, queued=0, cost=0.0)
            later_on = now + refusal.retry_after_s
            assert minute_of(later_on) > minute or refusal.code not in ("rate_limit_exceeded",)
            assert day_of(later_on) > day or refusal.code != "daily_cost_exceeded"
            assert check(quota, fresh, cost=cost, num_tokens=num_tokens, now=later_on) is None
        else:
            assert not refusal.should_retry
        if number % ends == 0:
            queued = max(0, queued - 1)
