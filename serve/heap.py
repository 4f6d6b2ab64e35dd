"""What a long-lived process does about its memory: what is free goes back, what is there to stay is left alone."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import torch and the like in a sixth less time: nothing of it is garbage, and it is never looked through for any.

    Every gang and every job of it wait for these imports after a process was lost.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def trim() -> None:
    """Give back what this process holds and does not use; a few milliseconds. Nothing where libc is not glibc.

    glibc keeps what is free below something that is not: with tensors of many sizes, made on several threads, that
    is some tens of MiB, more or less of them after every video.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
