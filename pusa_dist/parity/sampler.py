"""``sampler``: a whole denoising loop, every step of it, through the path that production takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.conditioning import initial_noise
from pusa_dist.config import ModelConfig, ParallelConfig
from pusa_dist.geometry import SPATIAL_STRIDE, num_pixel_frames
from pusa_dist.parallel.apply import parallelize
from pusa_dist.parallel.guidance import guided_velocity
from pusa_dist.parallel.mesh import free_port, join_gang, leave_gang
from pusa_dist.parity.cases import Case
from pusa_dist.parity.faults import expected_tables, known_fault
from pusa_dist.parity.verdict import Check, Report, Tolerance
from pusa_dist.request import Conditioning, GenerationRequest
from pusa_dist.sampler import VelocityFn, advance
from pusa_dist.schedule import DTYPES, TIMESTEP_SCALE, shifted_sigmas
from pusa_dist.state import GenerationState

SUBJECTS = ("model_timesteps", "sigma")


def check(case: Case) -> Report:
    """Compare the schedule, the start, every velocity and the latents after every step."""
    tolerance = Tolerance.parse(case.description, SUBJECTS)
    fault = known_fault(case)
    state = initial_state(case)
    checks = _own_schedule_checks(case, state, tolerance) + _expert_checks(case, state)
    if fault:
        return Report(checks + _loop_checks(case, state, tolerance), [fault])
    checks += _table_checks(case, state, tolerance) + _noise_checks(case, tolerance)
    checks += tolerance.compare("latents_init", state.latents.unsqueeze(0), case.tensors["latents_init"])
    run = run_to_end(case.model(), state)
    checks += _velocity_checks(case, run, tolerance)
    checks += _each_step("latents_steps", run.latents, case.tensors["latents_steps"], tolerance)
    checks += tolerance.compare("final", run.latents[-1].unsqueeze(0), case.tensors["final"])
    return Report(checks)


def _each_step(name: str, ours: list[Tensor], recorded: Tensor, tolerance: Tolerance) -> list[Check]:
    """Every step by itself, so that no mean hides one."""
    if len(ours) != len(recorded):
        raise ValueError(f"{name}: ours has {len(ours)} steps, the recording {len(recorded)}")
    return [c for i, one in enumerate(ours) for c in tolerance.compare(f"{name}[{i}]", one, recorded[i])]


def _velocity_checks(case: Case, run: "Run", tolerance: Tolerance) -> list[Check]:
    """Guided velocities. A mean difference is stated for latents, which a step's share of velocity moves.

    In bfloat16 guidance multiplies the rounding of two branches, so the mean is only shown there.
    """
    checks = _each_step("noise_pred", run.velocities, case.tensors["noise_pred"], tolerance)
    if case.precision == "fp32":
        return checks
    return [replace(check, informational=True) if check.measure == "mean_abs" else check for check in checks]


def initial_state(case: Case) -> GenerationState:
    """The case's state before its first step, started from the recorded noise."""
    described, recorded = case.description, case.tensors
    request = _request(case)
    return GenerationState.start(
        request,
        case.model(),
        case.precision,
        ParallelConfig(),
        recorded["context_pos"][0],
        recorded["context_neg"][0] if request.uses_guidance else None,
        _given(case) if described["cond_positions"] else None,
        noise=recorded["noise"][0],
    )


def _request(case: Case) -> GenerationRequest:
    described = case.description
    batch, _, frames, height, width = case.tensors["noise"].shape
    if batch != 1:
        raise ValueError(f"noise holds {batch} samples; a case is one generation")
    given = zip(described["cond_positions"], described["noise_multipliers"], strict=True)
    return GenerationRequest(
        model=case.name,
        prompt="recorded",
        negative_prompt="recorded",
        width=width * SPATIAL_STRIDE,
        height=height * SPATIAL_STRIDE,
        num_frames=num_pixel_frames(frames),
        fps=1,
        num_inference_steps=described["steps"],
        guidance_scale=described["cfg_scale"],
        shift=described["shift"],
        seed=described.get("seed") or 0,
        lora_alpha={},
        conditioning=tuple(
            Conditioning(input=index, position=position, noise_multiplier=multiplier)
            for index, (position, multiplier) in enumerate(given)
        ),
    )


def _given(case: Case) -> Tensor:
    """(C, K, H, W) in the order of the positions; a recorded whole clip is indexed by position."""
    latents, positions = case.tensors["cond_latents"][0], case.description["cond_positions"]
    meaning = case.description.get("cond_latents_meaning") or ""
    by_position = "by position" in meaning if meaning else latents.shape[1] != len(positions)
    return latents[:, positions] if by_position else latents


def _own_schedule_checks(case: Case, state: GenerationState, tolerance: Tolerance) -> list[Check]:
    """The scalar schedule, before any frame has its own."""
    own = shifted_sigmas(state.num_steps, state.request.shift)[:-1]
    timesteps = case.tensors["timesteps"].double() / TIMESTEP_SCALE  # the tolerance is one of sigma
    return [
        *tolerance.compare("sigmas", own, case.tensors["sigmas"], "sigma"),
        *tolerance.compare("timesteps", own.double(), timesteps, "sigma"),
    ]


def _table_checks(case: Case, state: GenerationState, tolerance: Tolerance) -> list[Check]:
    tables, recorded = state.tables, case.tensors
    return [
        *tolerance.compare("model_timesteps", tables.model_timesteps, recorded["model_timesteps"], "model_timesteps"),
        *tolerance.compare("sigma", tables.sigma, recorded["sigma"], "sigma"),
        *tolerance.compare("sigma_next", tables.sigma_next, recorded["sigma_next"], "sigma"),
    ]


def _noise_checks(case: Case, tolerance: Tolerance) -> list[Check]:
    """That the seed draws the recorded noise, where a seed is recorded."""
    seed = case.description.get("seed")
    if seed is None:
        return []
    drawn = initial_noise(case.tensors["noise"].shape[1:], seed).unsqueeze(0)
    return tolerance.compare("noise", drawn, case.tensors["noise"])


def _loop_checks(case: Case, state: GenerationState, tolerance: Tolerance) -> list[Check]:
    """Tables and start against the loop's own sigma, for a recording of a fault."""
    fed, sigma, sigma_next = expected_tables(
        case.tensors["sigmas"],
        case.tensors["timesteps"].to(DTYPES[case.precision]),
        state.request.num_latent_frames,
        {entry.position: entry.noise_multiplier for entry in state.request.conditioning},
    )
    checks = [
        *tolerance.compare("model_timesteps", state.tables.model_timesteps, fed, "model_timesteps"),
        *tolerance.compare("sigma", state.tables.sigma, sigma, "sigma"),
        *tolerance.compare("sigma_next", state.tables.sigma_next, sigma_next, "sigma"),
    ]
    if tolerance.covers("latents_init"):
        checks += _noise_checks(case, tolerance)
        checks += tolerance.compare("latents_init", state.latents, _expected_start(case, state))
    return checks


def _expert_checks(case: Case, state: GenerationState) -> list[Check]:
    names = case.description.get("experts_per_step")
    if names is None:
        return []
    wrong = sum(ours != name for ours, name in zip(state.experts, names, strict=True))
    return [Check("experts_wrong", "experts_per_step", float(wrong), 0.0)]


def _expected_start(case: Case, state: GenerationState) -> Tensor:
    """Latents (C, F, H, W) before step 0 with the loop's own first sigma."""
    start, given = case.tensors["noise"][0].clone(), _given(case)
    for index, entry in enumerate(state.request.conditioning):
        share = case.tensors["sigmas"][0].item() * entry.noise_multiplier
        start[:, entry.position] = (1 - share) * given[:, index] + share * start[:, entry.position]
    return start.to(state.latents.dtype)


@dataclass(frozen=True, slots=True)
class Run:
    """What a loop did: per step its velocity and the latents after it, each (C, F, H, W)."""

    velocities: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)


def run_to_end(model: ModelConfig, state: GenerationState) -> Run:
    """Denoise a state on a gang of one rank, recording every step."""
    run = Run()
    with _velocities(model) as velocities, torch.no_grad():
        recording = {expert: _recording(velocity, run) for expert, velocity in velocities.items()}
        while not state.is_final:
            (state,) = advance([state], recording[state.expert])
            run.latents.append(state.latents)
    return run


@contextmanager
def _velocities(model: ModelConfig) -> Iterator[dict[str, VelocityFn]]:
    """Guided velocity of every expert, on a gang of one that lasts as long as the context."""
    precision = model.precision_on("cpu")
    mesh = join_gang(0, 1, "127.0.0.1", free_port(), ParallelConfig(), "cpu", 60.0)
    try:
        loaded = {name: build_transformer(model, name, device="cpu", precision=precision) for name in model.experts}
        group = mesh.get_group("cfg")
        yield {
            name: partial(guided_velocity, parallelize(transformer, mesh), cfg_group=group)
            for name, transformer in loaded.items()
        }
    finally:
        leave_gang()


def _recording(velocity: VelocityFn, run: Run) -> VelocityFn:
    def recorded(*inputs: Tensor | None) -> Tensor:
        predicted = velocity(*inputs)  # type: ignore[arg-type]
        run.velocities.append(predicted[0])
        return predicted

    return recorded
