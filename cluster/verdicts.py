"""A measurement's figures, each with its limit and whether it is met, as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    scenario: str
    what: str
    value: float
    must_be: str
    """``-`` where it is told and not judged."""
    is_met: bool


def table(lines: Sequence[Figure]) -> str:
    """Markdown."""
    head = "| scenario | figure | value | must be | verdict |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| {one.scenario} | {one.what} | {_number(one.value)} | {one.must_be} | {_verdict(one)} |\n" for one in lines
    )


def percentile(values: Sequence[float], part: float) -> float:
    """The least value that this part of all do not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _verdict(one: Figure) -> str:
    if one.must_be == "-":
        return "-"
    return "ok" if one.is_met else "MISSED"
