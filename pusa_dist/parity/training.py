"""``training``: one training step of the public code, from the indices it drew to the gradients of its LoRA."""

from collections.abc import Mapping

from torch import Tensor

from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.config import Precision
from pusa_dist.model.transformer import VectorTimestepTransformer
from pusa_dist.parity.cases import Case
from pusa_dist.parity.verdict import Check, Report, Tolerance
from pusa_dist.schedule import DTYPES
from pusa_dist.training.adapter import inject, parameters_by_key
from pusa_dist.training.objective import DEFAULT_SHIFT, NUM_TIMESTEPS, Lesson, TrainingSchedule, lesson, loss

INPUTS = ("latents", "noise", "context", "timestep_id")
LORA, GRADIENT, BF16 = "lora/", "grad/", "bf16."

LIMITS: Mapping[str, Mapping[str, float]] = {
    "timestep": {"max_abs": 1e-3},
    "bf16.timestep": {"max_abs": 0.0},
    "noisy_latents": {"max_abs": 1e-6},
    "weights_per_frame": {"max_abs": 1e-6},
    "model_output": {"max_abs": 1e-4},
    "loss": {"max_rel": 1e-5},
    "mse": {"max_rel": 1e-5},
    "grad": {"max_abs": 1e-4},
}
"""By subject, where the case states none."""
GRADIENT_MAX_REL_NORM = 1e-4
"""Of a gradient's difference, on top of any absolute limit: gradients are small."""


def check(case: Case) -> Report:
    """Compare the noising, the weights, the answer, the loss and the gradients, and which weights learn."""
    stated, recorded = Tolerance.parse(case.description, tuple(LIMITS)), case.tensors
    tolerance = Tolerance(
        {subject: stated.limits.get(subject) or stated.limits.get("") or own for subject, own in LIMITS.items()},
        stated.informational,
        stated.informational_words,
    )
    if "loss" not in recorded:
        raise ValueError("it records no loss")
    transformer = _transformer(case)
    given = _lesson(case, case.precision)
    ours = _step(transformer, given, recorded["context"])
    ours |= {name: t for name, t in _noised(given).items() if name in recorded}
    if any(name.startswith(BF16) for name in recorded):
        ours |= {BF16 + name: tensor for name, tensor in _noised(_lesson(case, "bf16")).items()}

    checks: list[Check] = []
    for name in sorted(recorded):
        if name in INPUTS or name.startswith(LORA):
            continue
        if name not in ours:
            raise ValueError(f"tensor name {name!r} is not understood")
        subject = "grad" if name.startswith(GRADIENT) else name if name in LIMITS else name.removeprefix(BF16)
        checks += tolerance.compare(name, ours[name].float(), recorded[name].float(), subject)
        if name.startswith(GRADIENT):
            difference = (ours[name].double() - recorded[name].double()).norm()
            share = (difference / recorded[name].double().norm().clamp_min(1e-12)).item()
            checks.append(Check("grad_rel_norm", name, share, GRADIENT_MAX_REL_NORM, tolerance.informational))
    trainable = set(case.description.get("trainable_names", parameters_by_key(transformer)))
    wrong = trainable ^ set(parameters_by_key(transformer))
    return Report([*checks, Check("trainable_names_wrong", "adapted weights", float(len(wrong)), 0.0)])


def _transformer(case: Case) -> VectorTimestepTransformer:
    """The case's base with the case's adapter, which holds its A and B as peft does: before alpha / rank."""
    model = case.model()
    transformer = build_transformer(model, model.experts[0], device="cpu", precision=case.precision)
    inject(transformer, case.description["lora_rank"], case.description["lora_alpha"])
    given = {name.removeprefix(LORA): t for name, t in case.tensors.items() if name.startswith(LORA)}
    parameters = parameters_by_key(transformer)
    if given.keys() != parameters.keys():
        raise ValueError(f"the case's LoRA differs in {sorted(given.keys() ^ parameters.keys())}")
    for key, parameter in parameters.items():
        if parameter.shape != given[key].shape:
            raise ValueError(f"{LORA}{key} is {tuple(given[key].shape)}, not {tuple(parameter.shape)}")
        parameter.data.copy_(given[key])
    return transformer


def _lesson(case: Case, precision: Precision) -> Lesson:
    described, recorded = case.description, case.tensors
    schedule = TrainingSchedule.of(
        precision,
        shift=described.get("shift", DEFAULT_SHIFT),
        num_timesteps=described.get("num_timesteps", NUM_TIMESTEPS),
    )
    latents, noise = (recorded[name].to(DTYPES[precision]) for name in ("latents", "noise"))
    return lesson(latents, noise, recorded["timestep_id"], schedule)


def _noised(given: Lesson) -> dict[str, Tensor]:
    return {
        "noisy_latents": given.noisy,
        "timestep": given.timesteps,
        "weights_per_frame": given.weights.flatten(),
    }


def _step(transformer: VectorTimestepTransformer, given: Lesson, context: Tensor) -> dict[str, Tensor]:
    velocity = transformer(given.noisy, given.timesteps, context)
    total = loss(velocity, given)
    total.backward()
    gradients = {
        GRADIENT + key: parameter.grad
        for key, parameter in parameters_by_key(transformer).items()
        if parameter.grad is not None
    }
    velocity = velocity.detach()
    mse = (velocity.float() - given.target).square().mean()
    return {"model_output": velocity, "loss": total.detach()[None], "mse": mse[None], **gradients}
