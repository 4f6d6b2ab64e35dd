"""``python -m serve node`` and ``python -m serve leave``: a machine that goes without costing anybody a job.

``node`` is ``ray start --block`` that, told to go (SIGTERM, as spot instances are), first has every gang
with a rank on this machine checkpoint its jobs and hand them over, each at its next step, and then stops
the node. ``leave`` does the first half alone: a Kubernetes preStop hook beside a ``ray start`` of its own.
"""

import argparse
import asyncio
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from pusa_dist.errors import ConfigError

NOTICE_S = 25.0
"""A spot instance is told to go at least this long before it is cut off."""


def node(ray_arguments: Sequence[str], notice_s: float = NOTICE_S) -> int:
    """Run a Ray node until it ends or SIGTERM or SIGINT comes; returns its exit code.

    Args:
        ray_arguments: of ``ray start``, such as ``--address=head:6379``.
        notice_s: longest time the hand-over is given.
    """
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *ray_arguments]
    # A group of its own: the signal that tells us to go must not reach Ray before the jobs have left.
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None:
        if told.wait(0.2):
            _hand_over_from_here(notice_s)
            process.send_signal(signal.SIGTERM)
            break
    return process.wait()


def leave(notice_s: float = NOTICE_S) -> int:
    """Have every gang with a rank on this machine hand over its jobs; returns how many jobs there were.

    Raises:
        ConfigError: no Ray node runs on this machine.
    """
    import ray

    ray_init: Any = ray.init
    try:
        ray_init(address="auto", logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(f"no Ray node was found on this machine: {error}; start one with ray start") from error
    try:
        return asyncio.run(_leave(ray.get_runtime_context().get_node_id(), notice_s))
    finally:
        ray.shutdown()


async def _leave(node_id: str, notice_s: float) -> int:
    import ray

    from serve.gang_replica import NAMESPACE

    list_actors: Any = ray.util.list_named_actors
    names = [one["name"] for one in list_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]

    async def ask(name: str) -> int:
        get_actor: Any = ray.get_actor
        try:
            async with asyncio.timeout(notice_s):
                return int(await get_actor(name, NAMESPACE).leave.remote(node_id))
        except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
            sys.stderr.write(f"serve: {name} handed nothing over: {type(error).__name__}\n")
            return 0

    return sum(await asyncio.gather(*(ask(name) for name in names)))


def _hand_over_from_here(notice_s: float) -> None:
    """``leave`` in a process of its own: whatever goes wrong in it must not keep the node from stopping."""
    try:
        subprocess.run([sys.executable, "-m", "serve", "leave"], timeout=notice_s + 5.0, check=False)
    except subprocess.TimeoutExpired:
        sys.stderr.write("serve: the hand-over was not done in time\n")


def parse_node(arguments: Sequence[str]) -> int:
    """``python -m serve node [arguments of ray start]``."""
    return node(arguments)


def parse_leave(arguments: Sequence[str]) -> int:
    """``python -m serve leave``: says how many jobs were handed over."""
    parser = argparse.ArgumentParser(prog="serve leave", description=leave.__doc__)
    parser.add_argument("--notice", type=float, default=NOTICE_S, metavar="S", help="longest wait (%(default)g)")
    options = parser.parse_args(arguments)
    sys.stdout.write(f"jobs handed over: {leave(options.notice)}\n")
    return 0
