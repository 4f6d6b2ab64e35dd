"""What a gang's coordinator sees of ranks that start; they are stand-ins, and no Ray runs."""

import asyncio
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError

from pusa_dist.errors import GangError
from serve import gang
from serve.config import DenoiserConfig
from serve.gang import Gang


class FakeRank:
    """Makes itself, then joins, and answers pings once it is made, unless it is stopped."""

    def __init__(self, made_s: float, joining_s: float, is_stopped: bool = False) -> None:
        self.made_at, self.joining_s = time.monotonic() + made_s, joining_s
        self.is_stopped = is_stopped
        self.num_pings = 0
        self.dies = asyncio.Event()
        self.meeting_point = SimpleNamespace(remote=lambda: self.answer(("127.0.0.1", 1)))
        self.join = SimpleNamespace(remote=lambda *_: self.answer(None, self.joining_s, can_stop=True))
        self.place = SimpleNamespace(remote=lambda: self.answer((42, "node")))
        self.ping = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.pinged))

    async def answer(self, value, seconds=0.0, can_stop=False):
        dies = asyncio.ensure_future(self.dies.wait())
        being_made_s = max(0.0, self.made_at - time.monotonic())
        await asyncio.wait({dies}, timeout=being_made_s + (1000 if can_stop and self.is_stopped else seconds))
        dies.cancel()
        if self.dies.is_set():
            raise ActorDiedError
        return value

    async def pinged(self):
        self.num_pings += 1
        return await self.answer(None, can_stop=self.num_pings > 1)


def start(monkeypatch, *ranks, start_timeout_s=30.0):
    async def scenario():
        monkeypatch.setattr(gang.ray, "kill", lambda rank, **_: rank.dies.set())
        monkeypatch.setattr(gang, "START_SILENCE_S", 0.3)
        starting = Gang(DenoiserConfig(start_timeout_s=start_timeout_s), [rank() for rank in ranks])
        await starting.start()
        return starting

    return asyncio.run(scenario())


def test_a_rank_that_is_stopped_while_it_starts_is_found_long_before_the_start_is_given_up(monkeypatch):
    began = time.monotonic()
    with pytest.raises(GangError, match=r"1 of 2 ranks did not answer within START_SILENCE_S=0\.3"):
        start(monkeypatch, lambda: FakeRank(0.1, 1000), lambda: FakeRank(0.1, 1000, is_stopped=True))
    assert time.monotonic() - began < 5


def test_ranks_that_take_their_time_to_be_made_and_to_load_are_not_taken_for_dead(monkeypatch):
    started = start(monkeypatch, lambda: FakeRank(0.6, 1.0), lambda: FakeRank(0.0, 1.0))
    assert (started.error, started.pids) == (None, [42, 42])


def test_a_rank_that_dies_while_it_starts_is_rays_error(monkeypatch):
    def dying():
        rank = FakeRank(0.0, 1000)
        asyncio.get_running_loop().call_later(0.05, rank.dies.set)
        return rank

    with pytest.raises((ActorDiedError, GangError)):
        start(monkeypatch, lambda: FakeRank(0.0, 1000), dying)
