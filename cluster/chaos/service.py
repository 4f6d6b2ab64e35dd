"""The service under test: started, killed whole and started again, looked into while it is idle, and stopped."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cluster import processes
from cluster.chaos.faults import TimedOutError, wait_for
from cluster.chaos.held import held_by
from cluster.chaos.records import stray_files
from cluster.chaos.verdict import Remains, Traces
from cluster.chaos.workload import TENANTS
from cluster.local_service import Service, free_port, serve_command, start, stop, wait_until_ready
from cluster.prometheus import STEPS, metrics_url, scrape_settled

CONFIG = Path(__file__).parents[2] / "configs/serve/chaos.yaml"
SHARED = {"max_resident": 2, "shared_forward_max_tokens": 10_000}
"""Of the denoiser, where jobs are to share forwards: two residents of a gang, and room for the tokens of both."""
TIDY_S = 90.0
"""Longest wait for what ends later than the jobs do: the sweep of dead attempts' files comes every 30 seconds."""
SETTLE_S = 3.0


def settings_of(config: Path, share_forwards: bool) -> dict[str, Any]:
    """What a Serve config file says of the service, as it is or so that jobs share forwards."""
    (application,) = yaml.safe_load(config.read_text())["applications"]
    settings: dict[str, Any] = application["args"]
    return settings | {"denoiser": settings["denoiser"] | SHARED} if share_forwards else settings


class Chaos:
    """A service under test, over the lives of its processes.

    Args:
        folder: for its state and its temporary files.
        settings: of its configuration file.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.state = folder / "state"
        self.temporary = folder / "t"
        self.temporary.mkdir()
        self._config = folder / "service.yaml"
        self._config.write_text(json.dumps(settings))  # which is YAML, too
        self._port = free_port()
        self.state.mkdir()
        self.keys = {tenant: serve_command(self.state, "keys", "create", tenant) for tenant in TENANTS}
        self.service = self._start()

    @property
    def checkpoint_every(self) -> int:
        """Steps that a job may lose by a fault."""
        return int(self.settings["denoiser"]["checkpoint_every"])

    @property
    def key(self) -> str:
        """One of the keys."""
        return self.keys[TENANTS[0]]

    def wait_until_ready(self) -> None:
        """See ``cluster.local_service``."""
        wait_until_ready(self.service, {"Authorization": f"Bearer {self.key}"})

    def kill_and_restart(self) -> int:
        """SIGKILL the driver and everything it has started, and start the service again on the same state folder."""
        struck = self.service.process.pid
        self.service.process.kill()
        processes.kill_all(os.getpid())
        self.service.process.wait()
        self.service = self._start()
        self.wait_until_ready()
        return struck

    def traces(self) -> Traces:
        """What the idle service takes."""
        wait_for_tidiness(self.state)
        time.sleep(SETTLE_S)
        by_role = processes.roles(self.service.process.pid)
        held = held_by(self.service.process.pid)
        return Traces(
            processes={role: len(pids) for role, pids in by_role.items()},
            placement_groups=held.placement_groups,
            actors=held.actors,
            stray_files=stray_files(self.state),
            memory_mib=processes.memory(by_role),
        )

    def num_forwards(self) -> float:
        """That its gangs have made, as its metrics tell when they change no more."""
        return scrape_settled(metrics_url(self.service.process.pid)).of(f"{STEPS}_count") or 0.0

    def stop(self) -> Remains:
        """Stop it as Ctrl-C does; returns what is left then."""
        stop(self.service)
        time.sleep(SETTLE_S)
        processes.reap()
        left = processes.descendants(os.getpid())
        return Remains(
            processes=[" ".join(processes.command_of(pid))[:80] for pid in left],
            temporary_files=sorted(path.name for path in self.temporary.iterdir() if not _is_cache(path)),
        )

    def _start(self) -> Service:
        environment = {**os.environ, "TMPDIR": str(self.temporary)}
        return start("debug", self.state, ["--config", str(self._config)], port=self._port, environment=environment)


def wait_for_tidiness(state: Path) -> None:
    """Give the service the time to remove what nobody needs; what is left after that is judged."""
    with suppress(TimedOutError):
        wait_for("no stray file", lambda: not stray_files(state), TIDY_S, pause_s=1.0)


def _is_cache(path: Path) -> bool:
    """Whether it is torch's, one folder for an account: not a file of any process."""
    return path.name.startswith("torchinductor_")
