"""What must be reached, and the table that says whether it was.

A requirement is judged by its whole 95 % interval: ``reached`` if even the lower end is at or above the
target, ``not reached`` if the measured value is below it, and ``open`` if the value reaches it but the
interval does not: then only more pairs can tell.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

from cluster.quality.intervals import Estimate, difference, mean, proportion
from cluster.quality.tasks import Outcome

Outcomes: TypeAlias = Mapping[str, Sequence[Outcome]]
"""Of one model, by task, in the order of the pairs."""
Verdict: TypeAlias = Literal["reached", "open", "not reached"]

_SEVERITY: Sequence[Verdict] = ("reached", "open", "not reached")


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """One value and its target."""

    name: str
    estimate: Estimate | None
    """None: it could not be measured, so it is not reached."""
    target: float
    unit: str
    is_ceiling: bool = False
    """The value must be at most the target, not at least."""

    @property
    def verdict(self) -> Verdict:
        """By the interval, as the module says."""
        if self.estimate is None:
            return "not reached"
        sign, worst = (-1, self.estimate.high) if self.is_ceiling else (1, self.estimate.low)
        if sign * self.estimate.value < sign * self.target:
            return "not reached"
        return "reached" if sign * worst >= sign * self.target else "open"

    def __str__(self) -> str:
        """Such as "over base +31.2 points [25.8, 36.7], at least +25.0 points: reached"."""
        value = "not recorded" if self.estimate is None else shown(self.estimate, self.unit)
        bound = f"at {'most' if self.is_ceiling else 'least'} {_number(self.target, self.unit)}"
        return f"{self.name} {value}, {bound}: {self.verdict}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measure of the table."""

    measure: str
    base: str
    adapted: str
    requirements: Sequence[Requirement] = ()
    """Empty: the row is a report only."""

    @property
    def verdict(self) -> Verdict | None:
        """That of the requirement that is furthest from being reached."""
        return max((one.verdict for one in self.requirements), key=_SEVERITY.index, default=None)


_START_END = "start/end: last frame's object within 3 px of the given end frame's; moves monotonically between"
_EXTENSION = "extension: speed and direction of the given clip continued, within 25 %"


def rows(base: Outcomes, adapted: Outcomes, adaptation_cost: float | None) -> list[Row]:
    """The table, without the rows of tasks that were not asked.

    Args:
        base: outcomes of the model alone.
        adapted: outcomes of the adapted model on the same pairs.
        adaptation_cost: samples seen by the adaptation over those seen by base training; None: not recorded.
    """
    by_tasks: Sequence[tuple[tuple[str, ...], Callable[..., Row]]] = (
        (("reconstruction",), _reconstruction),
        (("text-10",), _text),
        (("image-0", "still"), _given_frame),
        (("image",), _kept),
        (("image-0",), partial(_kept, note=", at multiplier 0")),
        (("start-end",), partial(_adapted, _START_END, share=0.80)),
        (("extension",), partial(_adapted, _EXTENSION, share=0.75)),
        (("text-10", "text-50"), _steps),
    )
    asked = [(tasks, row) for tasks, row in by_tasks if base.keys() >= set(tasks)]
    found = [row(*(side[task] for task in tasks for side in (base, adapted))) for tasks, row in asked]
    return [*found, _cost(adaptation_cost)]


def _reconstruction(base: Sequence[Outcome], adapted: Sequence[Outcome]) -> Row:
    of_base, of_adapted = (mean([one["psnr"] for one in side]) for side in (base, adapted))
    same = [one["fingerprint"] == other["fingerprint"] for one, other in zip(base, adapted, strict=True)]
    return Row(
        measure="VAE reconstruction of unseen clips: mean PSNR",
        base=shown(of_base, "dB"),
        adapted=f"{shown(of_adapted, 'dB')}, {sum(same)} of {len(same)} clips bit-equal",
        requirements=[
            Requirement(name="base", estimate=of_base, target=28.0, unit="dB"),
            _exact("the same VAE", same),
        ],
    )


def _text(base: Sequence[Outcome], adapted: Sequence[Outcome]) -> Row:
    alone, after = _right(base), _right(adapted)
    return Row(
        measure="text-to-video: colour, shape and direction all right",
        base=_share(alone),
        adapted=_share(after),
        requirements=[_at_least("base", alone, 0.85), _compared("over base", after, alone, -0.03)],
    )


def _given_frame(
    base: Sequence[Outcome], adapted: Sequence[Outcome], base_stills: Sequence[Outcome], stills: Sequence[Outcome]
) -> Row:
    sides = [_honoured(base, base_stills), _honoured(adapted, stills)]
    exact = [[one["exact"] for one in side] for side in sides]
    near = [[one["exact"] and one["near"] for one in side] for side in sides]
    cells = [f"{_share(n)}; bit-equal {sum(e)} of {len(e)}" for n, e in zip(near, exact, strict=True)]
    return Row(
        measure="image-to-video, multiplier 0: the given latent comes back bit-equal; in frames 1 to 4 colour and "
        "shape are kept and the centre is within 2 px",
        base=cells[0],
        adapted=cells[1],
        requirements=[_exact("bit-equal", exact[1]), _at_least("adapted", near[1], 0.85)],
    )


def _honoured(videos: Sequence[Outcome], stills: Sequence[Outcome]) -> list[Outcome]:
    """Whether frame 0 is, pixel for pixel, the VAE's own round trip of the given frame; and what followed."""
    return [
        {"exact": video["first_frame"] == still["first_frame"], "near": video["near"]}
        for video, still in zip(videos, stills, strict=True)
    ]


def _kept(base: Sequence[Outcome], adapted: Sequence[Outcome], note: str = "") -> Row:
    alone, after = _right(base), _right(adapted)
    judged = [_at_least("adapted", after, 0.80), _compared("over base", after, alone, 0.25)]
    return Row(
        measure=f"image-to-video{note}: right object kept to the last frame, moves as the prompt says",
        base=_share(alone),
        adapted=_share(after),
        requirements=[] if note else judged,
    )


def _adapted(measure: str, base: Sequence[Outcome], adapted: Sequence[Outcome], share: float) -> Row:
    after = _right(adapted)
    return Row(
        measure=measure,
        base=_share(_right(base)),
        adapted=_share(after),
        requirements=[_at_least("adapted", after, share)],
    )


def _steps(
    base: Sequence[Outcome], adapted: Sequence[Outcome], base_many: Sequence[Outcome], adapted_many: Sequence[Outcome]
) -> Row:
    few, many = [_right(base), _right(adapted)], [_right(base_many), _right(adapted_many)]
    cells = [f"{_share(a)} against {_share(b)}" for a, b in zip(few, many, strict=True)]
    return Row(
        measure="10 steps against 50 steps, text-to-video accuracy",
        base=cells[0],
        adapted=cells[1],
        requirements=[_compared("10 over 50 steps", few[1], many[1], -0.05)],
    )


def _cost(share: float | None) -> Row:
    estimate = None if share is None else _certain(share)
    required = Requirement(name="cost", estimate=estimate, target=0.10, unit="%", is_ceiling=True)
    cell = "not recorded" if estimate is None else shown(estimate, "%")
    measure = "adaptation cost, in samples seen, over base training"
    return Row(measure=measure, base="", adapted=cell, requirements=[required])


def _right(outcomes: Sequence[Outcome]) -> list[bool]:
    return [bool(one["right"]) for one in outcomes]


def _at_least(name: str, successes: Sequence[bool], share: float) -> Requirement:
    return Requirement(name=name, estimate=proportion(successes), target=share, unit="%")


def _compared(name: str, successes: Sequence[bool], others: Sequence[bool], gain: float) -> Requirement:
    return Requirement(name=name, estimate=difference(successes, others), target=gain, unit="points")


def _exact(name: str, successes: Sequence[bool]) -> Requirement:
    """Something that admits no exception, so no interval either."""
    return Requirement(name=name, estimate=_certain(sum(successes) / len(successes)), target=1.0, unit="%")


def _certain(value: float) -> Estimate:
    return Estimate(value=value, low=value, high=value)


def _share(successes: Sequence[bool]) -> str:
    return shown(proportion(successes), "%")


def shown(estimate: Estimate, unit: str) -> str:
    """A value and its interval, such as "93.4 % [89.7, 95.8]"."""
    scale = 1 if unit == "dB" else 100
    interval = f" [{scale * estimate.low:.1f}, {scale * estimate.high:.1f}]" if estimate.low < estimate.high else ""
    return f"{_number(estimate.value, unit)}{interval}"


def _number(value: float, unit: str) -> str:
    return f"{value:.1f} dB" if unit == "dB" else f"{100 * value:{'+' if unit == 'points' else ''}.1f} {unit}"


def markdown(table: Sequence[Row]) -> str:
    """The table, a line a measure, with every requirement and its verdict."""
    lines = ["| measure | base alone | base + adaptation | required | verdict |", "|---|---|---|---|---|"]
    for row in table:
        required = "; ".join(str(one) for one in row.requirements) or "reported"
        lines.append(f"| {row.measure} | {row.base} | {row.adapted} | {required} | {row.verdict or ''} |")
    return "\n".join(lines) + "\n"
