"""A measurement's figures, each with its limit and whether it is met, as a table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    scenario: str
    what: str
    value: float | str
    must_be: str
    """``-`` where it is told and not judged."""
    is_met: bool


def told(scenario: str, what: str, value: float | str) -> Figure:
    """What is not judged."""
    return Figure(scenario, what, value, "-", True)


def at_most(scenario: str, what: str, value: float, limit: float | None) -> Figure:
    """Judged by an upper limit; None: told."""
    return (
        told(scenario, what, value) if limit is None else Figure(scenario, what, value, f"<= {limit:g}", value <= limit)
    )


def at_least(scenario: str, what: str, value: float, limit: float | None) -> Figure:
    """Judged by a lower limit; None: told."""
    return (
        told(scenario, what, value) if limit is None else Figure(scenario, what, value, f">= {limit:g}", value >= limit)
    )


def below(scenario: str, what: str, value: float, limit: float) -> Figure:
    """Judged by an upper limit that itself is too much."""
    return Figure(scenario, what, value, f"< {limit:g}", value < limit)


def equal(scenario: str, what: str, value: int, wanted: int) -> Figure:
    """Judged by what a number must be."""
    return Figure(scenario, what, value, f"{wanted}", value == wanted)


def near(scenario: str, what: str, ratio: float, tolerance: float) -> Figure:
    """Judged by how far a ratio is from 1."""
    return Figure(scenario, what, ratio, f"{1 - tolerance:g} to {1 + tolerance:g}", abs(ratio - 1) <= tolerance)


def none_of(scenario: str, what: str, found: Sequence[object]) -> Figure:
    """There must be none; the first of those there are stand in the table."""
    return Figure(scenario, what, f"{len(found)}" + (f" {list(found)[:5]}" if found else ""), "0", not found)


def no_growth(scenario: str, what: str, before_mib: float, after_mib: float, limit: float) -> Figure:
    """Memory, judged by its growth as a part of what it was."""
    growth = after_mib / before_mib - 1
    value = f"{growth:+.1%} ({before_mib:.0f} to {after_mib:.0f} MiB)"
    return Figure(scenario, what, value, f"<= {limit:.0%}", growth <= limit)


def are_met(figures: Iterable[Figure]) -> bool:
    """All of them."""
    return all(one.is_met for one in figures)


def table(figures: Iterable[Figure]) -> str:
    """Markdown."""
    head = "| scenario | figure | value | must be | verdict |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| {one.scenario} | {one.what} | {_shown(one.value)} | {one.must_be} | {_verdict(one)} |\n" for one in figures
    )


def percentile(values: Sequence[float], part: float) -> float:
    """The least value that this part of all do not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def _shown(value: float | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _verdict(one: Figure) -> str:
    if one.must_be == "-":
        return "-"
    return "ok" if one.is_met else "MISSED"
