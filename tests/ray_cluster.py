"""A Ray on this machine for the length of a test module."""

import logging
import os
import tempfile
from contextlib import contextmanager

import ray

from cluster.processes import roles

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
_RAYS_OWN = ("Controller", "Proxy", "gcs_server", "raylet")


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
    return {role: pids for role, pids in roles(os.getpid()).items() if role not in _RAYS_OWN}
