"""``python -m serve node`` and ``python -m serve leave``: a machine that goes without costing anybody a job.

``node`` is ``ray start --block`` that, told to go (SIGTERM, as spot instances are), first has every gang
with a rank on this machine checkpoint its jobs and hand them over, each at its next step, and then stops
the node. ``leave`` does the first half alone: a Kubernetes preStop hook beside a ``ray start`` of its own.
"""

import asyncio
import logging
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from pusa_dist.errors import ConfigError

NOTICE_S = 25.0
"""A spot instance is told to go at least this long before it is cut off."""


def run_node(ray_arguments: Sequence[str], notice_s: float = NOTICE_S) -> int:
    """Run a Ray node until it ends or SIGTERM or SIGINT comes; returns its exit code.

    Args:
        ray_arguments: of ``ray start``, such as ``--address=head:6379``.
        notice_s: longest time the hand-over is given.
    """
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-name={name}", *ray_arguments]
    # A group of its own: the signal that tells us to go must not reach Ray before the jobs have left.
    process = subprocess.Popen(command, start_new_session=True)
    while process.poll() is None:
        if told.wait(0.2):
            _hand_over(name, _address(ray_arguments), notice_s)
            process.send_signal(signal.SIGTERM)
            break
    return process.wait()


def leave(notice_s: float = NOTICE_S, node_name: str | None = None, address: str = "auto") -> int:
    """Have every gang with a rank on a node hand over its jobs; returns how many jobs there were.

    Args:
        notice_s: longest time it may take.
        node_name: of ``ray start``; None: the node of this machine.
        address: of the Ray cluster.

    Raises:
        ConfigError: there is no such cluster or node.
    """
    import ray

    ray_init: Any = ray.init
    list_nodes: Any = ray.nodes
    try:
        ray_init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except ConnectionError as error:
        raise ConfigError(f"no Ray node was found at address {address}: {error}; start one with ray start") from error
    try:
        named = {one["NodeName"]: one["NodeID"] for one in list_nodes()}
        if node_name is not None and node_name not in named:
            raise ConfigError(f"the cluster has no node called {node_name}; it has {', '.join(sorted(named))}")
        node_id = ray.get_runtime_context().get_node_id() if node_name is None else named[node_name]
        return asyncio.run(hand_over(node_id, notice_s))
    finally:
        ray.shutdown()


async def hand_over(node_id: str, notice_s: float) -> int:
    """Have every gang with a rank on the node hand over its jobs; returns how many jobs there were."""
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


def _hand_over(node_name: str, address: str, notice_s: float) -> None:
    """``leave`` in a process of its own: whatever goes wrong in it must not keep the node from stopping."""
    command = [sys.executable, "-m", "serve", "leave", "--notice", f"{notice_s:g}"]
    command += ["--node-name", node_name, "--address", address]
    try:
        subprocess.run(command, timeout=notice_s + 5.0, check=False)
    except subprocess.TimeoutExpired:
        sys.stderr.write("serve: the hand-over was not done in time\n")


def _address(ray_arguments: Sequence[str]) -> str:
    """What ``--address`` says, however it is written."""
    for index, argument in enumerate(ray_arguments):
        name, _, value = argument.partition("=")
        if name == "--address":
            return value or ray_arguments[index + 1]
    return "auto"
