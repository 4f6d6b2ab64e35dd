"""Priority classes, and how a batch job grows old enough to be urgent."""

from typing import Literal

Priority = Literal["interactive", "batch"]
PATIENCE_S = 900.0
"""A batch job older than this counts as interactive, so that no stream of interactive jobs starves it."""


def is_urgent(priority: Priority, created_at: float, now: float, patience_s: float = PATIENCE_S) -> bool:
    """Whether a job counts as interactive; times are Unix seconds."""
    return priority == "interactive" or now - created_at > patience_s
