import dataclasses
import json

import pytest
import torch
from safetensors.torch import save

from pusa_dist.config import ParallelConfig, load_model_config
from pusa_dist.errors import CheckpointError, PusaError
from pusa_dist.request import Conditioning, GenerationRequest
from pusa_dist.sampler import advance
from pusa_dist.state import FORMAT, GenerationState

MODEL = load_model_config("debug")
TWO_EXPERTS = load_model_config("debug-two-expert")


def make_request(**changes):
    values = {
        "model": "debug",
        "prompt": "a paper boat",
        "negative_prompt": "",
        "width": 32,
        "height": 48,
        "num_frames": 9,
        "fps": 8,
        "num_inference_steps": 6,
        "guidance_scale": 3.5,
        "shift": 5.0,
        "seed": 11,
        "lora_alpha": {"main": 1.4},
        "conditioning": (Conditioning(input=0, position=0, noise_multiplier=0.2),),
    }
    return GenerationRequest(**{**values, **changes})


def make_state(request=None, precision="fp32", model=MODEL):
    request = request or make_request()
    generator = torch.Generator().manual_seed(3)
    shape = (len(request.conditioning), request.height // 8, request.width // 8)
    return GenerationState.start(
        request,
        model,
        precision,
        ParallelConfig(ring_degree=2),
        torch.randn(12, 32, generator=generator),
        torch.randn(12, 32, generator=generator) if request.uses_guidance else None,
        torch.randn(16, *shape, generator=generator) if request.conditioning else None,
    )


def toy_velocity(latents, timestep, context, negative_context, guidance_scale):
    """Depends on every argument, differently in every frame."""
    share = timestep.view(len(latents), 1, -1, 1, 1) / 1000
    told = context.mean(dim=(1, 2)) - (0 if negative_context is None else negative_context.mean(dim=(1, 2)))
    told = (told * guidance_scale).view(-1, 1, 1, 1, 1)
    return (latents.float() * (0.3 + share) + told).to(latents.dtype)


def finish(state):
    while not state.is_final:
        (state,) = advance([state], toy_velocity)
    return state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_state_resumed_from_bytes_at_any_step_ends_bit_identical(precision):
    state = make_state(precision=precision)
    expected = finish(state).latents
    for step in range(state.num_steps + 1):
        assert state.step == step
        resumed = GenerationState.from_bytes(state.to_bytes())
        assert torch.equal(finish(resumed).latents, expected)
        if not state.is_final:
            (state,) = advance([state], toy_velocity)


def test_bytes_hold_every_field():
    (state,) = advance([make_state()], toy_velocity)
    restored = GenerationState.from_bytes(state.to_bytes())
    for item in dataclasses.fields(GenerationState):
        mine, theirs = getattr(state, item.name), getattr(restored, item.name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs), item.name
            assert mine.dtype == theirs.dtype, item.name
        elif item.name == "tables":
            assert all(
                torch.equal(getattr(mine, n), getattr(theirs, n)) for n in ("sigma", "sigma_next", "model_timesteps")
            )
        else:
            assert mine == theirs, item.name


def test_a_state_without_guidance_round_trips():
    state = make_state(make_request(guidance_scale=1.0, conditioning=()))
    assert GenerationState.from_bytes(state.to_bytes()).negative_context is None


def test_embeddings_that_are_rows_of_one_batch_round_trip():
    both = torch.randn(2, 12, 32)
    state = dataclasses.replace(make_state(), context=both[0], negative_context=both[1])
    restored = GenerationState.from_bytes(state.to_bytes())
    assert torch.equal(restored.context, both[0])
    assert torch.equal(restored.negative_context, both[1])


def test_a_checkpoint_of_the_14b_model_at_720p_is_tens_of_megabytes():
    request = make_request(width=1280, height=720, num_frames=81, conditioning=())
    context = torch.zeros(512, 4096, dtype=torch.bfloat16)
    state = GenerationState.start(request, MODEL, "bf16", ParallelConfig(), context, context.clone(), None)
    state = dataclasses.replace(state, latents=state.latents.float())  # as after the first step
    latents, embeddings, tables = 16 * 21 * 90 * 160 * 4, 2 * 512 * 4096 * 2, 3 * 6 * 21 * 4
    assert latents + embeddings + tables == 27_743_720
    assert 0 < len(state.to_bytes()) - 27_743_720 < 4096


def checkpoint(**changes):
    """A checkpoint whose description is changed."""
    data = make_state().to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["state"]) | changes
    header["__metadata__"]["state"] = json.dumps(described)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + data[8 + length :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 64,
        b"not a checkpoint at all, but long enough to hold a header",
        bytes(range(256)) * 4,
        save({"latents": torch.zeros(2)}),
        save({"latents": torch.zeros(2)}, metadata={"format": "something else", "state": "{}"}),
        save({"latents": torch.zeros(2)}, metadata={"format": FORMAT, "state": "{}"}),
        save({"latents": torch.zeros(2)}, metadata={"format": FORMAT, "state": "[]"}),
    ],
)
def test_foreign_bytes_are_refused(data):
    with pytest.raises(CheckpointError, match="not a generation checkpoint"):
        GenerationState.from_bytes(data)


def test_a_truncated_checkpoint_is_refused():
    data = make_state().to_bytes()
    for length in (4, 200, len(data) // 2, len(data) - 1):
        with pytest.raises(CheckpointError, match="not a generation checkpoint"):
            GenerationState.from_bytes(data[:length])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"step": 7}, "step"),
        ({"step": -1}, "step"),
        ({"precision": "fp8"}, "precision"),
        ({"experts": ["main"]}, "experts"),
        ({"request": make_request(num_frames=13).to_dict()}, "latents"),
        ({"request": make_request(num_inference_steps=7).to_dict()}, "sigma"),
        ({"request": make_request(guidance_scale=1.0).to_dict()}, "negative_context"),
        ({"colour": "blue"}, "colour"),
        ({"parallel": {"cfg_degree": 3}}, "cfg_degree"),
    ],
)
def test_a_checkpoint_whose_parts_disagree_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        GenerationState.from_bytes(checkpoint(**changes))


def test_an_unchanged_description_is_accepted():
    assert GenerationState.from_bytes(checkpoint()).step == 0


def test_the_expert_of_the_next_step_follows_the_schedule():
    state = make_state(make_request(num_inference_steps=4, lora_alpha={"high": 1.5, "low": 1.4}), model=TWO_EXPERTS)
    seen = []
    while not state.is_final:
        seen.append(state.expert)
        (state,) = advance([state], toy_velocity)
    assert seen == ["high", "high", "low", "low"]
    with pytest.raises(PusaError, match="all 4 steps are done"):
        _ = state.expert


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0},
        {"num_frames": 13},
        {"lora_alpha": {"main": 1.0}},
        {"width": 48},
    ],
)
def test_what_a_forward_cannot_share_changes_the_signature(changes):
    assert make_state(make_request(**changes)).signature() != make_state().signature()


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"guidance_scale": 7.0}, {"conditioning": ()}, {"num_inference_steps": 9}, {"shift": 3.0}]
)
def test_what_a_forward_can_share_leaves_the_signature(changes):
    assert make_state(make_request(**changes)).signature() == make_state().signature()


def test_embeddings_must_fit_the_guidance():
    with pytest.raises(ValueError, match="negative embedding"):
        GenerationState.start(
            make_request(conditioning=()), MODEL, "fp32", ParallelConfig(), torch.zeros(4, 32), None, None
        )


def test_a_state_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_state().step = 3
