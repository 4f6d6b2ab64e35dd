import pytest
import torch

from pusa_dist.conditioning import initial_latents, initial_noise
from pusa_dist.request import Conditioning

ONE = torch.tensor(1.0)


def entry(position, multiplier):
    return Conditioning(input=0, position=position, noise_multiplier=multiplier)


def test_noise_depends_on_the_seed_alone():
    assert torch.equal(initial_noise((4, 3, 2, 2), 7), initial_noise((4, 3, 2, 2), 7))
    assert not torch.equal(initial_noise((4, 3, 2, 2), 7), initial_noise((4, 3, 2, 2), 8))
    initial_noise((4, 1, 2, 2), 2**63 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clean_frame_is_pasted_bit_for_bit_and_free_frames_stay_noise(dtype):
    noise, given = initial_noise((4, 3, 2, 2), 0), torch.randn(4, 1, 2, 2)
    latents = initial_latents(noise, given, [entry(1, 0.0)], ONE, dtype)
    assert torch.equal(latents[:, 1], given[:, 0].to(dtype))
    assert torch.equal(latents[:, [0, 2]], noise[:, [0, 2]].to(dtype))


def test_a_noisy_frame_is_a_linear_mix_with_the_same_noise():
    noise, given = initial_noise((4, 3, 2, 2), 0), torch.randn(4, 2, 2, 2)
    latents = initial_latents(noise, given, [entry(2, 0.3), entry(0, 1.0)], ONE, torch.float32)
    torch.testing.assert_close(latents[:, 2], 0.7 * given[:, 0] + 0.3 * noise[:, 2])
    assert torch.equal(latents[:, 0], noise[:, 0])


def test_a_mix_in_bf16_is_computed_in_float32_and_rounded_once():
    noise, given = initial_noise((4, 1, 8, 8), 0), torch.randn(4, 1, 8, 8)
    latents = initial_latents(noise, given, [entry(0, 0.3)], ONE, torch.bfloat16)
    share = ONE * 0.3
    expected = ((1 - share) * given.bfloat16().float() + share * noise.bfloat16().float()).bfloat16()
    assert torch.equal(latents, expected)


def test_the_inputs_are_left_as_they_were():
    noise, given = initial_noise((4, 2, 2, 2), 0), torch.randn(4, 1, 2, 2)
    before = noise.clone(), given.clone()
    initial_latents(noise, given, [entry(0, 0.2)], ONE, torch.float32)
    assert torch.equal(noise, before[0])
    assert torch.equal(given, before[1])


@pytest.mark.parametrize("given", [None, torch.zeros(4, 2, 2, 2), torch.zeros(4, 1, 2, 3)])
def test_given_latents_that_do_not_fit_the_entries_are_refused(given):
    with pytest.raises(ValueError, match="given latents are"):
        initial_latents(torch.zeros(4, 3, 2, 2), given, [entry(0, 0.2)], ONE, torch.float32)
