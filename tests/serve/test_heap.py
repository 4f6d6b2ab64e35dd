"""Memory that is free below something that is not: glibc keeps it until it is told."""

import os
import platform

import pytest

from cluster.processes import resident_mib
from serve import heap

PIECE = 100_000  # below what glibc maps for itself
NUM_PIECES = 2_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this machine's libc is not glibc")
def test_what_is_free_is_given_back():
    pieces = [bytearray(PIECE) for _ in range(NUM_PIECES)]
    above = bytearray(PIECE)
    held = resident_mib(os.getpid())
    pieces.clear()
    heap.trim()
    assert resident_mib(os.getpid()) < held - 0.8 * PIECE * NUM_PIECES / 2**20
    assert len(above) == PIECE
