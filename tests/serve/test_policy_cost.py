import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.policy.cost import StepShape, charge, job_cost, observed, step_seconds
from serve.policy.step_deadline import deadline

SMALL = StepShape(num_tokens=100, uses_guidance=False)
SMALL_GUIDED = StepShape(num_tokens=100, uses_guidance=True)
LARGE = StepShape(num_tokens=60_000, uses_guidance=False)

shapes = st.builds(StepShape, num_tokens=st.integers(1, 200_000), uses_guidance=st.booleans())
measurements = st.dictionaries(shapes, st.floats(0.01, 100.0), max_size=4)


@pytest.mark.parametrize(
    ("shape", "measured", "expected"),
    [
        (SMALL, {SMALL: 2.0, LARGE: 9.0}, 2.0),  # measured
        (SMALL_GUIDED, {SMALL: 2.0}, 4.0),  # both branches
        (SMALL, {SMALL_GUIDED: 4.0}, 2.0),
        # Linear and quadratic in tokens: equal parts at 30,000.
        (LARGE, {StepShape(num_tokens=30_000, uses_guidance=False): 2.0}, 6.0),
        # From the most similar one: what a tiny step wastes says nothing of a large one.
        (
            StepShape(num_tokens=200, uses_guidance=False),
            {SMALL: 2.0, LARGE: 600.0},
            2 * 2.0 * (1 + 2 / 300) / (1 + 1 / 300),
        ),
    ],
)
def test_a_step_is_predicted_from_what_was_measured(shape, measured, expected):
    assert step_seconds(shape, measured) == pytest.approx(expected)


def test_without_any_measurement_larger_shapes_cost_more():
    assert 0 < step_seconds(SMALL, {}) < step_seconds(SMALL_GUIDED, {}) < step_seconds(LARGE, {})


def test_the_cost_of_a_job_is_that_of_the_steps_it_still_needs():
    assert job_cost(SMALL, 7, {SMALL: 2.0}) == 14.0
    assert job_cost(SMALL, 0, {SMALL: 2.0}) == 0.0


@settings(max_examples=50)
@given(shape=shapes, measured=measurements, seconds=st.floats(0.001, 1000.0))
def test_nobody_is_charged_more_than_a_step_took_or_than_was_predicted(shape, measured, seconds):
    price = charge(shape, seconds, measured)
    assert price > 0
    if shape in measured:
        assert price == measured[shape]  # whichever gang it ran on
    else:
        assert price <= seconds
        if measured:
            assert price <= step_seconds(shape, measured)


def test_measured_step_times_fall_at_once_and_rise_slowly():
    assert observed(8.0, None) == 8.0
    assert observed(2.0, 8.0) == 2.0
    assert observed(3.0, 2.0) == pytest.approx(2.3)


@pytest.mark.parametrize(
    ("shape", "measured", "expected"),
    [
        (SMALL, {}, 10 + 60),  # nothing is known: the floor and the allowance
        (SMALL, {SMALL: 1.0}, 10),  # the floor
        (SMALL, {SMALL: 4.0}, 20),  # five times the prediction, no allowance once it has run
        (SMALL_GUIDED, {SMALL: 4.0}, 40 + 60),  # two branches
        (StepShape(num_tokens=300, uses_guidance=False), {SMALL: 4.0}, 5 * 4 * 9 + 60),  # attention at its worst
        (SMALL, {LARGE: 4.0}, 20 + 60),  # never shorter than what a larger shape took
    ],
)
def test_a_step_is_late_after_five_times_its_prediction(shape, measured, expected):
    assert deadline(shape, measured, floor_s=10, allowance_s=60) == pytest.approx(expected)


@settings(max_examples=50)
@given(shape=shapes, measured=measurements)
def test_a_deadline_is_never_shorter_than_the_step_is_predicted_to_take(shape, measured):
    if measured:
        assert deadline(shape, measured, floor_s=0.0, allowance_s=0.0) >= step_seconds(shape, measured)
