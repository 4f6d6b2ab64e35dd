"""``cluster.autoscaling`` as Ray Serve calls it, by its import string.

Jobs do not pass through Serve's handles, so its own count of ongoing requests says nothing of them; the
dispatcher reports what they ask for as its autoscaling stats. A Serve config file names this class once
for the application; without that, the denoiser has it to itself, its gangs passing on what the
dispatcher told them, and cannot come back from zero.
"""

from collections.abc import Mapping
from typing import Any

from cluster.autoscaling import DENOISER, Fleet, Settings, State, replicas
from serve.policy.demand import Demand

_STATE = "pusa"
_SILENT_S = 30.0
"""What was reported longer ago than this says nothing."""


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
        fleets = {role: _fleet(context) for role, context in by_role.items()}
        states = [context.policy_state[_STATE] for context in contexts.values() if _STATE in context.policy_state]
        now = max((context.current_time for context in contexts.values()), default=0.0)
        wanted, state = replicas(
            _demand(by_role.values(), now), fleets, self._settings, states[0] if states else State(), now
        )
        decided = {deployment: wanted[deployment.name] for deployment in contexts}
        return decided, {deployment: {_STATE: state} for deployment in contexts}


class Denoiser:
    """Policy of the denoiser alone, for an application without one: ``python -m serve``.

    Args:
        settings: as of ``Application``.
    """

    def __init__(self, **settings: float) -> None:
        self._settings = Settings(**settings)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas, and what Serve keeps for the next call."""
        state = context.policy_state.get(_STATE, State())
        now = context.current_time
        demand = _demand([context], now)
        wanted, state = replicas(demand, {DENOISER: _fleet(context)}, self._settings, state, now)
        return wanted[DENOISER], {_STATE: state}


def _fleet(context: Any) -> Fleet:
    return Fleet(
        ready=context.current_num_replicas,
        target=context.target_num_replicas,
        least=context.capacity_adjusted_min_replicas,
        most=context.capacity_adjusted_max_replicas,
        ongoing=context.total_num_requests,
    )


def _demand(contexts: Any, now: float) -> Demand | None:
    """The newest report of the dispatcher, by whichever replica."""
    newest: tuple[float, dict[str, float]] | None = None
    for context in contexts:
        last = dict[Any, dict[str, Any]]()
        for name, by_replica in (context.raw_metrics or {}).items():
            for replica, series in by_replica.items():
                if series:
                    last.setdefault(replica, {})[name] = series[-1]
        for points in last.values():
            if "asked_s" not in points:
                continue
            at = points["asked_s"].timestamp
            if now - at <= _SILENT_S and (newest is None or at > newest[0]):
                newest = at, {name: point.value for name, point in points.items()}
    return None if newest is None else Demand.of_stats(newest[1])
