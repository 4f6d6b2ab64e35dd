"""A tensor that is lent stays as long as it may be needed, and no longer."""

import gc
import weakref

from serve.lending import KEPT_S, Lent


class Ref:
    def __init__(self, value):
        self.value = value


def test_what_is_lent_is_kept_for_a_while():
    now = [0.0]
    lent = Lent(Ref, lambda: now[0])
    first = lent.lend("tensor").ref
    assert first.value == "tensor"
    known = weakref.ref(first)
    del first
    now[0] = KEPT_S
    lent.lend("another")
    gc.collect()
    assert known() is not None
    now[0] = KEPT_S + 1
    lent.lend("a third")
    gc.collect()
    assert known() is None
