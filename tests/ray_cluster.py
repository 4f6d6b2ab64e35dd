"""A Ray on this machine for the length of a test module."""

import logging
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import ray

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
_ACTORS = ("Coordinator", "Rank")


@contextmanager
def local_ray(num_cpus=4):
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False,
            logging_level=logging.WARNING, _temp_dir=folder,
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


def replica_processes():
    """Process ids of our own clusters by deployment; those of a gang's own actors as ``Coordinator`` and ``Rank``.

    Another Ray on this machine is nobody's to kill: only what this process started, at whatever depth, is found.
    """
    found = {}
    for pid in descendants(os.getpid()):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        # Such as ray::ServeReplica:pusa:Vae, or ray::Rank.step while it is in a call.
        if title.startswith("ray::ServeReplica:pusa:"):
            name = title.removeprefix("ray::ServeReplica:pusa:").partition(".")[0].partition(":")[0]
            found.setdefault(name, []).append(pid)
        elif (name := title.removeprefix("ray::").partition(".")[0].partition(":concurrency")[0]) in _ACTORS:
            found.setdefault(name, []).append(pid)
    return found


def descendants(ancestor):
    """Process ids below a process, at whatever depth, in the order in which they were started."""
    children = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, waiting = [], [ancestor]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return sorted(found)
