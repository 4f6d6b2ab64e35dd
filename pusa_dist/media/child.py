"""One process that decodes, as its owner holds it: start it, ask it, give it so much time, kill it.

Whoever writes the answer may be in a stranger's hands by then, so what it says is read as a stranger's.
"""

import contextlib
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn

from pusa_dist.errors import PusaError, RequestError
from pusa_dist.media import wire

_MAX_JSON_BYTES = 4096
_CHUNK = 1 << 20
_START_S = 60.0
_GRACE_S = 1.0
_CODE = re.compile(r"[a-z_]{1,40}")
TOO_SLOW, LOST = "took too long and was killed", "was killed from outside"


class End(Exception):  # noqa: N818 - not yet an error: whoever asked explains it
    """An end without a result.

    ``how``: the number of a signal, ``wire.OUT_OF_MEMORY``, ``wire.FAILED``, TOO_SLOW or LOST.
    """

    def __init__(self, how: int | str) -> None:
        super().__init__(how if isinstance(how, str) else f"status {how}")
        self.how = how


class DecoderLostError(PusaError):
    """No fault of the file: decoders cannot start, or were killed from outside more than once."""


class DecoderProcess:
    """One decoder; not for several threads at once."""

    def __init__(self, command: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        # Nothing of this process's environment, which holds secrets, and a group of its own to be killed as.
        environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OPENBLAS_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd="/",
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        self._is_ready = False
        self.is_unsettled = False
        """Whether it is in the middle of something, so that it can be used for nothing else."""

    def is_alive(self) -> bool:
        """Whether it runs, or sleeps."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it and whatever it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._socket.close()

    def exchange(self, request: bytes, data: bytes, frame_bytes: int, wall_s: float) -> Generator[bytes, None, Any]:
        """Ask, and give what comes back; time in which nothing is awaited here does not count.

        Returns:
            The result, once the decoding has ended well.

        Raises:
            RequestError: the decoder's refusal.
            DecoderLostError: it did not start.
            End: it ended badly, or has to be killed.
        """
        self._await_ready()
        self.is_unsettled = True
        clock = _Clock(wall_s)
        ours, theirs = os.pipe()
        with open(ours, "rb", buffering=0) as pipe:
            os.set_blocking(ours, False)
            try:
                self._send_order(request, theirs, data, clock)
            finally:
                os.close(theirs)
            kind, payload = yield from _frames(pipe, frame_bytes, clock)
        how = self._how_it_ended(clock)
        self.is_unsettled = False
        if how != 0 or kind is None:
            raise End(how or wire.FAILED)
        return _refuse(payload) if kind == wire.REFUSAL else _parsed(payload)

    def _await_ready(self) -> None:
        if self._is_ready:
            return
        try:
            kind, _ = self._message(_Clock(_START_S))
        except End as end:
            if end.how == LOST and self._process.returncode in (-signal.SIGKILL, -signal.SIGTERM):
                raise
            raise DecoderLostError(f"a media decoder cannot start: {end}") from end
        self._is_ready = kind == wire.READY

    def _send_order(self, request: bytes, pipe: int, data: bytes, clock: "_Clock") -> None:
        try:
            clock.wait(self._socket.fileno(), select.POLLOUT)
            socket.send_fds(self._socket, [wire.HEADER.pack(wire.REQUEST, len(request))], [pipe])
            for part in (request, wire.HEADER.pack(wire.FILE, len(data)), data):
                view = memoryview(part)
                while view:
                    clock.wait(self._socket.fileno(), select.POLLOUT)
                    with contextlib.suppress(BlockingIOError):
                        view = view[self._socket.send(view[:_CHUNK]) :]
        except (BrokenPipeError, ConnectionError):
            raise self._lost() from None

    def _how_it_ended(self, clock: "_Clock") -> int:
        kind, payload = self._message(clock)
        if kind != wire.END or not payload.isdigit():
            raise End(wire.FAILED)
        return int(payload)

    def _message(self, clock: "_Clock") -> tuple[bytes, bytes]:
        def receive(length: int) -> bytes:
            clock.wait(self._socket.fileno(), select.POLLIN)
            try:
                return self._socket.recv(length)
            except ConnectionError:
                return b""

        kind, length = wire.HEADER.unpack(_whole(receive, wire.HEADER.size) or self._raise_lost())
        return kind, (_whole(receive, length) or self._raise_lost()) if length else b""

    def _lost(self) -> End:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_S)
        return End(LOST)

    def _raise_lost(self) -> NoReturn:
        raise self._lost()


class _Clock:
    """Time left for waiting."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self, file: int, event: int) -> None:
        """Return when a pipe or a socket is ready, or broken.

        Raises:
            End: no time is left.
        """
        poll = select.poll()
        poll.register(file, event)
        started = time.monotonic()
        ready = self._left > 0 and poll.poll(self._left * 1000)
        self._left -= time.monotonic() - started
        if not ready:
            raise End(TOO_SLOW)


def _frames(pipe: io.RawIOBase, frame_bytes: int, clock: _Clock) -> Generator[bytes, None, tuple[bytes | None, bytes]]:
    """Give the frames of an answer; returns kind and payload of what comes after them, kind None if nothing does.

    Whoever writes may be in a stranger's hands by now: what it sends is read as a stranger's.
    """

    def receive(length: int) -> bytes:
        clock.wait(pipe.fileno(), select.POLLIN)
        return pipe.read(length) or b""

    while True:
        header = _whole(receive, wire.HEADER.size)
        if header is None:
            return None, b""
        kind, length = wire.HEADER.unpack(header)
        is_expected = length == frame_bytes if kind == wire.FRAME else length <= _MAX_JSON_BYTES
        if kind not in (wire.FRAME, wire.RESULT, wire.REFUSAL) or not is_expected:
            raise End(wire.FAILED)
        payload = _whole(receive, length)
        if payload is None:
            return None, b""
        if kind != wire.FRAME:
            return kind, payload
        yield payload


def _whole(receive: Callable[[int], bytes], length: int) -> bytes | None:
    """Exactly so many bytes; None if the end comes before."""
    received = bytearray()
    while len(received) < length:
        chunk = receive(min(length - len(received), _CHUNK))
        if not chunk:
            return None
        received += chunk
    return bytes(received)


def _parsed(payload: bytes) -> Any:
    try:
        return json.loads(payload)
    except (ValueError, RecursionError):
        raise End(wire.FAILED) from None


def _refuse(payload: bytes) -> NoReturn:
    match _parsed(payload):
        case {"message": str(message), "code": str(code)} if _CODE.fullmatch(code) and message.isprintable():
            raise RequestError(message[:500], None, code)
    raise End(wire.FAILED)
