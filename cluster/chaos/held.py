"""What a Ray cluster holds: run as a program of its own, so that no Ray runs in the process that judges.

Actors are listed by a private function of Ray: the public one asks its dashboard, which the service does not start.
"""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.processes import command_of, roles

_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Held:
    """Counts."""

    placement_groups: int
    """That are not removed."""
    actors: int
    """That are not dead."""


def held_by(ancestor: int) -> Held:
    """What the Ray cluster below a process holds.

    Raises:
        RuntimeError: it cannot be asked.
    """
    (raylet,) = roles(ancestor)["raylet"]
    (address,) = [one.partition("=")[2] for one in command_of(raylet) if one.startswith("--gcs-address=")]
    command = [sys.executable, "-m", "cluster.chaos.held", address]
    environment = {"RAY_AUTH_MODE": "token", **os.environ}  # as a local cluster has it where nothing else is said
    asked = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment)
    if asked.returncode:
        raise RuntimeError(f"Ray does not tell what it holds:\n{asked.stderr[-2000:]}")
    return Held(**json.loads(asked.stdout.splitlines()[-1]))


def _main(address: str) -> None:
    import ray
    from ray._private import state
    from ray.util import placement_group_table

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    table_of_groups: Any = placement_group_table
    list_actors: Any = state.actors
    groups = Counter(one["state"] for one in table_of_groups().values())
    actors = Counter(one["State"] for one in list_actors().values())
    sys.stdout.write(json.dumps({"placement_groups": _but(groups, "REMOVED"), "actors": _but(actors, "DEAD")}) + "\n")
    ray.shutdown()


def _but(counts: "Counter[str]", state: str) -> int:
    return counts.total() - counts[state]


if __name__ == "__main__":
    _main(sys.argv[1])
