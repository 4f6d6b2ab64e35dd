"""The policy of replicas: alone, against a cluster of a few lines that obeys it, and as Ray Serve calls it."""

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given
from hypothesis import settings as how
from hypothesis import strategies as st

from cluster.autoscaling import DENOISER, GATEWAY, TEXT_ENCODER, VAE, Fleet, Settings, State, replicas
from cluster.ray_scaling import Application, Denoiser
from serve.policy.demand import NOTHING, Demand

SETTINGS = Settings(objective_s=120, cold_start_s=30, hold_s=60, idle_s=120)
ROLES = (DENOISER, TEXT_ENCODER, VAE)

settings = st.builds(
    Settings,
    objective_s=st.floats(1, 1000), cold_start_s=st.floats(0, 1000), hold_s=st.floats(1, 500),
    idle_s=st.floats(0, 900), queue_share=st.floats(0.05, 1), max_load=st.floats(0.1, 1), vae_s=st.floats(0, 60),
)  # fmt: skip


def told(age_s=100.0, started_at=1.0, **values):
    """What a dispatcher says, at some age of it."""
    return Demand(started_at=started_at, age_s=age_s, **values)


nothing_new = {"num_jobs": st.just(0), "backlog_s": st.just(0.0), "job_s": st.just(0.0)}
states = st.builds(
    State,
    last=st.none() | st.builds(told, age_s=st.floats(0, 99), asked_s=st.floats(0, 1e5), **nothing_new),
    load=st.floats(0, 1e3),
)


@st.composite
def fleets(draw):
    least = draw(st.integers(0, 20))
    most = draw(st.integers(max(1, least), 2000))
    target = draw(st.integers(least, most))
    return Fleet(ready=draw(st.integers(0, target)), target=target, least=least, most=most)


@st.composite
def demands(draw):
    num_jobs = draw(st.integers(0, 10_000))
    job_s = draw(st.floats(0, 1000)) if num_jobs else 0.0
    backlog_s = num_jobs * job_s * draw(st.floats(0, 1))
    return told(num_jobs=num_jobs, backlog_s=backlog_s, job_s=job_s, asked_s=backlog_s + draw(st.floats(0, 1e5)))


@given(demands(), st.fixed_dictionaries(dict.fromkeys((*ROLES, GATEWAY), fleets())), settings, states)
def test_bounds_are_kept(demand, of_roles, chosen, state):
    wanted, _ = replicas(demand, of_roles, chosen, state, 100.0)
    assert wanted.keys() == of_roles.keys()
    assert all(of_roles[role].least <= number <= of_roles[role].most for role, number in wanted.items())


@given(demands(), fleets(), settings, states, st.floats(0, 1e6))
@example(
    told(num_jobs=1, backlog_s=0.0, job_s=0.0, asked_s=0.0), Fleet(ready=0, target=0, least=0, most=1),
    SETTINGS, State(), 5e-324,
)  # fmt: skip
def test_more_backlog_never_asks_for_fewer_gangs(demand, fleet, chosen, state, more):
    assume(demand.num_jobs)
    larger = replace(demand, backlog_s=demand.backlog_s + more, asked_s=demand.asked_s + more)
    few, _ = replicas(demand, {DENOISER: fleet}, chosen, state, 100.0)
    many, _ = replicas(larger, {DENOISER: fleet}, chosen, state, 100.0)
    assert many[DENOISER] >= few[DENOISER]


@given(demands(), st.integers(2, 50), fleets(), fleets(), settings, states)
def test_more_jobs_of_the_same_kind_never_ask_for_fewer_of_any_role(demand, times, gangs, others, chosen, state):
    assume(demand.num_jobs)
    added = (times - 1) * demand.backlog_s
    larger = replace(
        demand,
        num_jobs=times * demand.num_jobs, backlog_s=times * demand.backlog_s, asked_s=demand.asked_s + added,
    )  # fmt: skip
    of_roles = {DENOISER: gangs, TEXT_ENCODER: others, VAE: others}
    few, _ = replicas(demand, of_roles, chosen, state, 100.0)
    many, _ = replicas(larger, of_roles, chosen, state, 100.0)
    assert all(many[role] >= few[role] for role in of_roles)


@dataclass
class Toy:
    """Gangs that work off a backlog in equal parts, and start late."""

    settings: Settings
    most: int
    job_s: float
    left_s: float = 0.0
    asked_s: float = 0.0
    now: float = 0.0
    target: int = 0
    state: State = field(default_factory=State)

    def __post_init__(self):
        self.ready_at = []
        self.targets = []
        self.vaes = self.texts = 0

    def arrive(self, num_jobs):
        self.left_s += num_jobs * self.job_s
        self.asked_s += num_jobs * self.job_s

    def second(self):
        ready = sum(at <= self.now for at in self.ready_at)
        num_jobs = math.ceil(self.left_s / self.job_s - 1e-9)
        job_s = self.job_s if num_jobs else 0.0
        demand = told(self.now, num_jobs=num_jobs, backlog_s=self.left_s, job_s=job_s, asked_s=self.asked_s)
        of_roles = {
            DENOISER: Fleet(ready=ready, target=self.target, least=0, most=self.most),
            TEXT_ENCODER: Fleet(ready=self.texts, target=self.texts, least=0, most=self.most),
            VAE: Fleet(ready=self.vaes, target=self.vaes, least=0, most=self.most),
        }
        wanted, self.state = replicas(demand, of_roles, self.settings, self.state, self.now)
        self.target, self.texts, self.vaes = (wanted[role] for role in ROLES)
        self.targets.append(self.target)
        self.ready_at = self.ready_at[: self.target]
        self.ready_at += [self.now + self.settings.cold_start_s] * (self.target - len(self.ready_at))
        # What rounding leaves of a job is none: no gang would be asked to work it off.
        self.left_s = max(0.0, self.left_s - min(ready, num_jobs)) if num_jobs else 0.0
        self.now += 1.0


@how(max_examples=20)
@given(st.integers(1, 40), st.floats(1, 60), st.integers(1, 8), st.sampled_from([10.0, 30.0, 90.0]))
@example(1, 1.0000000000000002, 1, 10.0)
def test_it_comes_back_from_zero_with_the_first_job_works_all_off_and_ends_at_zero(num_jobs, job_s, most, cold_start_s):
    toy = Toy(replace(SETTINGS, cold_start_s=cold_start_s), most, job_s)
    for _ in range(30):
        toy.second()
    assert not any(toy.targets)
    toy.arrive(num_jobs)
    toy.second()
    assert toy.target >= 1
    assert min(toy.texts, toy.vaes) >= 1
    while toy.left_s:
        toy.second()
        assert toy.target >= 1
        assert toy.now < 30 + cold_start_s + num_jobs * job_s + 10
    for _ in range(3000):
        toy.second()
    assert (toy.target, toy.texts, toy.vaes) == (0, 0, 0)
    fall = toy.targets[-3000:]
    assert fall == sorted(fall, reverse=True)


@how(max_examples=20)
@given(st.integers(5, 60), st.integers(1, 20))
def test_it_does_not_flap_under_steady_load(job_s, per_minute):
    toy = Toy(SETTINGS, 100, float(job_s))
    for second in range(7200):
        if int(second * per_minute / 60) != int((second - 1) * per_minute / 60):
            toy.arrive(1)
        toy.second()
    settled = toy.targets[3600:]
    changes = sum(one != other for one, other in pairwise(settled))
    assert changes <= 2, settled
    load = job_s * per_minute / 60
    assert load <= settled[-1] <= load / SETTINGS.max_load + 2


def test_a_burst_is_worked_off_within_the_objective():
    toy = Toy(SETTINGS, 1000, 20.0)
    toy.arrive(100)
    while toy.left_s > 2 * toy.job_s:  # the last jobs take their own time
        toy.second()
    assert toy.now <= SETTINGS.objective_s
    assert max(toy.targets) <= 100


def test_less_is_granted_only_after_a_while_and_then_what_was_enough():
    fleet = Fleet(ready=10, target=10, least=0, most=20)
    demand = told(num_jobs=50, backlog_s=300.0, job_s=20.0, asked_s=300.0)
    wanted, state = replicas(demand, {DENOISER: fleet}, SETTINGS, State(), 0.0)
    assert wanted[DENOISER] == 10
    busier = replace(demand, backlog_s=480.0)
    _, state = replicas(busier, {DENOISER: fleet}, SETTINGS, state, 30.0)
    wanted, state = replicas(demand, {DENOISER: fleet}, SETTINGS, state, 59.0)
    assert wanted[DENOISER] == 10
    wanted, _ = replicas(demand, {DENOISER: fleet}, SETTINGS, state, 61.0)
    assert wanted[DENOISER] == 8


def test_the_last_gang_goes_later_than_the_others():
    fleet, state, seen = Fleet(ready=4, target=4, least=0, most=9), State(), {}
    for now in range(200):
        wanted, state = replicas(NOTHING, {DENOISER: fleet}, SETTINGS, state, float(now))
        fleet = replace(fleet, ready=wanted[DENOISER], target=wanted[DENOISER])
        seen.setdefault(wanted[DENOISER], now)
    assert seen == {4: 0, 1: 60, 0: 120}


def test_vaes_follow_the_rate_of_the_gangs():
    gangs = Fleet(ready=40, target=40, least=40, most=40)
    followers = Fleet(ready=0, target=0, least=0, most=99)
    demand = told(num_jobs=500, backlog_s=5000.0, job_s=10.0, asked_s=0.0)
    of_roles = {DENOISER: gangs, TEXT_ENCODER: followers, VAE: followers}
    wanted, _ = replicas(demand, of_roles, replace(SETTINGS, vae_s=3.0, text_s=0.1), State(), 0.0)
    assert wanted[VAE] == math.ceil(4 * 3.0 / SETTINGS.max_load)  # 4 jobs a second
    assert wanted[TEXT_ENCODER] == 1


def test_gateways_follow_their_requests_and_nothing_changes_while_the_dispatcher_is_silent():
    of_roles = {
        GATEWAY: Fleet(ready=1, target=1, least=1, most=9, ongoing=350.0),
        DENOISER: Fleet(ready=3, target=3, least=0, most=9),
        "Dispatcher": Fleet(ready=1, target=1, least=1, most=1),
    }
    wanted, _ = replicas(None, of_roles, SETTINGS, State(), 0.0)
    assert wanted == {GATEWAY: 4, DENOISER: 3, "Dispatcher": 1}


@pytest.mark.parametrize("wrong", [{"objective_s": 0}, {"cold_start_s": -1}, {"max_load": 1.5}, {"queue_share": 0}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def context(demand=None, at=100.0, **values):
    stats = {} if demand is None else demand.stats()
    given = {
        "current_num_replicas": 0, "target_num_replicas": 0, "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 9, "total_num_requests": 0.0, "policy_state": {}, "current_time": 100.0,
        "raw_metrics": {name: {"a": [SimpleNamespace(timestamp=at, value=value)]} for name, value in stats.items()},
    }  # fmt: skip
    return SimpleNamespace(**given | values)


class Id(str):
    """A deployment's."""

    @property
    def name(self):
        return str(self)


BURST = told(num_jobs=20, backlog_s=400.0, job_s=20.0, asked_s=400.0)


def test_as_serve_calls_it_for_the_application():
    contexts = {Id(name): context() for name in (DENOISER, TEXT_ENCODER, VAE)}
    contexts[Id("Dispatcher")] = context(BURST, target_num_replicas=1)
    policy = Application(objective_s=120, cold_start_s=30)
    wanted, kept = policy(contexts)
    assert wanted[Id(DENOISER)] == 9
    assert wanted[Id(TEXT_ENCODER)] >= 1
    assert wanted[Id("Dispatcher")] == 1
    assert kept.keys() == contexts.keys()
    for name, one in contexts.items():
        one.policy_state = kept[name]
    assert policy(contexts)[0] == wanted


def test_as_serve_calls_it_for_the_denoiser_alone():
    policy = Denoiser()
    assert policy(context(BURST))[0] == 9
    assert policy(context(target_num_replicas=2))[0] == 2


def quiet(age_s, asked_s=0.0, started_at=1.0):
    return told(age_s, started_at, num_jobs=0, backlog_s=0.0, job_s=0.0, asked_s=asked_s)


class Service:
    """An application's policy, and what Serve hands to it and keeps for it."""

    def __init__(self, **settings):
        self._policy, self._kept = Application(**settings), {}

    @property
    def load(self):
        return self._kept[Id(DENOISER)]["pusa"].load

    def gangs(self, now, target, *reports):
        """How many are wanted when every replica's last report is one of these, that Serve thinks new."""
        raw = {
            name: {n: [SimpleNamespace(timestamp=now, value=one.stats()[name])] for n, one in enumerate(reports)}
            for name in NOTHING.stats()
        }
        gangs = context(current_time=now, target_num_replicas=target, raw_metrics=raw)
        gangs.policy_state = self._kept.get(Id(DENOISER), {})
        wanted, self._kept = self._policy({Id(DENOISER): gangs})
        return wanted[Id(DENOISER)]


def test_a_dispatcher_that_says_nothing_new_is_silent_however_often_gangs_repeat_it():
    service = Service()
    assert service.gangs(0.0, 2, BURST) == 9
    assert service.gangs(29.0, 2, BURST) == 9
    assert service.gangs(31.0, 2, BURST, BURST) == 2
    assert service.gangs(32.0, 2, BURST, replace(BURST, age_s=150.0)) == 9


@pytest.mark.parametrize("skew_s", [0.0, -1e6, 1e6])
def test_it_does_not_matter_what_time_it_is_at_the_dispatcher(skew_s):
    service = Service()
    for now in range(100):
        assert service.gangs(now, 2, replace(BURST, started_at=1e6 + skew_s, age_s=now)) == 9


def test_what_a_dead_dispatcher_had_been_asked_for_is_no_load():
    service = Service()
    for now in range(100):
        service.gangs(now, 1, quiet(now, 200_000.0), quiet(now - 1, 200_000.0))
    assert service.load == 0
    for now in range(100, 110):  # one gang has registered again, another repeats the dead one
        new = quiet(now - 99, started_at=1000.0)
        assert service.gangs(now, 1, new, quiet(99, 200_000.0)) <= 1
        assert service.gangs(now + 0.5, 1, quiet(99, 200_000.0)) <= 1
    assert service.load == 0


def test_a_restarted_dispatcher_whose_clock_is_behind_is_believed_when_the_old_one_is_silent():
    service = Service()
    assert service.gangs(0.0, 2, replace(BURST, started_at=1000.0)) == 9
    for now in range(1, 40):
        wanted = service.gangs(now, 2, replace(BURST, started_at=1000.0), quiet(now, started_at=500.0))
    assert wanted <= 2


def test_a_queue_that_a_restarted_dispatcher_finds_is_no_load():
    service = Service()
    for now in range(10):
        service.gangs(now, 1, NOTHING)
    for age_s in range(10):
        service.gangs(10 + age_s, 1, replace(BURST, age_s=float(age_s), asked_s=1e4))
    assert service.load == 0


@pytest.mark.parametrize("num_gangs", [0, 8])
def test_gangs_that_repeat_the_dispatcher_late_do_not_change_the_load(num_gangs):
    service, asked_s = Service(hold_s=600), [2.0 * second for second in range(7200)]  # two gangs' worth
    for now in range(60, 7200):
        late = [quiet(now - 2 - 5 * n, asked_s[now - 2 - 5 * n]) for n in range(num_gangs)]
        newest = [] if num_gangs and now % 3 else [quiet(now, asked_s[now])]  # by turns, as they push
        service.gangs(now, 3, *newest, *late)
    assert service.load == pytest.approx(2.0, rel=0.01)
