"""``scheduler``: sigma and timestep tables by themselves; the tensors' names say of which schedule."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pusa_dist.config import Precision
from pusa_dist.parity.cases import Case
from pusa_dist.parity.faults import expected_tables, known_fault
from pusa_dist.parity.verdict import Check, Report, Tolerance
from pusa_dist.schedule import DTYPES, TIMESTEP_SCALE, expert_index, shifted_sigmas, step_tables, training_weights

SUBJECTS = ("model_timesteps", "sigma")
DEFAULT_SHIFT = 5.0
"""Every public pipeline's, where a name does not say."""
DEFAULT_BOUNDARY = 0.875
EXPERT_NAMES = ("high", "low")

_NUMBER = r"\d+(?:\.\d+)?"
_SCHEDULE = re.compile(rf"(?P<pipeline>\w+)\.shift(?P<shift>{_NUMBER})\.steps(?P<steps>\d+)\.(?P<rest>[\w.]+)")
_TABLE = re.compile(r"(?P<precision>fp32|bf16)\.(?P<tensor>model_timesteps|sigma|sigma_next)")
_TRAINING = re.compile(rf"train(?P<steps>\d+)(?:\.shift(?P<shift>{_NUMBER}))?\.(?P<tensor>sigmas|timesteps|weights)")
_STRENGTH = re.compile(
    rf"denoise(?P<strength>{_NUMBER})(?:\.shift(?P<shift>{_NUMBER}))?\.steps(?P<steps>\d+)\.(?P<tensor>sigmas|timesteps)"
)


def check(case: Case) -> Report:
    """Compare every recorded tensor with the schedule its name describes."""
    tolerance = Tolerance.parse(case.description, SUBJECTS)
    fault = known_fault(case)
    checks: list[Check] = []
    for name, recorded in case.tensors.items():
        ours = _ours(name, case.description)
        if fault and name.endswith((".sigma", ".sigma_next")):
            recorded = _without_fault(name, case)
        checks += tolerance.compare(name, *_in_sigma_units(name, ours, recorded), _subject(name))
    checks += [_expert_check(name, names, case.description) for name, names in _experts(case.description).items()]
    return Report(checks, [fault] if fault else [])


def _subject(name: str) -> str:
    return "model_timesteps" if name.endswith("model_timesteps") else "sigma"


def _in_sigma_units(name: str, ours: Tensor, recorded: Tensor) -> tuple[Tensor, Tensor]:
    """A schedule's own timesteps are 1000 sigma, and the tolerance is one of sigma."""
    scale = TIMESTEP_SCALE if name.endswith(".timesteps") else 1.0
    return ours.double() / scale, recorded.double() / scale


def _ours(name: str, described: Mapping[str, Any]) -> Tensor:
    if match := _TRAINING.fullmatch(name):
        sigmas = shifted_sigmas(int(match["steps"]), float(match["shift"] or DEFAULT_SHIFT))[:-1]
        return training_weights(sigmas * TIMESTEP_SCALE) if match["tensor"] == "weights" else _scaled(sigmas, name)
    if match := _STRENGTH.fullmatch(name):
        shift = float(match["shift"] or DEFAULT_SHIFT)
        return _scaled(shifted_sigmas(int(match["steps"]), shift, float(match["strength"]))[:-1], name)
    if match := _SCHEDULE.fullmatch(name):
        steps, shift = int(match["steps"]), float(match["shift"])
        if match["rest"] in ("sigmas", "timesteps"):
            return _scaled(shifted_sigmas(steps, shift)[:-1], name)
        if table := _TABLE.fullmatch(match["rest"]):
            frames, multipliers = _conditioning(match["pipeline"], described)
            precision: Precision = "bf16" if table["precision"] == "bf16" else "fp32"
            return getattr(step_tables(steps, shift, frames, multipliers, precision), table["tensor"])
    raise ValueError(f"tensor name {name!r} is not understood")


def _scaled(sigmas: Tensor, name: str) -> Tensor:
    return sigmas * TIMESTEP_SCALE if name.endswith(".timesteps") else sigmas


def _conditioning(pipeline: str, described: Mapping[str, Any]) -> tuple[int, dict[int, float]]:
    cond = described["cond"]
    given = {} if pipeline.endswith("t2v") else dict(zip(cond["positions"], cond["multipliers"], strict=True))
    return cond["latent_frames"], given


def _without_fault(name: str, case: Case) -> Tensor:
    """What the recorded scalar schedule gives by loop index, in place of a faulty table."""
    schedule, table = _SCHEDULE.fullmatch(name), _TABLE.fullmatch(".".join(name.rsplit(".", 2)[1:]))
    if schedule is None or table is None:
        raise ValueError(f"tensor name {name!r} is not understood")
    prefix = name.removesuffix(f".{table[0]}")
    frames, multipliers = _conditioning(schedule["pipeline"], case.description)
    timesteps = case.tensors[f"{prefix}.timesteps"].to(DTYPES["bf16" if table["precision"] == "bf16" else "fp32"])
    _, sigma, sigma_next = expected_tables(case.tensors[f"{prefix}.sigmas"], timesteps, frames, multipliers)
    return sigma if table["tensor"] == "sigma" else sigma_next


def _experts(described: Mapping[str, Any]) -> Mapping[str, list[str]]:
    return described.get("experts") or {}


def _expert_check(name: str, names: list[str], described: Mapping[str, Any]) -> Check:
    match = _SCHEDULE.fullmatch(name)
    if match is None:
        raise ValueError(f"experts of {name!r} are not understood")
    boundary = described.get("switch_DiT_boundary") or DEFAULT_BOUNDARY
    ours = [EXPERT_NAMES[i] for i in expert_index(int(match["steps"]), float(match["shift"]), boundary)]
    wrong = sum(a != b for a, b in zip(ours, names, strict=True))
    return Check("experts_wrong", name, float(wrong), 0.0)
