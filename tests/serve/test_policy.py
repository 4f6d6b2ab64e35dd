import pytest

from serve.policy.order import Waiting, in_order
from serve.policy.step_deadline import StepShape, deadline, observed
from serve.policy.steps import Resident, next_step

SMALL = StepShape(num_tokens=100, uses_guidance=False)
SMALL_GUIDED = StepShape(num_tokens=100, uses_guidance=True)
LARGE = StepShape(num_tokens=300, uses_guidance=False)


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([], []),
        ([("a", "interactive", 2.0), ("b", "interactive", 1.0)], ["b", "a"]),
        ([("a", "batch", 1.0), ("b", "interactive", 2.0)], ["b", "a"]),
        ([("b", "batch", 1.0), ("a", "batch", 1.0)], ["a", "b"]),
    ],
)
def test_jobs_run_by_priority_then_by_age(waiting, expected):
    jobs = [Waiting(id=i, priority=p, created_at=t) for i, p, t in waiting]
    assert in_order(jobs) == expected


def test_the_oldest_resident_runs_to_completion():
    residents = [Resident(job_id="new", arrival=7), Resident(job_id="old", arrival=3)]
    assert next_step(residents) == ("old",)
    assert next_step(residents[:1]) == ("new",)
    assert next_step([]) == ()


@pytest.mark.parametrize(
    ("shape", "measured", "expected"),
    [
        (SMALL, {}, 10 + 60),  # nothing is known: the floor and the allowance
        (SMALL, {SMALL: 1.0}, 10),  # the floor
        (SMALL, {SMALL: 4.0}, 20),  # five times the prediction, no allowance once it has run
        (SMALL_GUIDED, {SMALL: 4.0}, 40 + 60),  # two branches
        (LARGE, {SMALL: 4.0}, 5 * 4 * 9 + 60),  # attention grows with the square
        (SMALL, {LARGE: 4.0}, 20 + 60),  # never shorter than what a larger shape took
    ],
)
def test_a_step_is_late_after_five_times_its_prediction(shape, measured, expected):
    assert deadline(shape, measured, floor_s=10, allowance_s=60) == pytest.approx(expected)


def test_measured_step_times_fall_at_once_and_rise_slowly():
    assert observed(8.0, None) == 8.0
    assert observed(2.0, 8.0) == 2.0
    assert observed(3.0, 2.0) == pytest.approx(2.3)
