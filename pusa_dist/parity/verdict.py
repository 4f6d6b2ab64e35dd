"""What was compared in one case, and whether it is within the tolerance the case states."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Check:
    """One measured difference and its limit."""

    measure: str
    """Key of the tolerance, such as ``max_abs``."""
    what: str
    """Name of what was compared."""
    value: float
    limit: float
    informational: bool = False

    @property
    def at_least(self) -> bool:
        """Whether the limit is a lower one."""
        return "min_" in self.measure

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit; NaN never is."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def severity(self) -> float:
        """How much of the allowance was used: more than 1 is a miss."""
        if not self.passed:
            return float("inf")
        if self.at_least:
            return (1 - self.value) / (1 - self.limit) if self.limit < 1 else 1.0
        return self.value / self.limit if self.limit else 0.0

    def __str__(self) -> str:
        return f"{self.measure} {self.value:.3g} (limit {self.limit:g}, {self.what})"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything compared in one case."""

    checks: Sequence[Check]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The ``tolerance`` of a case's JSON, understood.

    Keys are ``max_abs``, ``mean_abs``, ``max_rel``, ``min_cosine``, ``max_ulp`` or ``max_uint8_levels``,
    optionally led by a subject, as in ``sigma_max_abs``. ``"informational": true`` makes the whole case
    informational, ``"tiled_tensors": "informational"`` the tensors with ``tiled`` in their name.
    """

    limits: Mapping[str, Mapping[str, float]]
    """Subject ("" for everything else) to measure to limit."""
    informational: bool
    informational_words: tuple[str, ...]

    @classmethod
    def parse(cls, description: Mapping[str, Any], subjects: Sequence[str] = ()) -> Self:
        """Read a case's tolerance.

        Args:
            description: the case's JSON.
            subjects: leading words this kind of case knows.

        Raises:
            ValueError: there is none, or a key is not understood (and would be ignored).
        """
        stated = description.get("tolerance")
        if not isinstance(stated, Mapping) or not stated:
            raise ValueError("its JSON states no tolerance")
        limits: dict[str, dict[str, float]] = {}
        words = []
        for key, value in stated.items():
            match = _KEY.fullmatch(key)
            if value == "informational":
                words.append(key.removesuffix("_tensors"))
            elif match and (match["subject"] or "") in ("", *subjects) and not isinstance(value, bool):
                limits.setdefault(match["subject"] or "", {})[match["measure"]] = float(value)
            elif key != "informational" and not isinstance(value, str):  # a sentence is a remark
                raise ValueError(f"its tolerance {key}={value!r} is not understood")
        return cls(limits, stated.get("informational") is True, tuple(words))

    def compare(self, what: str, ours: Tensor, recorded: Tensor, subject: str = "") -> list[Check]:
        """Measure the difference of two tensors by every measure stated for the subject.

        Raises:
            ValueError: the shapes differ, or no tolerance covers the subject.
        """
        if ours.shape != recorded.shape:
            raise ValueError(f"{what}: ours is {tuple(ours.shape)}, the recording {tuple(recorded.shape)}")
        limits = self.limits.get(subject) or self.limits.get("")
        if not limits:
            raise ValueError(f"{what}: no tolerance is stated for it")
        led = f"{subject}_" if subject in self.limits and subject else ""
        informational = self.is_informational(what)
        return [
            Check(led + measure, what, _MEASURES[measure](ours, recorded), limit, informational)
            for measure, limit in limits.items()
        ]

    def covers(self, subject: str) -> bool:
        """Whether a limit is stated for a subject, or for everything."""
        return bool(self.limits.get(subject) or self.limits.get(""))

    def is_informational(self, what: str) -> bool:
        """Whether a difference in this tensor is shown and does not fail."""
        return self.informational or any(word in what for word in self.informational_words)


def _difference(ours: Tensor, recorded: Tensor) -> Tensor:
    return (ours.double() - recorded.double()).abs()


def _max_rel(ours: Tensor, recorded: Tensor) -> float:
    return (_difference(ours, recorded) / recorded.double().abs().clamp_min(1e-12)).max().item()


def _cosine(ours: Tensor, recorded: Tensor) -> float:
    one, other = ours.double().flatten(), recorded.double().flatten()
    return (one @ other / (one.norm() * other.norm())).item()


def _max_ulp(ours: Tensor, recorded: Tensor) -> float:
    if ours.dtype != recorded.dtype:
        raise ValueError(f"ours is {ours.dtype}, the recording {recorded.dtype}")
    if not (ours.isfinite().all() and recorded.isfinite().all()):
        return float("nan")
    return (_ordinal(ours) - _ordinal(recorded)).abs().max().item()


def _ordinal(values: Tensor) -> Tensor:
    """Position of each float among all floats of its dtype, so that neighbours differ by 1."""
    bits = values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    magnitude = bits.long() & torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, -magnitude, magnitude)


_MEASURES: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "max_abs": lambda ours, recorded: _difference(ours, recorded).max().item(),
    "mean_abs": lambda ours, recorded: _difference(ours, recorded).mean().item(),
    "max_rel": _max_rel,
    "min_cosine": _cosine,
    "max_ulp": _max_ulp,
    "max_uint8_levels": lambda ours, recorded: _difference(ours, recorded).max().item(),
}
_KEY = re.compile(rf"(?:(?P<subject>\w+)_)?(?P<measure>{'|'.join(_MEASURES)})")
