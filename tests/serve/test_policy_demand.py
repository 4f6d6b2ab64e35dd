"""What is queued, as a reason to have gangs."""

import pytest

from serve.policy.cost import Backlog
from serve.policy.demand import runnable


def queued(tenant, num, priority="interactive"):
    return Backlog(
        tenant=tenant, status="queued", priority=priority, num=num, cost=10.0 * num, whole=20.0 * num, oldest_s=1.0
    )


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        ({}, {("a", "interactive"): 2, ("a", "batch"): 3, ("b", "batch"): 4}),
        ({"a": 9}, {("a", "interactive"): 2, ("a", "batch"): 3, ("b", "batch"): 4}),
        ({"a": 3}, {("a", "interactive"): 2, ("a", "batch"): 1, ("b", "batch"): 4}),
        ({"a": 1, "b": 0}, {("a", "interactive"): 1}),
    ],
)
def test_what_is_queued_counts_as_far_as_its_tenant_may_run_it(room, expected):
    found = runnable([queued("a", 3, "batch"), queued("a", 2), queued("b", 4, "batch")], room)
    assert {(one.tenant, one.priority): one.num for one in found} == expected
    assert all((one.cost, one.whole) == pytest.approx((10.0 * one.num, 20.0 * one.num)) for one in found)
