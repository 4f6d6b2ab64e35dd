"""A stream of which the next item is made while the one before is used: a GPU need not wait for a disk."""

from collections.abc import Generator, Iterator
from concurrent.futures import Executor, wait
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T], thread: Executor) -> Generator[T, None, None]:
    """The same items, each asked for, on another thread, when the one before it is handed out.

    No more than one is ever waiting. Closing the iterator waits for the item that is being made, and makes no other.

    Args:
        items: what makes them; an error of it is raised in the place of the item.
        thread: the one that makes them. One for many streams: every thread that has made large tensors leaves
            some of their memory with the allocator.
    """
    # None is no item, but the end of them.
    made = thread.submit(next, items, None)
    try:
        while (item := made.result()) is not None:
            made = thread.submit(next, items, None)
            yield item
    finally:
        wait([made])
