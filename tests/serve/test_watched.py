"""When work on a watched thread is stuck, by a clock that only the test moves."""

import threading

import pytest

from serve.watched import FIRST_TIMES, StuckError, WatchedThread

STUCK_S = 10.0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Work:
    """Goes on when it is told to, and says so if it is to."""

    def __init__(self, thread):
        self._thread, self._turns, self._done = thread, threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self._future = thread.submit(self._run)
        assert self._done.acquire(timeout=10)

    def _run(self):
        self._done.release()
        while self._turns.acquire(timeout=10) and not self._ended:
            self._thread.moves_on()
            self._done.release()

    def go_on(self):
        self._turns.release()
        assert self._done.acquire(timeout=10)

    def end(self):
        self._ended = True
        self._turns.release()
        self._future.result(10)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def thread(clock):
    thread = WatchedThread("decode", STUCK_S, clock)
    Work(thread).end()  # the first one has more time
    return thread


def test_an_idle_thread_is_well_however_long_it_is_idle(thread, clock):
    thread.check()
    clock.now += 1e6
    thread.check()


def test_work_that_does_not_move_on_is_stuck(thread, clock):
    work = Work(thread)
    clock.now += STUCK_S
    thread.check()
    clock.now += 1
    with pytest.raises(StuckError, match="decode: the work has not moved on for more than 10 s"):
        thread.check()
    work.end()
    thread.check()


def test_work_that_moves_on_may_take_any_time(thread, clock):
    work = Work(thread)
    for _ in range(20):
        clock.now += STUCK_S
        thread.check()
        work.go_on()
    work.end()


def test_what_waits_for_the_thread_is_not_what_is_slow(thread, clock):
    work = Work(thread)
    waiting = thread.submit(lambda: None)
    clock.now += STUCK_S
    work.end()
    waiting.result(10)
    thread.check()


def test_the_first_work_of_a_process_has_more_time(clock):
    thread = WatchedThread("text", STUCK_S, clock)
    work = Work(thread)
    clock.now += FIRST_TIMES * STUCK_S
    thread.check()
    clock.now += 1
    with pytest.raises(StuckError):
        thread.check()
    work.end()


def test_work_that_fails_is_not_stuck(thread, clock):
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 / 0).result(10)
    clock.now += 1e6
    thread.check()
