from dataclasses import replace

from serve.policy.placement import Gang, Place, Release, orders
from serve.policy.tick import Claim, Resident


def resident(job_id, virtual_time, step=0, num_steps=10):
    """A job of its own tenant, whose steps cost one each."""
    claim = Claim(
        tenant=job_id, weight=1.0, virtual_time=virtual_time, step=0, num_steps=num_steps, step_cost=1.0,
        is_urgent=True, created_at=0.0,
    )  # fmt: skip
    return Resident(job_id=job_id, claim=claim, step=step)


ENDING = Gang(name="ending", residents=(resident("a", 80.0, step=9), resident("x", 105.0)), running="a")
BEGUN = Gang(name="begun", residents=(resident("b", 85.0, step=0),), running="b")


def test_the_first_in_order_gets_the_gang_that_is_next_free_though_another_waits_there():
    newcomer = resident("new", 91.0)  # nobody is as far as 101, where it would end
    assert orders([ENDING, BEGUN], [newcomer]) == [Place("new", "ending")]


def test_one_that_comes_after_those_who_wait_follows_where_there_is_a_place():
    assert orders([ENDING, BEGUN], [resident("late", 106.0)]) == [Place("late", "begun")]


def test_a_gang_in_the_middle_of_a_job_is_no_sooner_free_for_being_full():
    middle = Gang(name="middle", residents=(resident("a", 80.0, step=5), resident("x", 105.0)), running="a")
    assert orders([middle, BEGUN], [resident("new", 91.0)]) == [Place("new", "begun")]


def test_only_one_more_waits_beside_those_that_the_ranks_hold():
    assert orders([ENDING], [resident("new", 91.0), resident("second", 92.0)])[0] == Place("new", "ending")
    full = Gang(name="full", residents=(*ENDING.residents, resident("new", 91.0)), running="a")
    assert not any(isinstance(order, Place) for order in orders([full], [resident("second", 92.0)]))


def test_the_second_of_two_newcomers_goes_before_a_longer_job_that_was_given_its_place_ahead_of_time():
    furthest = Gang(name="furthest", residents=(resident("f", 98.0, step=2),), running="f")
    longer = resident("longer", 85.0, num_steps=20)  # ends at 105, the newcomers at 100: where the furthest is
    ending = Gang(name="ending", residents=(resident("a", 80.0, step=9), longer), running="a")
    one, two = resident("one", 90.0), resident("two", 90.0)
    made = orders([furthest, ending], [one, two])
    assert made == [Place("one", "furthest"), Release("longer", "ending"), Place("two", "ending")]
    # It does not take the place back.
    after = Gang(name="ending", residents=(resident("a", 80.0, step=9), two), running="a")
    full = Gang(name="furthest", residents=(*furthest.residents, one), running="f")
    assert orders([full, after], [longer]) == []


def doubtful(gang):
    return replace(gang, is_doubtful=True)


def test_a_doubtful_gang_gets_what_no_other_has_a_place_for():
    idle, shunned = Gang(name="idle"), doubtful(Gang(name="a-shunned", lora="merged"))
    one, two, three, four = (resident(name, 100.0 + n) for n, name in enumerate(("one", "two", "three", "four")))
    assert orders([shunned, idle], [one]) == [Place("one", "idle")]
    assert orders([shunned, BEGUN], [one]) == [Place("one", "begun")]  # though it must wait there
    assert orders([shunned, idle, BEGUN], [one, two, three]) == [
        Place("one", "idle"),
        Place("two", "begun"),
        Place("three", "a-shunned"),
    ]
    assert orders([shunned], [one, four]) == [Place("one", "a-shunned")]


def test_a_job_whose_place_is_being_made_is_not_given_to_a_doubtful_gang_meanwhile():
    waits = Gang(name="full", residents=(resident("a", 80.0, step=5), resident("x", 105.0)), running="a")
    emptying = Gang(name="emptying", residents=(resident("b", 80.0),), leaving=frozenset({"b"}))
    shunned = doubtful(Gang(name="shunned"))
    assert orders([shunned, waits], [resident("new", 101.0)]) == [Release("x", "full")]
    assert orders([shunned, emptying], [resident("new", 101.0)]) == []


def test_where_all_gangs_are_doubtful_nothing_is_different():
    newcomers = [resident("new", 91.0), resident("second", 92.0), resident("late", 106.0)]
    for gangs in ([ENDING, BEGUN], [BEGUN, Gang(name="idle")], [ENDING]):
        assert orders([doubtful(gang) for gang in gangs], newcomers) == orders(gangs, newcomers)
