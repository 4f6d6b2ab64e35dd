"""A service of our own for as long as a ``with`` block lasts, for the demo and the measurements."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


def free_port() -> int:
    """A loopback port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_service(model: str, state: Path, arguments: Sequence[str] = ()) -> Iterator[str]:
    """Start ``python -m serve`` on loopback, yield its URL when ready, stop it at the end.

    Args:
        model: name or path of the model's configuration.
        state: folder for its database, artifacts and log (``service.log``).
        arguments: further arguments of ``python -m serve``.

    Raises:
        RuntimeError: it ended or was not ready in time; the message ends with its last output.
    """
    state.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{free_port()}"
    log = state / "service.log"
    command = [sys.executable, "-m", "serve", "--model", model, "--port", url.rpartition(":")[2], "--state", str(state)]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *arguments], stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(url, process, log)
        yield url
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
