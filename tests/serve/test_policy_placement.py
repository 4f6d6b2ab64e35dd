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
