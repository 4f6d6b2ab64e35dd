"""Who may write when, within a process."""

import threading
import time
from pathlib import Path

from serve.store.database import FirstComeLock
from serve.store.jobs import JobStore
from tests.serve.store_support import new_job


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


def test_a_database_file_is_its_owners_alone(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path}/state/jobs.sqlite")
    store.create_tables()
    store.create(new_job())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert modes["jobs.sqlite"] == 0o600
    assert set(modes.values()) == {0o600}
    store.close()
