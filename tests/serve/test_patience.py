"""Work that waits until the stores are back."""

import asyncio
import errno

import pytest
from sqlalchemy.exc import IntegrityError, InternalError, OperationalError

from serve.patience import MAX_PAUSE_S, patiently
from serve.store.artifacts import StorageError

AWAY = [
    StorageError(errno.EIO, "no answer"),
    OperationalError("UPDATE", {}, Exception("cut")),
    InternalError("UPDATE", {}, Exception("a standby takes no writes")),
]


def work_that_meets(errors):
    left = list(errors)

    async def work():
        if left:
            raise left.pop()
        return "done"

    return work


def test_pauses_double_up_to_a_minute(monkeypatch):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    monkeypatch.setattr("serve.patience.asyncio.sleep", sleep)
    assert asyncio.run(patiently(work_that_meets(AWAY * 4))) == "done"
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert pauses[-2:] == [MAX_PAUSE_S, MAX_PAUSE_S]


@pytest.mark.parametrize("error", [ValueError("a bug"), TimeoutError(), IntegrityError("INSERT", {}, Exception())])
def test_what_says_nothing_of_an_outage_is_raised_at_once(error):
    with pytest.raises(type(error)):
        asyncio.run(patiently(work_that_meets([error])))
