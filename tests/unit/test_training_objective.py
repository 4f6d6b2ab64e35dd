import pytest
import torch

from pusa_dist.checkpoint.seeded import seeded_normal
from pusa_dist.schedule import shifted_sigmas, training_weights
from pusa_dist.training.objective import (
    NUM_TIMESTEPS,
    TrainingSchedule,
    draw,
    draw_indices,
    lesson,
    loss,
    sample_generator,
)

SHAPE = (3, 4, 5, 2, 6)


def example(indices=None, precision="fp32"):
    latents, noise = seeded_normal(SHAPE, 1, "latents"), seeded_normal(SHAPE, 1, "noise")
    indices = torch.arange(15).view(3, 5) * 66 if indices is None else indices
    return latents, noise, lesson(latents, noise, indices, TrainingSchedule.of(precision))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_schedule_is_the_samplers_at_a_thousand_steps():
    schedule = TrainingSchedule.of("fp32")
    assert len(schedule) == 1000
    assert schedule.sigmas.equal(shifted_sigmas(1000, 5.0)[:-1])
    assert schedule.timesteps.equal(schedule.sigmas * 1000)
    assert schedule.weights.equal(training_weights(schedule.timesteps))
    assert abs(schedule.weights.mean() - 1) < 1e-5
    assert schedule.weights.min() == 0
    assert 2.0 < schedule.weights.max() < 2.1


def test_bf16_shares_294_levels_and_sigma_is_looked_up_from_the_rounded_timestep():
    exact, rounded = TrainingSchedule.of("fp32"), TrainingSchedule.of("bf16")
    assert rounded.timesteps.equal(exact.timesteps.bfloat16().float())
    assert len(rounded.sigmas.unique()) == 294
    assert (rounded.sigmas - exact.sigmas).abs().max() > 1e-3
    for i in (0, 112, 500, 999):
        nearest = min(range(1000), key=lambda n, i=i: abs((exact.timesteps[n] - rounded.timesteps[i]).item()))
        assert rounded.sigmas[i] == exact.sigmas[nearest]
        assert rounded.weights[i] == exact.weights[nearest]


def test_every_frame_has_a_noise_level_of_its_own():
    latents, noise, given = example()
    schedule = TrainingSchedule.of("fp32")
    for b in range(3):
        for f in range(5):
            sigma = schedule.sigmas[(b * 5 + f) * 66]
            assert given.noisy[b, :, f].equal((1 - sigma) * latents[b, :, f] + sigma * noise[b, :, f])
            assert given.timesteps[b, f] == sigma * 1000
    assert given.target.equal(noise - latents)
    # Index 0 is pure noise.
    assert given.noisy[0, :, 0].equal(noise[0, :, 0])


def test_a_batchs_loss_is_the_mean_of_what_each_sample_has_alone():
    _, _, given = example()
    velocity = seeded_normal(SHAPE, 1, "velocity").requires_grad_()
    together = loss(velocity, given)
    alone = []
    for b in range(3):
        error = (velocity[b] - given.target[b]).square().mean()
        alone.append(error * given.weights[b].mean())
    assert torch.allclose(together, torch.stack(alone).mean(), rtol=1e-6)
    assert loss(given.target, given) == 0
    assert loss(velocity.bfloat16(), given).dtype == torch.float32


def test_a_frames_weight_scales_its_neighbours_errors_too():
    # As upstream does; a weighted mean over frames would not.
    _, _, given = example(torch.tensor([[0, 999, 400, 400, 400]]).expand(3, 5))
    wrong_first, wrong_second = given.target.clone(), given.target.clone()
    wrong_first[:, :, 0] += 1
    wrong_second[:, :, 2] += 1
    assert torch.allclose(loss(wrong_first, given), loss(wrong_second, given), rtol=1e-5)


def test_indices_are_uniform_and_independent_for_every_frame():
    drawn = draw_indices(4000, 5, generator())
    assert drawn.shape == (4000, 5)
    assert drawn.min() >= 0
    assert drawn.max() < NUM_TIMESTEPS
    counts = torch.bincount(drawn.flatten() // 100, minlength=10)
    assert ((counts - 2000).abs() < 200).all()  # 4.7 standard deviations
    between = torch.corrcoef(drawn.double().T) - torch.eye(5)
    assert between.abs().max() < 0.08


def test_a_base_stage_draws_one_index_for_all_frames_of_a_sample():
    drawn = draw_indices(200, 5, generator(), shared=True)
    assert (drawn == drawn[:, :1]).all()
    assert len(drawn[:, 0].unique()) > 150


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_sample_is_given_does_not_depend_on_its_batch(shared):
    latents = torch.zeros(SHAPE)
    noise, indices = draw(latents, [sample_generator(7, n) for n in (10, 11, 12)], shared=shared)
    alone = [draw(latents[:1], [sample_generator(7, n)], shared=shared) for n in (10, 11, 12)]
    assert noise.equal(torch.cat([one for one, _ in alone]))
    assert indices.equal(torch.cat([one for _, one in alone]))
    assert not noise[0].equal(noise[1])
    assert not draw(latents[:1], [sample_generator(8, 10)])[0].equal(noise[:1])
    assert abs(noise.std() - 1) < 0.05


def test_half_precision_latents_are_mixed_in_float32():
    latents, noise = seeded_normal(SHAPE, 1, "latents").bfloat16(), seeded_normal(SHAPE, 1, "noise").bfloat16()
    given = lesson(latents, noise, torch.full((3, 5), 300), TrainingSchedule.of("bf16"))
    assert given.noisy.dtype == given.target.dtype == torch.float32
    assert not given.noisy.equal(given.noisy.bfloat16().float())
