"""Memory that is free goes back to the machine.

glibc keeps what is free below something that is not: with tensors of many sizes, made on several threads, that
is some tens of MiB, more or less of them after every video.
"""

import ctypes


def trim() -> None:
    """Give back what this process holds and does not use; a few milliseconds. Nothing where libc is not glibc."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
