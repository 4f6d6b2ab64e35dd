"""A stream of which the next item is made while the one before is used: a GPU need not wait for a disk."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items, each asked for, on a thread of its own, when the one before it is handed out.

    No more than one is ever waiting. Closing the iterator waits for the item that is being made, and makes no other.

    Args:
        items: what makes them; an error of it is raised in the place of the item.
    """
    with ThreadPoolExecutor(1, "ahead") as pool:
        # None is no item, but the end of them.
        made = pool.submit(next, items, None)
        while (item := made.result()) is not None:
            made = pool.submit(next, items, None)
            yield item
