"""``python -m serve run``, and without a command: a Ray of its own and the whole service in it, until Ctrl-C."""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pusa_dist.errors import ConfigError
from serve.commands.options import add_store_arguments, read_config, read_file
from serve.commands.preflight import check_before_ray, check_resources
from serve.config import ServeConfig
from serve.scratch import scratch_folder

APP_NAME = "pusa"
_MIN_CPUS = 2
_HOST, _PORT = "127.0.0.1", 8000


@dataclass(frozen=True, slots=True)
class Address:
    """Where the service listens."""

    host: str
    port: int
    metrics_port: int | None
    """None: Ray takes any that is free."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line says of a run, over the file of ``--config``."""
    parser.description = (
        "Serves video generation over HTTP on this machine until Ctrl-C. Options override what --config says."
    )
    parser.add_argument("--model", help="name of a shipped model, or path to a model's YAML file (default: tiny)")
    parser.add_argument("--host", help=f"address to listen on (default: {_HOST})")
    parser.add_argument("--port", type=int, help=f"port to listen on (default: {_PORT})")
    parser.add_argument("--metrics-port", type=int, help="port of the Prometheus metrics (default: any that is free)")
    parser.add_argument("--weights", metavar="DIR", help="folder of the model's weights (default: the model's own)")
    parser.add_argument(
        "--require-keys",
        action="store_true",
        default=None,
        help="ask every request for an API key; make keys with 'python -m serve keys create'",
    )
    add_store_arguments(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the service; returns the exit code.

    Raises:
        ConfigError: a configuration that cannot work.
    """
    config = read_config(options)
    model = config.load_model()
    if any(not role.num_replicas for role in (config.text_encoder, config.vae, config.denoiser)):
        raise ConfigError(
            "num_replicas=0 needs an autoscaling policy of the whole application, which only a Serve config file "
            "has: deploy one with 'serve run', such as configs/serve/scale-to-zero.yaml, or set num_replicas to 1"
        )
    address = read_address(options)
    check_before_ray(config, model, address.host, address.port, address.metrics_port)
    if read_file(options.config).has_policy:
        print(
            f"serve: the autoscaling_policy of {options.config} is not used by 'python -m serve'; "
            f"Ray's 'serve run {options.config}' uses it",
            file=sys.stderr,
        )
    return _serve(config, address)


def read_address(options: argparse.Namespace) -> Address:
    """Where to listen: as the command line says, or else the file, or else on loopback.

    Raises:
        ConfigError: the file says something else than a host and a port.
    """
    http = read_file(options.config).http
    host = http.get("host", _HOST) if options.host is None else options.host
    port = http.get("port", _PORT) if options.port is None else options.port
    if not isinstance(host, str) or not isinstance(port, int):
        raise ConfigError(f"configuration {options.config}: http_options: give host as a text and port as a number")
    return Address(host, port, options.metrics_port)


def _serve(config: ServeConfig, address: Address) -> int:
    stop = threading.Event()
    started = time.perf_counter()
    _set_environment()
    import ray  # after the environment, which Ray reads when it is imported
    from ray import serve as ray_serve

    from serve.app import build_app

    stops: tuple[Any, ...] = (ray_serve.shutdown, ray.shutdown)
    # A short path: the sockets in it may have 107 characters.
    with scratch_folder("ray") as folder:
        ray.init(
            address="local",  # never join a cluster that happens to run on this machine
            num_cpus=max(_MIN_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
            _metrics_export_port=address.metrics_port,
        )
        _on_signal(_interrupt)  # Ray has put its own handlers in place
        # Of Ray Serve itself; ours are as serve.logs says.
        quiet = {"log_level": "WARNING", "enable_access_log": False, "encoding": config.logs.upper()}
        try:
            cluster_resources: Any = ray.cluster_resources
            check_resources(config, cluster_resources())
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={"host": address.host, "port": address.port},
                logging_config=quiet,
            )
            try:
                ray_serve.run(build_app(config), name=APP_NAME, logging_config=quiet)
            except RuntimeError as error:
                print(f"serve: {error}", *_reasons(ray_serve.status()), sep="\n", file=sys.stderr)
                return 1
            list_nodes: Any = ray.nodes
            metrics = f"metrics: http://127.0.0.1:{list_nodes()[0]['MetricsExportPort']}/metrics"
            seconds = time.perf_counter() - started
            ready = f"ready: http://{address.host}:{address.port} (model {config.model}, {seconds:.1f} s)"
            print(f"{ready}\n{metrics}", flush=True)
            _on_signal(lambda *_: stop.set())
            stop.wait()
            print("stopping", flush=True)
        except KeyboardInterrupt:
            print("stopping before it was ready", flush=True)
        finally:
            _on_signal(lambda *_: None)  # from here on it ends anyway, and should end well
            for end in stops:
                end()
    return 0


def _on_signal(handler: Callable[[int, Any], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _reasons(status: Any) -> list[str]:
    """What the deployments that are not healthy say of themselves."""
    deployments = status.applications[APP_NAME].deployments
    return [f"{name}: {one.message}" for name, one in deployments.items() if one.status != "HEALTHY"]


def _set_environment() -> None:
    os.environ.setdefault("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "2")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "2")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs workers at nice 15 by default; on a shared machine a gang would starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
