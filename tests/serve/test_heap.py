"""Memory that is free below something that is not, which glibc keeps until it is told; and imports."""

import gc
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


def test_what_is_imported_is_not_looked_through_for_garbage_then_or_later():
    with heap.importing():
        assert not gc.isenabled()
        imported = [[] for _ in range(1000)]
    try:
        assert gc.isenabled()
        assert not any(one is imported for one in gc.get_objects())  # frozen objects are not listed
    finally:
        gc.unfreeze()


def test_garbage_is_looked_for_again_after_an_import_that_failed():
    with pytest.raises(ImportError), heap.importing():
        raise ImportError
    gc.unfreeze()
    assert gc.isenabled()
