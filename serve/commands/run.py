"""``python -m serve run``, and without a command: a Ray of its own and the whole service in it, until Ctrl-C."""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pusa_dist.errors import ConfigError
from serve.commands.options import read_config
from serve.config import ServeConfig
from serve.scratch import scratch_folder
from serve.store.jobs import JobStore

APP_NAME = "pusa"
_MIN_CPUS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line says of a run."""
    parser.add_argument("--model", help="name or path of a model's configuration (default: debug)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--weights", metavar="DIR", help="folder of the model's weights")


def run(options: argparse.Namespace) -> int:
    """Run the service; returns the exit code.

    Raises:
        ConfigError: a configuration that cannot work.
    """
    config = read_config(options)
    config.load_model()
    if any(not role.num_replicas for role in (config.text_encoder, config.vae, config.denoiser)):
        raise ConfigError(
            "num_replicas=0 needs an autoscaling policy of the whole application, which only a Serve config file "
            "has: deploy one with 'serve run', such as configs/serve/scale-to-zero.yaml, or set num_replicas to 1"
        )
    return _serve(config, options.host, options.port)


def _serve(config: ServeConfig, host: str, port: int) -> int:
    stop = threading.Event()
    _make_folder(config.state_dir)
    _migrate(config.resolved_database_url)
    _check_port(host, port)
    started = time.perf_counter()
    _set_environment()
    import ray  # after the environment, which Ray reads when it is imported
    from ray import serve as ray_serve

    from serve.app import build_app, require_loopback

    require_loopback(config, host)
    stops: tuple[Any, ...] = (ray_serve.shutdown, ray.shutdown)
    # A short path: the sockets in it may have 107 characters.
    with scratch_folder("ray") as folder:
        ray.init(
            address="local",  # never join a cluster that happens to run on this machine
            num_cpus=max(_MIN_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )
        _on_signal(_interrupt)  # Ray has put its own handlers in place
        # Of Ray Serve itself; ours are as serve.logs says.
        quiet = {"log_level": "WARNING", "enable_access_log": False, "encoding": config.logs.upper()}
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config=quiet,
            )
            try:
                ray_serve.run(build_app(config), name=APP_NAME, logging_config=quiet)
            except RuntimeError as error:
                print(f"serve: {error}", *_reasons(ray_serve.status()), sep="\n", file=sys.stderr)
                return 1
            print(
                f"ready: http://{host}:{port} (model {config.model}, {time.perf_counter() - started:.1f} s)", flush=True
            )
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


def _make_folder(state_dir: str) -> None:
    try:
        Path(state_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state_dir={state_dir} cannot be made: {error}; choose another with --state") from error


def _migrate(database_url: str) -> None:
    """Find out before Ray starts whether there is a database that this version can use."""
    store = JobStore(database_url)
    store.create_tables()
    store.close()


def _check_port(host: str, port: int) -> None:
    """Find out before Ray starts, which says so late and at length."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another address with --host or --port"
        ) from error


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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray runs workers at nice 15 by default; on a shared machine a gang would starve beside anything else.
    os.environ.setdefault("RAY_worker_niceness", "0")
