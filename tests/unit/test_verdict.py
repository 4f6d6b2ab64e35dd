import math

import pytest
import torch

from pusa_dist.parity.verdict import Check, Tolerance


def tolerance(**stated):
    return Tolerance.parse({"tolerance": stated}, ("sigma", "bf16"))


def test_a_limit_with_a_subject_is_for_that_subject_and_the_others_share_the_plain_one():
    both = tolerance(max_abs=1.0, sigma_max_abs=0.25)
    zero, half = torch.zeros(2), torch.full((2,), 0.5)
    (plain,), (led,) = both.compare("x", half, zero), both.compare("x", half, zero, "sigma")
    assert (plain.measure, plain.limit, plain.passed) == ("max_abs", 1.0, True)
    assert (led.measure, led.limit, led.passed) == ("sigma_max_abs", 0.25, False)
    assert both.compare("x", half, zero, "bf16") == [plain]


@pytest.mark.parametrize(
    ("measure", "ours", "recorded", "value"),
    [
        ("max_abs", [1.0, 2.0], [1.0, 2.5], 0.5),
        ("mean_abs", [1.0, 2.0], [1.0, 2.5], 0.25),
        ("max_rel", [1.0, 2.0], [1.0, 2.5], 0.2),
        ("min_cosine", [1.0, 0.0], [1.0, 1.0], math.sqrt(0.5)),
        ("max_uint8_levels", [3.0, 9.0], [3.0, 7.0], 2.0),
    ],
)
def test_every_measure_measures_what_it_says(measure, ours, recorded, value):
    (check,) = tolerance(**{measure: 0.1}).compare("x", torch.tensor(ours), torch.tensor(recorded))
    assert check.value == pytest.approx(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbouring_floats_are_one_ulp_apart_also_across_zero(dtype):
    tiny = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype)
    one = torch.tensor([1.0, -0.0, -1.0], dtype=dtype)
    above = torch.nextafter(one.float(), torch.tensor(9.0)) if dtype is torch.float32 else None
    compare = tolerance(max_ulp=1).compare
    assert compare("x", one, one)[0].value == 0
    assert compare("x", one * 0, -one * 0)[0].value == 0
    if above is not None:
        assert compare("x", one, above)[0].value == 1
    assert compare("x", tiny.view(1), -tiny.view(1))[0].value > 1


def test_a_cosine_has_a_lower_limit():
    assert Check("min_cosine", "x", 0.9999, 0.999).passed
    assert not Check("min_cosine", "x", 0.99, 0.999).passed


def test_nan_never_passes():
    compare = tolerance(max_abs=1.0, min_cosine=0.9, max_ulp=3).compare
    assert not any(check.passed for check in compare("x", torch.tensor([math.nan]), torch.tensor([1.0])))


def test_what_the_case_calls_informational_is_marked():
    stated = tolerance(max_abs=1.0, tiled_tensors="informational")
    zero = torch.zeros(1)
    assert stated.compare("latents_tiled", zero, zero)[0].informational
    assert not stated.compare("latents", zero, zero)[0].informational
    assert tolerance(max_abs=1.0, informational=True).compare("latents", zero, zero)[0].informational


@pytest.mark.parametrize("stated", [{"colour_max_abs": 1.0}, {"max_colour": 1}, {"max_abs": True}])
def test_a_tolerance_that_is_not_understood_is_refused(stated):
    with pytest.raises(ValueError, match="is not understood"):
        tolerance(**stated)


def test_a_tolerance_must_be_stated_and_shapes_must_agree():
    with pytest.raises(ValueError, match="states no tolerance"):
        Tolerance.parse({})
    with pytest.raises(ValueError, match="no tolerance is stated"):
        tolerance(sigma_max_abs=1.0).compare("x", torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="the recording"):
        tolerance(max_abs=1.0).compare("x", torch.zeros(1), torch.zeros(2))
