"""Comparison with recorded tensors of the public code: ``python -m pusa_dist parity DIR``."""

from pusa_dist.parity.runner import run

__all__ = ["run"]
