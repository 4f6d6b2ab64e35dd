"""What a simulation is to be trusted with: queues whose answer is known, and a cluster of thousands of GPUs in time."""

import math
import random
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice

from cluster.simulation.plan import JobClass, Plan, Pool, Stages, Tenant
from cluster.simulation.pool import serve
from cluster.verdicts import Figure, below, equal, near, told
from cluster.virtual.cluster import VirtualCluster
from cluster.virtual.event_loop import EventLoop
from cluster.virtual.job import Ask, Times

QUEUES = ((4, 0.6), (16, 0.75))
"""Gangs, and the part of their time that is asked for."""
TOLERANCE = 0.02
NUM_GPUS, NUM_JOBS, MOST_S = 8192, 200_000, 60.0
_GPUS_PER_GANG, _LOAD, _STEPS, _STEP_S = 8, 0.85, 10, 3.0
_SERVICE_S = 60.0


def check() -> Iterator[Figure]:
    """Every figure, as soon as it is there."""
    for servers, load in QUEUES:
        ratio = queue_ratio(servers, load)
        yield near(f"M/M/{servers} at {load:.0%}", "mean latency, simulated by known", ratio, TOLERANCE)
    began, began_cpu = time.perf_counter(), time.process_time()
    num_ended = large_run()
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    name = f"{NUM_GPUS:,} GPUs"
    yield equal(name, "jobs that ended", num_ended, NUM_JOBS)
    # Of processor time, so that a busy machine does not decide.
    yield below(name, "seconds of processor time", cpu_s, MOST_S)
    yield told(name, "seconds", wall_s)


def queue_ratio(servers: int, load: float, num_jobs: int = 15_000, seed: int = 5) -> float:
    """Mean latency of jobs of one tenant and exponential lengths that come at random, by what theory says."""
    rng, loop = random.Random(seed), EventLoop()
    cluster = VirtualCluster(loop, {}, servers, Times(poll_s=1.0), window=64, is_coarse=True)
    at = mean_s = 0.0
    for number in range(num_jobs):
        at += rng.expovariate(servers * load / _SERVICE_S)
        seconds = rng.expovariate(1 / _SERVICE_S)
        mean_s += seconds / num_jobs
        loop.at(at, partial(cluster.ask, Ask(id=f"{number:06d}", tenant="a", num_steps=1, step_s=seconds)))
    loop.run()
    simulated = sum(one.ended_at - one.asked_at for one in cluster.records.values()) / num_jobs
    # The closed form at the mean length and rate that were drawn: their own scatter is not the simulation's.
    return simulated / erlang_c_latency(servers, mean_s * num_jobs / at / servers, mean_s)


def erlang_c_latency(servers: int, load: float, service_s: float) -> float:
    """Mean time in an M/M/c system.

    Args:
        servers: c.
        load: of each, below 1.
        service_s: mean service time.
    """
    offered = servers * load
    top = offered**servers / math.factorial(servers) / (1 - load)
    waits = top / (sum(offered**k / math.factorial(k) for k in range(servers)) + top)
    return service_s * (1 + waits / (servers * (1 - load)))


def large_run() -> int:
    """Jobs that end of 200,000 that three tenants ask of 1,024 gangs, some of which fail."""
    gangs = NUM_GPUS // _GPUS_PER_GANG
    rate = _LOAD * gangs / (_STEPS * _STEP_S)
    plan = Plan(
        latency_s=180.0,
        part=0.95,
        hours=1.02 * NUM_JOBS / rate / 3600,
        jobs_per_hour=3600 * rate,
        tenants=(
            Tenant(name="studio", share=0.5, weight=2.0),
            Tenant(name="app", share=0.4),
            Tenant(name="nightly", share=0.1, priority="batch"),
        ),
        classes=(JobClass(name="usual", share=1.0, shape="usual", steps=_STEPS),),
        pools=(),
        stages=Stages(prepare_s=0.5, decode_s=3.0, release_s=2.0),
    )
    pool = Pool(
        name="large",
        gpus_per_gang=_GPUS_PER_GANG,
        dollars_per_gpu_hour=0.0,
        forward_s={"usual": _STEP_S},
        cold_start_s=240.0,
        gpu_hours_between_failures=5_000.0,
    )
    arrivals = list(islice(plan.arrivals(), NUM_JOBS))
    served = serve(plan, pool, gangs, arrivals=arrivals)
    return served.num_jobs - served.num_unfinished
