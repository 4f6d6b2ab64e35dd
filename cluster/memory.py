"""Memory that does not grow: many jobs of mixed shapes through one gang, and what every process holds after them.

Compares resident memory, by role, after the last job with that after an early one.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median

import httpx

from cluster.local_service import running_service
from cluster.orders import Order, completed
from cluster.processes import command_of, descendants, resident_mib, role_of
from cluster.verdicts import Figure, are_met, no_growth, table

MAX_GROWTH = 0.05
NUM_READINGS = 5
"""Of which the median counts: a single one depends on what the last videos happened to leave with the allocator."""
SETTLE_S = 3.0
"""After the last of some jobs, so that what is freed late is freed."""
WARM_UP_S = 300.0
"""Before the first measurement: in its first minutes a process of Ray grows by its age, with jobs or without
(idle, from the first minute to the sixth: raylet +1.2 of 33 MiB, dispatcher +4 of 403), and ever less after that."""
SHAPES = tuple((size, frames) for frames in (5, 9, 17) for size in ("64x64", "96x64", "64x96", "128x96", "96x96"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One of the service's."""

    pid: int
    role: str
    resident_mib: float
    """Of its own: the object store that it shares is sized, not grown."""


def growth(before: Iterable[Process], after: Iterable[Process]) -> list[Figure]:
    """What every role that was there before holds now; only processes that were there both times count."""
    lists = [list(before), list(after)]
    both = set.intersection(*({one.pid for one in several} for several in lists))
    was, now = (_by_role(one for one in several if one.pid in both) for several in lists)
    return [no_growth(role, "resident memory", held, now[role], MAX_GROWTH) for role, held in sorted(was.items())]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; exit code 1 when a role has grown."""
    parser = argparse.ArgumentParser(prog="python -m cluster.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200, help="jobs before the last measurement (default: %(default)s)")
    parser.add_argument(
        "--early", type=int, default=20, help="jobs before the first measurement (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if not 2 <= arguments.early < arguments.jobs:
        parser.error(f"--early {arguments.early} --jobs {arguments.jobs}: at least 2 early jobs, and more after them")
    with (
        tempfile.TemporaryDirectory(prefix="pusa-memory-") as folder,
        running_service("debug", Path(folder) / "state") as service,
        httpx.Client(base_url=service.url, timeout=60) as client,
    ):
        read = partial(processes, service.process.pid)
        _run(client, range(arguments.early // 2))
        time.sleep(WARM_UP_S)
        before = _held(client, range(arguments.early // 2, arguments.early), read)
        lines = growth(before, _held(client, range(arguments.early, arguments.jobs), read))
    sys.stdout.write(f"after {arguments.early} jobs and after {arguments.jobs}:\n{table(lines)}")
    return 0 if are_met(lines) else 1


def medians(readings: Sequence[Sequence[Process]]) -> list[Process]:
    """The processes of the last reading, with the median of what each held in all of them."""
    held: dict[int, list[float]] = defaultdict(list)
    for one in chain.from_iterable(readings):
        held[one.pid].append(one.resident_mib)
    return [replace(one, resident_mib=median(held[one.pid])) for one in readings[-1]]


def processes(ancestor: int) -> list[Process]:
    """The processes of a service; those without a role of their own are called by their program."""
    found = []
    for pid in (ancestor, *descendants(ancestor)):
        command = command_of(pid)
        if command and command[0] and not command[0].startswith("ray::IDLE"):
            role = role_of(command) or program(command)
            found.append(Process(pid=pid, role=role, resident_mib=resident_mib(pid)))
    return found


def program(command: Sequence[str]) -> str:
    """What runs: the module or script of a Python, else the file."""
    name = Path(command[0]).name
    if not name.startswith("python"):
        return name
    if "-m" in command:
        return f"python -m {command[command.index('-m') + 1]}"
    return next((Path(one).name for one in command if one.endswith(".py")), name)


def _held(client: httpx.Client, numbers: Sequence[int], read: Callable[[], list[Process]]) -> list[Process]:
    """Run the jobs, the last of them two by two with a reading after each two."""
    first, last = numbers[: -2 * NUM_READINGS], numbers[-2 * NUM_READINGS :]
    _run(client, first)
    readings = []
    for begin in range(0, len(last), 2):
        _run(client, last[begin : begin + 2])
        readings.append(read())
    return medians(readings)


def _run(client: httpx.Client, numbers: Sequence[int]) -> None:
    """Two at a time, so that the gang always has a second resident."""
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda number: _one(client, number), numbers):
            pass
    time.sleep(SETTLE_S)


def _one(client: httpx.Client, number: int) -> None:
    size, frames = SHAPES[number % len(SHAPES)]
    settings = {"num_frames": frames, "num_inference_steps": 2 + number % 3, "guidance_scale": 1.0 + 4.0 * (number % 2)}
    completed(client, Order(prompt=f"number {number}", seed=number, size=size, settings=settings))


def _by_role(several: Iterable[Process]) -> Mapping[str, float]:
    held: dict[str, float] = defaultdict(float)
    for one in several:
        held[one.role] += one.resident_mib
    return held


if __name__ == "__main__":
    sys.exit(main())
