"""How many replicas every role should have: one pure function, for Ray Serve, the simulator and the tests.

Gangs are wanted for two reasons: so many that what waits is worked off within the latency objective,
those that still have to start counted from when they have; and so many that the load of the last
minutes does not exceed them, or the queue would have to grow to the objective before anything happened.
Text encoders and VAEs follow the rate at which the gangs finish jobs. More is granted at once; less only
when it was enough for a while, and the last replica goes later still, because a cold start is paid by
the next job.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from serve.policy.demand import Demand

DENOISER, TEXT_ENCODER, VAE, GATEWAY = "Denoiser", "TextEncoder", "Vae", "Gateway"
_NO_LOAD = 0.05
"""Gang-seconds a second: with less and without jobs, no gang is wanted. A mean over time never ends at 0."""
_SHORTEST_S = 1e-3
"""No job is thought to be shorter."""
_SLACK = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator decides."""

    objective_s: float = 120.0
    """What is asked for should have its last step by then."""
    cold_start_s: float = 60.0
    """From asking for a gang to its first step: a machine, an image, weights."""
    queue_share: float = 0.5
    """Of the objective that the work before a job may take; the rest is for its own steps and for bad luck."""
    max_load: float = 0.85
    """Of the gangs' time that is meant to be used; queues grow without bound towards 1."""
    hold_s: float = 120.0
    """Fewer replicas must have been enough for this long. Also the time over which the load is averaged."""
    idle_s: float = 300.0
    """None must have been needed for this long before the last goes."""
    text_s: float = 0.1
    """Replica-seconds that a job takes of the text encoder."""
    vae_s: float = 3.0
    """Replica-seconds that a job takes of the VAE."""
    gateway_requests: float = 100.0
    """Requests in progress, event streams among them, that a gateway should have."""

    def __post_init__(self) -> None:
        for name in ("objective_s", "hold_s", "gateway_requests"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("cold_start_s", "idle_s", "text_s", "vae_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be below 0")
        for name in ("queue_share", "max_load"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The replicas of a role."""

    ready: int
    target: int
    """As many there are or will be."""
    least: int
    most: int
    ongoing: float = 0.0
    """Requests that they have, or that wait for one of them."""


@dataclass(frozen=True, slots=True)
class Surplus:
    """Since when a role has had more than it wanted, and the most that it wanted in that time."""

    since: float
    peak: int


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the policy remembers from one call to the next."""

    last: Demand | None = None
    """Newest that the load has in it."""
    load: float = 0.0
    """Gang-seconds asked for in a second."""
    surplus: Mapping[str, Surplus] = field(default_factory=dict)


def replicas(
    demand: Demand | None, fleets: Mapping[str, Fleet], settings: Settings, state: State, now: float
) -> tuple[dict[str, int], State]:
    """Replicas that every role should have, and what to hand in the next time.

    Args:
        demand: of the dispatcher; None while it does not answer, which changes nothing for what depends on it.
        fleets: by role; roles that are not there are not decided.
        settings: the operator's.
        state: what this returned the last time; at first ``State()``.
        now: seconds of any clock that does not go back.
    """
    if demand is not None:
        state = _observed(demand, settings, state)
    wanted = {role: fleet.target for role, fleet in fleets.items()}
    if demand is not None and DENOISER in fleets:
        wanted[DENOISER] = _gangs(demand, fleets[DENOISER], settings, state.load)
    if demand is not None:
        gangs = _within(wanted[DENOISER], fleets[DENOISER]) if DENOISER in fleets else demand.num_jobs
        for role, seconds in ((TEXT_ENCODER, settings.text_s), (VAE, settings.vae_s)):
            if role in fleets:
                wanted[role] = _followers(demand, gangs, seconds, fleets[role], settings)
    if GATEWAY in fleets:
        wanted[GATEWAY] = math.ceil(fleets[GATEWAY].ongoing / settings.gateway_requests - _SLACK)
    surplus, targets = dict[str, Surplus](), dict[str, int]()
    for role, fleet in fleets.items():
        targets[role], left_over = _settled(_within(wanted[role], fleet), fleet, state.surplus.get(role), settings, now)
        if left_over is not None:
            surplus[role] = left_over
    return targets, replace(state, surplus=surplus)


def _observed(demand: Demand, settings: Settings, state: State) -> State:
    """The load, averaged over the dispatcher's own time; another dispatcher counts from anew."""
    last = state.last
    if last is None or last.started_at != demand.started_at:
        return replace(state, last=demand)
    seconds = demand.age_s - last.age_s
    if seconds <= 0:  # it is in the load
        return state
    keep = math.exp(-seconds / settings.hold_s)
    load = keep * state.load + (1 - keep) * max(0.0, demand.asked_s - last.asked_s) / seconds
    return State(last=demand, load=load, surplus=state.surplus)


def _gangs(demand: Demand, fleet: Fleet, settings: Settings, load: float) -> int:
    if not demand.num_jobs and load < _NO_LOAD:
        return 0
    for_load = math.ceil(load / settings.max_load - _SLACK)
    return max(for_load, min(demand.num_jobs, _gangs_for_backlog(demand.backlog_s, fleet.ready, settings)))


def _gangs_for_backlog(backlog_s: float, ready: int, settings: Settings) -> int:
    """The fewest, at least one, that work it off in time."""
    time_s = settings.objective_s * settings.queue_share
    if backlog_s <= ready * time_s:
        return max(1, math.ceil(backlog_s / time_s - _SLACK))
    # One that takes longer to start than there is time still does most of what comes after.
    new_s = max(time_s - settings.cold_start_s, 0.25 * time_s)
    # The slack of a backlog of next to nothing would leave it without any.
    return max(1, ready + math.ceil((backlog_s - ready * time_s) / new_s - _SLACK))


def _followers(demand: Demand, gangs: int, seconds: float, fleet: Fleet, settings: Settings) -> int:
    """Replicas of a stage that is passed by every job, at the rate at which so many gangs finish jobs."""
    least = 1 if demand.num_jobs or fleet.ongoing else 0
    if not demand.num_jobs:
        return max(least, fleet.target if fleet.ongoing else 0)
    # A stage with a call of every job that there is has no use for more replicas.
    rate = min(gangs, demand.num_jobs) / max(demand.job_s, _SHORTEST_S)
    return max(least, min(demand.num_jobs, math.ceil(rate * seconds / settings.max_load - _SLACK)))


def _within(wanted: int, fleet: Fleet) -> int:
    return max(fleet.least, min(fleet.most, wanted))


def _settled(
    wanted: int, fleet: Fleet, surplus: Surplus | None, settings: Settings, now: float
) -> tuple[int, Surplus | None]:
    """What is granted: more at once, less after a while."""
    target = _within(fleet.target, fleet)
    if wanted >= target:
        return wanted, None
    surplus = Surplus(now, wanted) if surplus is None else Surplus(surplus.since, max(surplus.peak, wanted))
    waited = now - surplus.since
    if surplus.peak == 0 and waited < settings.idle_s:
        return (target if waited < settings.hold_s else 1), surplus
    if waited < settings.hold_s:
        return target, surplus
    return surplus.peak, None
