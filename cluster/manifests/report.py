"""The table that an operator reads: a row a subject, then what was found, then one line of totals."""

from collections.abc import Sequence

from cluster.manifests.finding import Result


def report(results: Sequence[Result]) -> str:
    """Text of all results; its last line counts checks, findings and what was skipped, by name."""
    subjects = list(dict.fromkeys(one.subject for one in results))
    rows = [("subject", "checks", "clean", "findings", "skipped", "to fill in")]
    for subject in subjects:
        mine = [one for one in results if one.subject == subject]
        rows.append(
            (
                subject,
                str(len(mine)),
                str(sum(not one.findings and one.skipped is None for one in mine)),
                str(sum(len(one.findings) for one in mine)),
                str(sum(one.skipped is not None for one in mine)),
                str(sum(len(one.notes) for one in mine)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for note in dict.fromkeys(note for one in results for note in one.notes):
        lines.append(f"to fill in ({', '.join(one.subject for one in results if note in one.notes)}): {note}")
    for one in results:
        lines += [f"{one.subject}: {one.check}: {found.where}: {found.message}" for found in one.findings]
    return "\n".join([*lines, _last_line(results)])


def _last_line(results: Sequence[Result]) -> str:
    num_findings = sum(len(one.findings) for one in results)
    skipped = [one for one in results if one.skipped is not None]
    reasons = []
    for check, reason in dict.fromkeys((one.check, one.skipped) for one in skipped):
        subjects = ", ".join(one.subject for one in skipped if (one.check, one.skipped) == (check, reason))
        reasons.append(f"{check} of {subjects}: {reason}")
    text = f"{len(results)} checks, {num_findings} findings, {len(skipped)} skipped"
    return f"{text} ({'; '.join(reasons)})" if skipped else text
