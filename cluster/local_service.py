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


@dataclass(frozen=True, slots=True)
class Service:
    """One that runs."""

    url: str
    pid: int
    """Of ``python -m serve``, whose descendants all its other processes are."""
    state: Path
    """Folder of its database, artifacts and log."""

    def command(self, *arguments: str) -> str:
        """Run ``python -m serve ...`` on its store; returns what that printed.

        Raises:
            RuntimeError: the command failed; the message ends with its last output.
        """
        line = [sys.executable, "-m", "serve", *arguments, "--state", str(self.state)]
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(f"serve {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout.strip()


def free_port() -> int:
    """A loopback port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_service(model: str, state: Path, arguments: Sequence[str] = ()) -> Iterator[str]:
    """Start ``python -m serve`` on loopback, yield its URL when ready, stop it at the end; see ``running_service``."""
    with running_service(model, state, arguments) as service:
        yield service.url


@contextmanager
def running_service(
    model: str, state: Path, arguments: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> Iterator[Service]:
    """Start ``python -m serve`` on loopback, yield it when ready, stop it at the end.

    Args:
        model: name or path of the model's configuration.
        state: folder for its database, artifacts and log (``service.log``).
        arguments: further arguments of ``python -m serve``.
        settings: of its configuration file; None: the defaults.

    Raises:
        RuntimeError: it ended or was not ready in time; the message ends with its last output.
    """
    state.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{free_port()}"
    log = state / "service.log"
    command = [sys.executable, "-m", "serve", "--model", model, "--port", url.rpartition(":")[2], "--state", str(state)]
    if settings is not None:
        config = state / "service.yaml"
        config.write_text(json.dumps(settings))  # which is YAML, too
        command += ["--config", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *arguments], stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(url, process, log)
        yield Service(url, process.pid, state)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the service ended with {process.returncode}:\n{_tail(log)}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # nobody listens yet
        time.sleep(0.2)
    raise RuntimeError(f"the service was not ready within {START_TIMEOUT_S:g} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
