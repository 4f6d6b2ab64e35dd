"""What is found out before the service starts, so that a mistake is a line at once and not a log minutes later."""

import os
import socket
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from pusa_dist.config import ModelConfig
from pusa_dist.errors import ConfigError
from pusa_dist.weights import check_files
from serve.config import RoleConfig, ServeConfig, require_loopback
from serve.store.jobs import JobStore

_GIB = 2**30
_BYTES = {"fp32": 4, "bf16": 2}
_ROUNDING = 1e-6
"""Of sums of fractional CPUs."""


def check_before_ray(config: ServeConfig, model: ModelConfig, host: str, port: int, metrics_port: int | None) -> None:
    """Check all that can be checked without Ray; makes the state folder and its database.

    Raises:
        ConfigError: the first thing that cannot work.
        DBAPIError: the database cannot be used.
    """
    require_loopback(config, host)
    check_memory(config, model, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    check_files(model)
    _make_folder(config.state_dir)
    _migrate(config.resolved_database_url)
    _check_port(host, port, "--host or --port")
    if metrics_port is not None:
        _check_port("127.0.0.1", metrics_port, "--metrics-port")


def check_memory(config: ServeConfig, model: ModelConfig, memory: int) -> None:
    """Refuse ranks on the CPU whose weights this machine cannot hold.

    Args:
        config: which says how many ranks there are, and that they have no GPU.
        model: whose weights each of them holds.
        memory: bytes of this machine.

    Raises:
        ConfigError: with GPUs it may be another matter, so it says how to ask for them.
    """
    if config.denoiser.device == "cuda":
        return  # there, every rank asks its own device
    ranks = config.denoiser.num_replicas * config.denoiser.parallel.world_size
    needed = ranks * model.num_weights * _BYTES[model.precision_on("cpu")]
    if needed > memory:
        raise ConfigError(
            f"denoiser.num_gpus=0 runs {model.name} on the CPU, where the weights of {ranks} ranks take "
            f"{needed / _GIB:.0f} GiB, and this machine has {memory / _GIB:.0f} GiB; on a machine with GPUs use "
            "--config configs/serve/single-node.yaml, or set denoiser.num_gpus in a file of your own"
        )


def check_resources(config: ServeConfig, available: Mapping[str, float]) -> None:
    """Refuse what would wait for ever: more than the only machine of the cluster has.

    Args:
        config: what is to run.
        available: amounts by resource, in Ray's names, before anything runs.

    Raises:
        ConfigError: naming the resource and the roles that ask for it.
    """
    asked: dict[str, dict[str, float]] = defaultdict(dict)
    for name, role, number in _roles(config):
        for resource, amount in {"CPU": role.num_cpus, "GPU": role.num_gpus, **role.resources}.items():
            asked[resource][name] = amount * number
    for resource, by_role in asked.items():
        total, here = sum(by_role.values()), available.get(resource, 0.0)
        if total > here + _ROUNDING:
            unit = f"{resource}s" if resource in ("CPU", "GPU") else resource
            listed = ", ".join(f"{name} {amount:g}" for name, amount in by_role.items() if amount)
            raise ConfigError(
                f"this configuration asks for {total:g} {unit} ({listed}) and this machine has {here:g}; use a machine "
                "that has them, or lower num_replicas, the gang's degrees, or what each replica asks for"
            )


def _roles(config: ServeConfig) -> Iterator[tuple[str, RoleConfig, int]]:
    """Every role, and how many processes of it ask for something at the start."""
    for name in ("gateway", "dispatcher", "text_encoder", "vae"):
        role: RoleConfig = getattr(config, name)
        yield name, role, role.num_replicas
    yield "denoiser", config.denoiser, config.denoiser.num_replicas * config.denoiser.parallel.world_size


def _make_folder(state_dir: str) -> None:
    try:
        Path(state_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state_dir={state_dir} cannot be made: {error}; choose another with --state") from error
    try:
        tempfile.TemporaryFile(dir=state_dir).close()  # asking for permissions would not see a read-only mount
    except OSError as error:
        raise ConfigError(
            f"state_dir={state_dir} cannot be written: {error.strerror}; choose another with --state"
        ) from error


def _migrate(database_url: str) -> None:
    """Whether there is a database that this version can use."""
    store = JobStore(database_url)
    store.create_tables()
    store.close()


def _check_port(host: str, port: int, flags: str) -> None:
    """Ray says so late and at length."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; choose another address with {flags}") from error
