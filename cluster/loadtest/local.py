"""A service of our own under load: keys for its tenants, its first process for faults, its metrics' address."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.loadtest.drive import Target
from cluster.loadtest.settings import require
from cluster.loadtest.workload import Tenant
from cluster.local_service import running_service, serve_command
from cluster.prometheus import metrics_url


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """It runs."""

    target: Target
    pid: int
    """Of its first process; all others are below it."""
    metrics_url: str


@contextmanager
def own_service(model: str, config: Path, state: Path, tenants: Mapping[str, Tenant]) -> Iterator[Local]:
    """Start a service that these tenants have keys and weights in, and stop it at the end.

    Args:
        model: that it serves.
        config: of the service; it must ask for keys.
        state: folder for its database, artifacts and log.
        tenants: by name.
    """
    keys: dict[str, str | None] = {}
    for name, tenant in tenants.items():
        keys[name] = serve_command(state, "keys", "create", name).splitlines()[-1]
        if tenant.weight != 1.0:
            serve_command(state, "tenants", "set", name, "--weight", str(tenant.weight))
    headers = {"Authorization": f"Bearer {next(iter(keys.values()))}"}
    with running_service(model, state, ["--config", str(config)], headers=headers) as service:
        pid = service.process.pid
        yield Local(target=Target(url=service.url, keys=keys), pid=pid, metrics_url=metrics_url(pid))


def ranks_per_gang(config: Path) -> int:
    """Of a Serve config file."""
    (application,) = yaml.safe_load(config.read_text())["applications"]
    denoiser = application["args"].get("denoiser", {})
    require(denoiser.get("num_replicas", 1) >= 1, f"{config}: the denoiser has no replica")
    ranks = 1
    for axis, usual in (("cfg_degree", 1), ("ring_degree", 1), ("ulysses_degree", 2)):
        ranks *= int(denoiser.get(axis, usual))
    return ranks
