"""Items are made one ahead of their use: no earlier, no later, and none that nobody will use."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from pusa_dist.media.ahead import one_ahead


@pytest.fixture
def thread():
    with ThreadPoolExecutor(1) as pool:
        yield pool


class Making:
    """Makes numbers up to ``stop``, each when it is let to; counts what it has begun."""

    def __init__(self, stop: int, is_free: bool = True) -> None:
        self.stop, self.num_begun = stop, 0
        self.may, self.began = threading.Semaphore(stop if is_free else 0), threading.Semaphore(0)

    def __iter__(self):
        for number in range(self.stop):
            self.num_begun += 1
            self.began.release()
            assert self.may.acquire(timeout=10)
            yield number


def test_items_come_in_order_and_all_of_them(thread):
    assert list(one_ahead(iter(Making(5)), thread)) == [0, 1, 2, 3, 4]
    assert list(one_ahead(iter([]), thread)) == []


def test_the_next_item_is_made_while_one_is_used_and_no_more_than_that(thread):
    making = Making(4)
    for number in one_ahead(iter(making), thread):
        if number < 3:
            assert making.began.acquire(timeout=10)  # this one
        threading.Event().wait(0.05)
        assert making.num_begun == min(number + 2, 4)


def test_an_error_comes_in_the_place_of_its_item(thread):
    def two():
        yield 0
        yield 1
        raise ZeroDivisionError

    items = one_ahead(two(), thread)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert list(one_ahead(iter(Making(2)), thread)) == [0, 1]  # the thread serves the next stream


def test_whoever_stops_waits_for_the_item_that_is_being_made_and_no_other_is(thread):
    making = Making(5, is_free=False)
    making.may.release()
    items = one_ahead(iter(making), thread)
    assert next(items) == 0
    assert making.began.acquire(timeout=10)
    assert making.began.acquire(timeout=10)  # the second is being made
    stopping = threading.Thread(target=items.close)
    stopping.start()
    stopping.join(0.1)
    assert stopping.is_alive()
    making.may.release()
    stopping.join(10)
    assert not stopping.is_alive()
    assert making.num_begun == 2
