"""Run every case of a folder and say of each whether we agree with the recording."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pusa_dist.parity import forward, lora, preprocess, sampler, scheduler, text_encoder, training, vae
from pusa_dist.parity.cases import Case, CaseFolder
from pusa_dist.parity.verdict import Check, Report

logger = logging.getLogger(__name__)

CHECKS: Mapping[str, Callable[[Case], Report]] = MappingProxyType(
    {
        "forward": forward.check,
        "sampler": sampler.check,
        "scheduler": scheduler.check,
        "lora": lora.check,
        "vae": vae.check,
        "text_encoder": text_encoder.check,
        "preprocess": preprocess.check,
        "training": training.check,
    }
)
INPUTS = ("weights",)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    case: str
    kind: str
    difference: str
    tolerance: str
    verdict: str
    """ok, FAIL or shown (informational)."""
    notes: str = ""

    def __str__(self) -> str:
        cells = f"{self.case:<24} {self.kind:<13} {self.difference:<50} {self.tolerance:<9} {self.verdict}"
        return f"{cells}  {self.notes}".rstrip()


def run(folder: Path, write: Callable[[str], None]) -> int:
    """Compare with every case that ``folder/manifest.json`` names.

    Args:
        folder: in the format of ``tests/goldens``.
        write: is given the lines of the table.

    Returns:
        0 if no case failed, else 1.

    Raises:
        ConfigError: the folder has no readable manifest.
    """
    cases = CaseFolder(folder).cases
    inputs = [case.name for case in cases if case.listed_kind in INPUTS]
    if inputs:
        write(f"weights (inputs, not cases): {', '.join(inputs)}")
    write(str(Row("case", "kind", "largest difference", "tolerance", "verdict")))
    counts: Counter[str] = Counter()
    for case in cases:
        if case.listed_kind not in INPUTS:
            row = judge(case)
            counts[row.verdict] += 1
            write(str(row))
    write(", ".join(f"{counts[verdict]} {verdict}" for verdict in ("ok", "FAIL", "shown")))
    return 1 if counts["FAIL"] or not counts else 0


def judge(case: Case) -> Row:
    """Run one case. Whatever goes wrong inside it becomes a FAIL row with the reason."""
    kind = case.listed_kind
    try:
        kind = case.kind
        if kind not in CHECKS:
            return Row(case.name, kind, "-", "-", "FAIL", f"unknown kind; known: {', '.join(CHECKS)}")
        return _row(case.name, kind, CHECKS[kind](case))
    except Exception as error:
        logger.exception("parity case %s could not be compared", case.name)
        return Row(case.name, kind, "-", "-", "FAIL", f"{type(error).__name__}: {error}".replace("\n", " "))


def _row(name: str, kind: str, report: Report) -> Row:
    decisive = [check for check in report.checks if not check.informational]
    if not report.checks:
        return Row(name, kind, "-", "-", "FAIL", "nothing was compared")
    worst = max(decisive or report.checks, key=_weight)
    verdict = "shown" if not decisive else "ok" if all(check.passed for check in decisive) else "FAIL"
    others = _worst_of_each_measure(decisive)
    notes = [*report.notes, *(str(check) for check in others if check.measure != worst.measure)]
    if decisive:
        shown = _worst_of_each_measure([check for check in report.checks if check.informational])
        notes += [f"informational: {check}" for check in shown]
    return Row(
        name, kind, f"{worst.measure} {worst.value:.3g} ({worst.what})", f"{worst.limit:g}", verdict, "; ".join(notes)
    )


def _weight(check: Check) -> tuple[float, bool]:
    # Of several that all agree exactly, one that had an allowance says more than one that had none.
    return check.severity, check.limit > 0


def _worst_of_each_measure(checks: list[Check]) -> list[Check]:
    worst: dict[str, Check] = {}
    for check in checks:
        if check.measure not in worst or check.severity > worst[check.measure].severity:
            worst[check.measure] = check
    return list(worst.values())
