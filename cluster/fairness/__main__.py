"""Fair shares, measured: prints a table, and ends with 1 if a figure is missed.

The scenarios of one gang run against the real service, with the ``debug`` model, and again under virtual
time, where the scheduling policy of the service decides over gangs that compute nothing: one, then a thousand.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median

from cluster.fairness.outcome import Observation, delivered, jain, longest_wait_steps, slowdown
from cluster.fairness.real_run import real_service
from cluster.fairness.scenario import FOUR_EQUAL, HEAD_OF_LINE, TWO_TO_ONE, Scenario, crowd
from cluster.fairness.virtual_run import observe
from cluster.verdicts import Figure, are_met, at_least, at_most, table, told

MAX_SLOWDOWN = 2.2
MAX_WAIT_STEPS = 1.0
MAX_SHARE_ERROR = 0.1
MIN_JAIN = 0.97
MAX_WALL_S = 60.0

Observe = Callable[[Scenario], Observation]


def figures(run: Observe) -> Iterator[Figure]:
    """The figures of the three scenarios of one gang, however they are run."""
    yield from _head_of_line(HEAD_OF_LINE.name, run(HEAD_OF_LINE), ["B"], ["A"])
    got = delivered(run(TWO_TO_ONE), "AB")
    yield _share(TWO_TO_ONE.name, got["A"] / got["B"])
    yield _jain(FOUR_EQUAL.name, list(delivered(run(FOUR_EQUAL), "ABCD").values()))


def crowd_figures(run: Observe, scenario: Scenario) -> Iterator[Figure]:
    """The same figures of a crowd."""
    rare, heavy, equal = (
        [name for name in scenario.weights if name.startswith(kind)] for kind in ("rare", "heavy", "equal")
    )
    seen = run(scenario)
    yield from _head_of_line(scenario.name, seen, rare, [*heavy, *equal])
    got = delivered(seen, [*heavy, *equal])
    by_weight = [got[name] for name in heavy], [got[name] for name in equal]
    mean = [sum(group) / len(group) for group in by_weight]
    yield _share(scenario.name, mean[0] / mean[1])
    yield _jain(scenario.name, by_weight[1])


def real_figures() -> list[Figure]:
    """The figures of one gang of the real service, started for that."""
    with real_service("ABCD") as service:
        return [_of("real", one) for one in figures(service.observe)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m cluster.fairness", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gangs", type=int, default=1000, help="gangs in the large simulated scenario (default: %(default)s)"
    )
    parser.add_argument(
        "--tenants", type=int, default=200, help="tenants in the large simulated scenario (default: %(default)s)"
    )
    parser.add_argument(
        "--virtual-only", action="store_true", help="measure the policy under virtual time only; start no service"
    )
    arguments = parser.parse_args(argv)
    lines = [] if arguments.virtual_only else real_figures()
    began = time.perf_counter()
    virtual = [*figures(observe), *crowd_figures(observe, crowd(arguments.gangs, arguments.tenants))]
    wall_s = time.perf_counter() - began
    lines += [_of("virtual", one) for one in virtual]
    lines.append(at_most("virtual: all", "seconds of wall time", wall_s, MAX_WALL_S))
    sys.stdout.write(table(lines))
    return 0 if are_met(lines) else 1


def _of(kind: str, figure: Figure) -> Figure:
    return replace(figure, scenario=f"{kind}: {figure.scenario}")


def _head_of_line(scenario: str, seen: Observation, tenants: Sequence[str], others: Sequence[str]) -> Iterator[Figure]:
    yield at_most(scenario, "median latency by idle", slowdown(seen, tenants), MAX_SLOWDOWN)
    wait = longest_wait_steps(seen, tenants, others)
    yield at_most(scenario, "longest wait for the first step, in steps", wait, MAX_WAIT_STEPS)
    yield from _waits(scenario, seen, tenants)


def _waits(scenario: str, seen: Observation, tenants: Sequence[str]) -> Iterator[Figure]:
    """Told, not judged: whom those waited for whose latency is judged."""
    waits = [one.waits for one in seen.outcomes if one.tenant in tenants and one.waits]
    for role in waits[0] if waits else ():
        seconds = [one[role] for one in waits]
        yield told(scenario, f"median wait for the {role}, seconds", median(seconds))
        yield told(scenario, f"longest wait for the {role}, seconds", max(seconds))


def _share(scenario: str, ratio: float) -> Figure:
    must_be = f"2 within {MAX_SHARE_ERROR:.0%}"
    return Figure(scenario, "delivered cost 2:1", ratio, must_be, abs(ratio / 2 - 1) <= MAX_SHARE_ERROR)


def _jain(scenario: str, got: Sequence[float]) -> Figure:
    return at_least(scenario, "Jain index of equal tenants", jain(got), MIN_JAIN)


if __name__ == "__main__":
    sys.exit(main())
