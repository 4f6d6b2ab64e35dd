"""Who may write when, within a process."""

import threading
import time

from serve.store.database import FirstComeLock


def test_the_lock_is_held_by_one_at_a_time_and_given_in_the_order_it_was_asked_for() -> None:
    lock, order, holders = FirstComeLock(), [], []

    def take(number: int) -> None:
        with lock:
            holders.append(number)
            assert len(holders) == 1
            order.append(number)
            time.sleep(0.001)
            holders.clear()

    with lock:
        threads = [threading.Thread(target=take, args=(number,)) for number in range(10)]
        for number, thread in enumerate(threads):
            thread.start()
            while len(lock._waiting) <= number:  # it is in the queue
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(10))
    with lock:
        order.append(10)
    assert order[-1] == 10


def test_a_block_that_fails_hands_the_lock_on() -> None:
    lock = FirstComeLock()
    for _ in range(2):
        try:
            with lock:
                raise RuntimeError
        except RuntimeError:
            continue
