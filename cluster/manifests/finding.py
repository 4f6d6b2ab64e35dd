"""What a check says: a finding, and the name it is known by."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
"""A Kubernetes object as YAML has it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong: where, and what to do instead."""

    where: str
    message: str


Rule = Callable[[Sequence[Object]], list[Finding]]
"""A pure function of all objects of an overlay; its name is what a finding is known by."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one check found in one subject, or why it was not made."""

    subject: str
    check: str
    findings: tuple[Finding, ...] = ()
    skipped: str | None = None
    notes: tuple[str, ...] = field(default=())
    """What is to be known and is not wrong."""


def name_of(rule: Rule) -> str:
    """``group-bounds-are-ordered`` for the function ``group_bounds_are_ordered``."""
    return rule.__name__.replace("_", "-")


def apply(rules: Iterable[Rule], objects: Sequence[Object], subject: str) -> list[Result]:
    """A result for every rule."""
    return [Result(subject, name_of(rule), tuple(rule(objects))) for rule in rules]
