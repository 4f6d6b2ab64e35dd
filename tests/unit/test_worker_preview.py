"""Previews of a running generation: asking for them changes nothing, and they head where it ends."""

from dataclasses import replace

import pytest
import torch

from pusa_dist.preview import LatentColours
from pusa_dist.request import Conditioning, GenerationRequest

STEPS = 6
REQUEST = GenerationRequest(
    model="debug", prompt="a", negative_prompt="b", width=64, height=48, num_frames=9, fps=8,
    num_inference_steps=STEPS, guidance_scale=1.0, shift=5.0, seed=0, lora_alpha={"main": 1.4},
    conditioning=(Conditioning(input=0, position=0, noise_multiplier=0.0),),
)  # fmt: skip


@pytest.fixture(scope="module")
def given():
    return torch.randn(16, 1, 6, 8, generator=torch.Generator().manual_seed(3))


def generate(worker, given, with_previews, request=REQUEST):
    context = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    worker.admit("j", request, context, None, given)
    assert worker.preview("j") is None
    previews = []
    for step in range(1, STEPS + 1):
        worker.step(["j"])
        if with_previews:
            done, latents = worker.preview("j")
            assert done == step
            previews.append(latents)
    return worker.finish("j"), previews


def test_asking_for_previews_changes_no_bit_and_they_end_where_the_generation_ends(worker, given):
    undisturbed, _ = generate(worker, given, with_previews=False)
    final, previews = generate(worker, given, with_previews=True)
    assert torch.equal(final, undisturbed)
    assert torch.equal(previews[-1], final)  # after the last step there is nothing left to guess
    assert all(torch.equal(preview[:, 0], given[:, 0]) for preview in previews)  # a given frame is as it is given
    assert worker.preview("j") is None
    distances = [float((preview - final).square().mean()) for preview in previews]
    assert distances[-2] < distances[0]
    assert all(torch.isfinite(preview).all() for preview in previews)


def test_a_preview_after_half_the_steps_already_looks_like_the_end(worker, given):
    final, previews = generate(worker, given, with_previews=True, request=replace(REQUEST, seed=1))
    pictures = LatentColours((torch.randn(17, 3, generator=torch.Generator().manual_seed(0)) * 20 + 10).numpy())
    half, end = (pictures.frames(latents.numpy()).astype(float).ravel() for latents in (previews[STEPS // 2], final))
    similarity = torch.corrcoef(torch.stack([torch.from_numpy(half), torch.from_numpy(end)]))[0, 1]
    assert similarity > 0.8
