"""How many GPUs of which pool a workload needs, and what they cost: ``python -m cluster.simulation``.

A day of jobs runs under virtual time, through the functions that decide in the service (``serve.policy``,
``cluster.autoscaling``). For every pool the least fixed number of gangs that meets the objective is
looked for, and then what autoscaling up to somewhat more would cost. Everything printed is simulated.
"""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import configs
from cluster import verdicts
from cluster.simulation.answer import answers, table
from cluster.simulation.check import check
from cluster.simulation.plan import load_plan
from cluster.simulation.replay import compare, read_replay


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print; 1 if no pool meets the objective."""
    parser = argparse.ArgumentParser(prog="python -m cluster.simulation", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(next(iter(configs.__path__))) / "simulation/example.yaml",
        help="YAML of the workload, the objective and the pools of GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--max-gpus", type=int, default=8192, help="largest number of GPUs in a pool (default: %(default)s)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        help="compare the simulation with a real run instead: a load test's folder, or its jobs.jsonl",
    )
    parser.add_argument("--check", action="store_true", help="check the simulation against closed-form results instead")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            return _judge(check())
        if arguments.against:
            return _judge(compare(read_replay(arguments.against)))
        plan = load_plan(arguments.config)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"simulation: {error}\n")
        return 2
    began = time.perf_counter()
    found = [answer for pool in plan.pools for answer in answers(plan, pool, max_gpus=arguments.max_gpus)]
    sys.stdout.write(table(found))
    without = [pool.name for pool in plan.pools if all(one.pool is not pool for one in found)]
    if without:
        sys.stdout.write(f"\nNot with {arguments.max_gpus} GPUs or fewer: {', '.join(without)}.\n")
    met = sorted((one for one in found if one.is_met), key=lambda one: one.dollars_per_hour)
    objective = f"{plan.part:.0%} within {plan.latency_s:g} s"
    if met:
        best = met[0]
        gpus = best.served.most_gangs * best.pool.gpus_per_gang
        sys.stdout.write(
            f"\n{objective}: cheapest with {best.pool.name}, {best.how}, up to {gpus} GPUs, "
            f"${best.dollars_per_hour:.2f} an hour.\n"
        )
    else:
        sys.stdout.write(f"\n{objective}: with none of these pools.\n")
    num_jobs = found[0].served.num_jobs if found else 0
    sys.stdout.write(f"Simulated {num_jobs} jobs a run in {time.perf_counter() - began:.1f} s in all.\n")
    return 0 if met else 1


def _judge(figures: Iterable[verdicts.Figure]) -> int:
    lines = list(figures)
    sys.stdout.write(verdicts.table(lines))
    return 0 if verdicts.are_met(lines) else 1


if __name__ == "__main__":
    sys.exit(main())
