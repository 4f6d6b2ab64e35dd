import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pusa_dist.schedule import expert_index, shifted_sigmas, step_tables


def test_ten_steps_at_shift_five_have_the_published_timesteps():
    expected = [1000, 978.26, 952.38, 921.05, 882.35, 833.33, 769.23, 681.82, 555.56, 357.14, 0]
    torch.testing.assert_close(shifted_sigmas(10, 5.0) * 1000, torch.tensor(expected), rtol=0, atol=0.006)


def test_free_frames_all_follow_the_scalar_schedule():
    tables = step_tables(7, 3.0, 4, {}, "fp32")
    sigmas = shifted_sigmas(7, 3.0)
    for frame in range(4):
        assert torch.equal(tables.sigma[:, frame], sigmas[:-1])
        assert torch.equal(tables.sigma_next[:, frame], sigmas[1:])
        assert torch.equal(tables.model_timesteps[:, frame], sigmas[:-1] * 1000)


def test_text_to_video_keeps_fractions_and_conditioning_truncates_every_frame():
    free = step_tables(10, 5.0, 3, {}, "fp32").model_timesteps
    conditioned = step_tables(10, 5.0, 3, {0: 0.2}, "fp32").model_timesteps
    assert (free != free.trunc()).any()
    assert torch.equal(conditioned, conditioned.trunc())
    assert torch.equal(conditioned[:, 1], free[:, 1].trunc())


@pytest.mark.parametrize(
    ("precision", "row"),
    [
        ("bf16", [200, 196, 190, 184, 177, 166, 154, 136, 111, 71]),
        ("fp32", [200, 195, 190, 184, 176, 166, 153, 136, 111, 71]),
    ],
)
def test_precision_decides_the_integers_the_model_is_fed(precision, row):
    tables = step_tables(10, 5.0, 5, {0: 0.2}, precision)
    assert tables.model_timesteps[:, 0].tolist() == row
    # Sigma itself is never rounded.
    torch.testing.assert_close(tables.sigma[:, 0], shifted_sigmas(10, 5.0)[:-1] * 0.2)


def test_bf16_timesteps_of_text_to_video_are_rounded_and_not_truncated():
    timesteps = step_tables(4, 5.0, 2, {}, "bf16").model_timesteps[:, 0]
    assert timesteps.tolist() == [1000, 936, 832, 624]


def test_the_product_is_truncated_in_the_order_of_the_public_code():
    # 833.333 * 0.9 is 750 in exact arithmetic and just below it in float32.
    assert step_tables(4, 5.0, 2, {1: 0.9}, "fp32").model_timesteps[2, 1] == 749


def test_a_given_frame_with_multiplier_zero_never_moves():
    tables = step_tables(10, 5.0, 5, {2: 0.0}, "bf16")
    for table in (tables.sigma, tables.sigma_next, tables.model_timesteps):
        assert (table[:, 2] == 0).all()


def test_multiplier_one_moves_like_a_free_frame():
    tables = step_tables(10, 5.0, 2, {0: 1.0}, "fp32")
    for table in (tables.sigma, tables.sigma_next, tables.model_timesteps):
        assert torch.equal(table[:, 0], table[:, 1])


def test_a_frame_whose_timestep_truncates_to_zero_is_frozen_in_that_step_only():
    tables = step_tables(10, 5.0, 2, {0: 0.0015}, "fp32")
    fed = tables.model_timesteps[:, 0]
    assert fed.tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    assert (tables.sigma[fed == 0, 0] == 0).all()
    assert (tables.sigma_next[fed == 0, 0] == 0).all()
    assert (tables.sigma[fed > 0, 0] > 0).all()


def test_all_frames_given_still_follow_the_loops_own_sigma():
    # The public code looks sigma up from the largest scaled timestep, which repeats indices.
    tables = step_tables(10, 5.0, 3, {0: 0.2, 1: 0.5, 2: 0.3}, "fp32")
    sigmas = shifted_sigmas(10, 5.0)
    for frame, multiplier in enumerate((0.2, 0.5, 0.3)):
        torch.testing.assert_close(tables.sigma[:, frame], sigmas[:-1] * multiplier)
        torch.testing.assert_close(tables.sigma_next[:, frame], sigmas[1:] * multiplier)


def test_many_bf16_steps_use_the_loop_index_where_a_lookup_would_pick_a_neighbour():
    sigmas = shifted_sigmas(90, 5.0)
    rounded = (sigmas[:-1] * 1000).bfloat16().float()
    looked_up = (rounded[:, None] - sigmas[:-1][None] * 1000).abs().argmin(1)
    assert (looked_up != torch.arange(90)).any()
    assert torch.equal(step_tables(90, 5.0, 2, {}, "bf16").sigma[:, 0], sigmas[:-1])


@settings(max_examples=40)
@given(
    steps=st.integers(1, 50),
    shift=st.floats(0.1, 100.0),
    multipliers=st.dictionaries(st.integers(0, 5), st.floats(0.0, 1.0), max_size=6),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_tables_never_add_noise_and_free_frames_end_clean(steps, shift, multipliers, precision):
    tables = step_tables(steps, shift, 6, multipliers, precision)
    assert tables.num_steps == steps
    assert (tables.sigma_next <= tables.sigma).all()
    assert ((tables.sigma >= 0) & (tables.sigma <= 1.000001)).all()
    assert ((tables.model_timesteps >= 0) & (tables.model_timesteps <= 1000.001)).all()
    for frame in set(range(6)) - set(multipliers):
        assert tables.sigma_next[-1, frame] == 0
        torch.testing.assert_close(tables.sigma[1:, frame], tables.sigma_next[:-1, frame], rtol=0, atol=0)


def test_experts_go_from_high_to_low_noise_at_the_boundary():
    assert expert_index(4, 5.0, 0.875) == (0, 0, 1, 1)
    assert expert_index(10, 5.0, 0.875) == (0,) * 5 + (1,) * 5
    assert expert_index(30, 5.0, 0.875) == (0,) * 13 + (1,) * 17


def test_a_timestep_on_the_boundary_still_belongs_to_the_high_noise_expert():
    assert (shifted_sigmas(4, 1.0)[1] * 1000).item() == 750.0
    assert expert_index(4, 1.0, 0.75) == (0, 0, 1, 1)
