"""``cluster.autoscaling`` as Ray Serve calls it, by its import string.

Jobs do not pass through Serve's handles, so its own count of ongoing requests says nothing of them; the
dispatcher reports what they ask for as its autoscaling stats. A Serve config file names this class once
for the application; without that, the denoiser has it to itself, its gangs passing on what the
dispatcher told them, and cannot come back from zero.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from cluster.autoscaling import DENOISER, Fleet, Settings, State, replicas
from serve.policy.demand import NOTHING, Demand

_STATE, _HEARD = "pusa", "heard"
_NAMES = NOTHING.stats().keys()
_SILENT_S = 30.0
"""A dispatcher that has said nothing new for this long says nothing, however often gangs repeat it."""
Heard = Mapping[float, tuple[float, float]]
"""By start of a dispatcher: its age when it said what is newest of it, and when that was first seen here."""


class Application:
    """Policy of the application: ``autoscaling_policy: {policy_function: "cluster.ray_scaling:Application"}``.

    Args:
        settings: of ``cluster.autoscaling.Settings``, as ``policy_kwargs``.
    """

    def __init__(self, **settings: float) -> None:
        self._settings = Settings(**settings)

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Replicas by deployment, and what Serve keeps for the next call."""
        by_role = {deployment.name: context for deployment, context in contexts.items()}
        wanted, kept = _decided(by_role, self._settings)
        return {deployment: wanted[deployment.name] for deployment in contexts}, dict.fromkeys(contexts, kept)


class Denoiser:
    """Policy of the denoiser alone, for an application without one: ``python -m serve``.

    Args:
        settings: as of ``Application``.
    """

    def __init__(self, **settings: float) -> None:
        self._settings = Settings(**settings)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas, and what Serve keeps for the next call."""
        wanted, kept = _decided({DENOISER: context}, self._settings)
        return wanted[DENOISER], kept


def _decided(by_role: Mapping[str, Any], settings: Settings) -> tuple[dict[str, int], dict[str, Any]]:
    """Replicas by role, and what Serve keeps: the same for every deployment, and a new one has nothing yet."""
    states: list[dict[str, Any]] = [context.policy_state for context in by_role.values()]
    kept = next((state for state in states if _STATE in state), {})
    now = max((context.current_time for context in by_role.values()), default=0.0)
    reports = [demand for context in by_role.values() for demand in _reports(context)]
    heard = _heard(reports, kept.get(_HEARD, {}), now)
    fleets = {role: _fleet(context) for role, context in by_role.items()}
    wanted, state = replicas(_newest(reports, heard, now), fleets, settings, kept.get(_STATE, State()), now)
    return wanted, {_STATE: state, _HEARD: heard}


def _fleet(context: Any) -> Fleet:
    return Fleet(
        ready=context.current_num_replicas,
        target=context.target_num_replicas,
        least=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
        ongoing=context.total_num_requests,
    )


def _reports(context: Any) -> list[Demand]:
    """What the replicas of a deployment last told of the dispatcher."""
    last = dict[Any, dict[str, float]]()
    for name, by_replica in (context.raw_metrics or {}).items():
        for replica, series in by_replica.items():
            if series:
                last.setdefault(replica, {})[name] = series[-1].value
    # Serve counts requests there, too; and a dispatcher of another version may count otherwise.
    return [Demand.of_stats(one) for one in last.values() if one.keys() >= _NAMES]


def _heard(reports: Iterable[Demand], before: Heard, now: float) -> Heard:
    """Since when every dispatcher that is told of has said nothing new.

    By the clock of who decides alone: the dispatcher runs elsewhere, and so do the gangs that repeat it.
    """
    heard = dict[float, tuple[float, float]]()
    for demand in reports:
        age_s, since = heard.get(demand.started_at) or before.get(demand.started_at) or (-math.inf, now)
        heard[demand.started_at] = (demand.age_s, now) if demand.age_s > age_s else (age_s, since)
    return heard


def _newest(reports: Iterable[Demand], heard: Heard, now: float) -> Demand | None:
    """The last of the dispatcher that started last, of those that are not silent."""
    speaking = [one for one in reports if now - heard[one.started_at][1] <= _SILENT_S]
    return max(speaking, key=lambda one: (one.started_at, one.age_s), default=None)
