"""A service of our own for as long as a ``with`` block lasts, for the demo and the measurements."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0


def free_port() -> int:
    """A loopback port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Service:
    """A service that was started, ready or not."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path


def start(
    model: str,
    state: Path,
    arguments: Sequence[str] = (),
    *,
    port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Service:
    """Start ``python -m serve`` on loopback, without waiting for it.

    Args:
        model: name or path of the model's configuration.
        state: folder for its database, artifacts and log (``service.log``, which is added to).
        arguments: further arguments of ``python -m serve``.
        port: to listen on; None: any.
        environment: of the process; None: this one's.
    """
    state.mkdir(parents=True, exist_ok=True)
    port = free_port() if port is None else port
    log = state / "service.log"
    command = [sys.executable, "-m", "serve", "--model", model, "--state", str(state), *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]  # whatever a configuration file says
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    return Service(f"http://127.0.0.1:{port}", process, log)


def wait_until_ready(service: Service, headers: Mapping[str, str] | None = None) -> None:
    """Wait for a service that was started; ``headers`` hold a key if it asks for one.

    Raises:
        RuntimeError: it ended or was not ready in time; the message ends with its last output.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if (code := service.process.poll()) is not None:
            raise RuntimeError(f"the service ended with {code}:\n{_tail(service.log)}")
        try:
            if httpx.get(f"{service.url}/health", headers=headers, timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # nobody listens yet, or nobody answers yet; the deadline ends the wait
        time.sleep(0.2)
    raise RuntimeError(f"the service was not ready within {START_TIMEOUT_S:g} s:\n{_tail(service.log)}")


def stop(service: Service) -> None:
    """Stop a service as Ctrl-C does, and wait for its end.

    Raises:
        TimeoutExpired: it did not end in time, and was killed.
    """
    service.process.send_signal(signal.SIGINT)
    try:
        service.process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        service.process.kill()
        raise


@contextmanager
def local_service(model: str, state: Path, arguments: Sequence[str] = ()) -> Iterator[str]:
    """Start a service, yield its URL when ready, stop it at the end; arguments and errors as of the above."""
    with running_service(model, state, arguments) as service:
        yield service.url


@contextmanager
def running_service(
    model: str,
    state: Path,
    arguments: Sequence[str] = (),
    *,
    settings: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Service]:
    """Start a service, yield it when ready, stop it at the end; arguments and errors as of the above.

    Args:
        model: as of ``start``.
        state: as of ``start``.
        arguments: as of ``start``.
        settings: of its configuration file; None: the defaults.
        headers: as of ``wait_until_ready``.
    """
    if settings is not None:
        state.mkdir(parents=True, exist_ok=True)
        config = state / "service.yaml"
        config.write_text(json.dumps(settings))  # which is YAML, too
        arguments = [*arguments, "--config", str(config)]
    service = start(model, state, arguments)
    try:
        wait_until_ready(service, headers)
        yield service
    finally:
        stop(service)


def serve_command(state: Path, *arguments: str) -> str:
    """Run ``python -m serve ...`` on the store in a folder, of a service or before there is one; what it printed.

    Raises:
        RuntimeError: the command failed; the message ends with its last output.
    """
    line = [sys.executable, "-m", "serve", *arguments, "--state", str(state)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"serve {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
