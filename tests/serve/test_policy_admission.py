import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.policy.admission import Held, Queued, claims


def queued(*names):
    """``a1`` is a job of tenant a, ``A1`` an urgent one."""
    return [Queued(id=name, tenant=name[0].lower(), is_urgent=name[0].isupper()) for name in names]


def held(*names, is_ahead=True):
    return [Held(tenant=name[0].lower(), is_urgent=name[0].isupper(), is_ahead=is_ahead) for name in names]


@pytest.mark.parametrize(
    ("waiting", "holding", "window", "room", "expected"),
    [
        (queued("A1", "A2", "A3"), [], 2, {}, ["A1", "A2"]),  # in order, up to the window
        (queued("A1"), held("A", "A", is_ahead=False), 1, {}, ["A1"]),  # those on gangs are not ahead of them
        (queued("A3", "B1", "B2"), held("A", "A"), 2, {}, ["B1"]),  # a window full of one tenant keeps nobody out
        (queued("A1", "A2"), held("a", "a"), 2, {}, ["A1"]),  # nor its own batch jobs an urgent one
        (queued("a1"), held("A", "A"), 2, {}, []),
        (queued("A1", "A2", "B1"), [], 9, {"a": 1}, ["A1", "B1"]),  # the quota
        (queued("A1"), held("A", is_ahead=False), 9, {"a": 1}, ["A1"]),  # of what may begin beside those
        (queued("A1"), [], 9, {"a": 0}, []),
    ],
)
def test_what_is_claimed(waiting, holding, window, room, expected):
    assert claims(waiting, holding, window=window, room=room) == expected


names = st.sampled_from("abcdABCD")


@settings(max_examples=60)
@given(
    waiting=st.lists(names, max_size=20),
    ahead=st.lists(names, max_size=8),
    placed=st.lists(names, max_size=8),
    window=st.integers(0, 8),
    room=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 5)),
)
def test_bounds_hold_and_no_tenant_is_kept_out(waiting, ahead, placed, window, room):
    jobs = [Queued(id=f"{name}{n}", tenant=name.lower(), is_urgent=name.isupper()) for n, name in enumerate(waiting)]
    holding = [*held(*ahead), *held(*placed, is_ahead=False)]
    chosen = claims(jobs, holding, window=window, room=room)
    claimed = [job for job in jobs if job.id in chosen]
    num_tenants_and_classes = 8
    assert len(ahead) + len(chosen) <= max(len(ahead), window) + num_tenants_and_classes
    for tenant in "abcd":
        assert sum(one.tenant == tenant for one in claimed) <= room.get(tenant, len(jobs))
        if any(job.tenant == tenant for job in jobs) and room.get(tenant, 1) > 0:
            # Something of it is prepared, or will be now.
            assert any(one.tenant == tenant for one in claimed) or tenant in {name.lower() for name in ahead}
