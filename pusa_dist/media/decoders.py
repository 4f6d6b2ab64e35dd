"""A few processes that decode uploads and that can be killed: a bomb, a hang or a crash ends there.

Decoding runs native parsers over bytes that anyone may have made. Here it costs the caller a bounded wait,
whatever the bytes are. The processes are kept between files (see ``pusa_dist.media.decoder`` for how each
file still gets a process of its own) and replaced when they had to be killed. They import no torch.
"""

import contextlib
import json
import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pusa_dist.errors import PusaError, RequestError
from pusa_dist.media import wire
from pusa_dist.media.child import LOST, TOO_SLOW, DecoderLostError, DecoderProcess, End
from pusa_dist.media.frames import Frame
from pusa_dist.media.source import Frames
from pusa_dist.request import Fit, MediaInfo

logger = logging.getLogger(__name__)

_FAILED = "the decoder failed on it; convert it to PNG, or to MP4 with H.264"
_COMMAND = (sys.executable, "-P", "-m", "pusa_dist.media.decoder")


class DecodersBusyError(PusaError):
    """Too many files wait to be decoded; the same file may well be accepted later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """What decoding one file may cost."""

    num_bytes: int = 64 * 2**20
    """Size of the file."""
    wall_s: float = 30.0
    """Time that the caller waits for the decoder; what the caller does between frames does not count."""
    cpu_s: int = 20
    """Processor time."""
    memory_bytes: int = 3 * 2**29
    """Address space of the decoder, its libraries (about 400 MiB) included."""


class Decoders:
    """Decodes on up to ``num_processes`` processes; every method blocks and may be called from any thread.

    A process is started when it is first needed, or needed again.

    Args:
        num_processes: files decoded at the same time.
        limits: for each file.
        max_per_owner: of them for one owner, so that nobody has them all; None for no such bound.
        max_waiting: files of one owner that may wait; more are refused.
        command: starts a decoder.
    """

    def __init__(
        self,
        num_processes: int = 2,
        limits: DecodeLimits | None = None,
        *,
        max_per_owner: int | None = None,
        max_waiting: int = 16,
        command: Sequence[str] = _COMMAND,
    ) -> None:
        self._limits = limits or DecodeLimits()
        self._command = tuple(command)
        self._turns = Turns(num_processes, max_per_owner or num_processes, max_waiting)
        self._idle: list[DecoderProcess | None] = [None] * num_processes
        self._is_closed = False

    def probe(self, data: bytes, param: str | None = None, owner: str = "") -> MediaInfo:
        """``pusa_dist.media.probe.probe`` in another process.

        Args:
            data: the whole file.
            param: the field it came in, for the error.
            owner: on whose behalf.

        Raises:
            RequestError: the file cannot be used. Codes beyond those of ``probe``: ``media_too_large``,
                ``decoding_too_slow``, ``decoding_too_large`` and ``decoding_failed``.
            DecodersBusyError: ``owner`` has too many files waiting.
            DecoderLostError: the decoders do not work.
        """
        try:
            return _media_info(self._last(data, owner, "probe", {}))
        except RequestError as error:
            message = error.message.removeprefix("the file: ")
            raise RequestError(f"{param or 'the file'}: {message}", param, error.code) from error

    def image(self, data: bytes, width: int, height: int, fit: Fit) -> Frame:
        """See ``FrameSource.image``; may also raise DecoderLostError."""
        (frame,) = self._frames(data, "image", {"width": width, "height": height, "fit": fit})
        return frame

    def clip(self, data: bytes, start: int, stop: int | None, width: int, height: int, fit: Fit) -> Frames:
        """See ``FrameSource.clip``; may also raise DecoderLostError."""
        options = {"start": start, "stop": stop, "width": width, "height": height, "fit": fit}
        yield from self._frames(data, "clip", options)

    def close(self) -> None:
        """End the processes, those at work as soon as they are done."""
        self._is_closed = True
        while self._idle:
            process = self._idle.pop()
            if process is not None:
                process.kill()

    def _frames(self, data: bytes, operation: str, options: Mapping[str, Any]) -> Frames:
        shape = (options["height"], options["width"], 3)
        size = shape[0] * shape[1] * shape[2]
        for payload in self._answers(data, "", operation, options, size):
            yield np.frombuffer(payload, np.uint8).reshape(shape)

    def _last(self, data: bytes, owner: str, operation: str, options: Mapping[str, Any]) -> Any:
        answers = self._answers(data, owner, operation, options, 0)
        try:
            while True:
                next(answers)
        except StopIteration as end:
            return end.value

    def _answers(
        self, data: bytes, owner: str, operation: str, options: Mapping[str, Any], frame_bytes: int
    ) -> Generator[bytes, None, Any]:
        """Frames as they come, then the result; a decoder that was killed from outside is replaced once."""
        limits = self._limits
        if len(data) > limits.num_bytes:
            raise RequestError(
                f"the file has {len(data)} bytes; send one of at most {limits.num_bytes}", None, "media_too_large"
            )
        request = {
            "operation": operation, "options": options, "memory_bytes": limits.memory_bytes, "cpu_s": limits.cpu_s
        }  # fmt: skip
        with self._turns.taken(owner):
            for attempt in range(2):
                num_frames = 0
                try:
                    with self._process() as process:
                        answers = process.exchange(json.dumps(request).encode(), data, frame_bytes, limits.wall_s)
                        while True:
                            try:
                                frame = next(answers)
                            except StopIteration as end:
                                return end.value
                            num_frames += 1
                            yield frame
                except End as end:
                    # Killed by nothing that a file does: by an operator, or where memory is short.
                    if end.how not in (LOST, signal.SIGKILL, signal.SIGTERM) or num_frames or attempt:
                        raise self._explained(end) from None
                    logger.warning("a media decoder was killed from outside; trying the file again")
        raise AssertionError("unreachable")

    @contextlib.contextmanager
    def _process(self) -> Iterator[DecoderProcess]:
        if self._is_closed:
            raise DecoderLostError("the decoders are closed")
        process = self._idle.pop()
        try:
            if process is not None and not process.is_alive():
                process.kill()
                process = None
            if process is None:
                process = DecoderProcess(self._command)
            yield process
        finally:
            if process is not None and process.is_unsettled:
                process.kill()
                process = None
            self._idle.append(process)
            if self._is_closed:
                self.close()

    def _explained(self, end: End) -> Exception:
        limits = self._limits
        logger.warning("decoding a file ended badly: %s", end)
        if end.how in (TOO_SLOW, signal.SIGXCPU):
            seconds = limits.wall_s if end.how == TOO_SLOW else limits.cpu_s
            return RequestError(
                f"it takes more than {seconds:g} s to decode; send a shorter or a smaller one",
                None,
                "decoding_too_slow",
            )
        if end.how == wire.OUT_OF_MEMORY:
            return RequestError(
                f"it takes more than {limits.memory_bytes >> 20} MiB to decode; send a smaller one",
                None,
                "decoding_too_large",
            )
        if end.how == LOST:
            return DecoderLostError("the process that decodes was killed, and so was its replacement")
        return RequestError(_FAILED, None, "decoding_failed")


class Turns:
    """Who may decode now: bounded in all, per owner, and in how many may wait."""

    def __init__(self, total: int, per_owner: int, max_waiting: int) -> None:
        self._free = total
        self._per_owner = per_owner
        self._max_waiting = max_waiting
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._changed = threading.Condition()

    def num_waiting(self, owner: str) -> int:
        """Of one owner."""
        return self._waiting[owner]

    @contextlib.contextmanager
    def taken(self, owner: str) -> Iterator[None]:
        """Wait for a turn, and have it inside.

        Raises:
            DecodersBusyError: too many of the owner wait.
        """
        with self._changed:
            if self._waiting[owner] >= self._max_waiting:
                raise DecodersBusyError(f"{self._max_waiting} files are waiting to be decoded; try again later")
            self._waiting[owner] += 1
            self._changed.wait_for(lambda: self._free > 0 and self._running[owner] < self._per_owner)
            self._waiting[owner] -= 1
            self._free -= 1
            self._running[owner] += 1
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._running[owner] -= 1
                for counts in (self._running, self._waiting):
                    if not counts[owner]:
                        del counts[owner]
                self._changed.notify_all()


def _media_info(values: Any) -> MediaInfo:
    match values:
        case {"kind": "image" | "clip" as kind, "width": int(w), "height": int(h), "num_frames": int(n)} if (
            min(w, h, n) > 0
        ):
            return MediaInfo(kind=kind, width=w, height=h, num_frames=n)
    raise RequestError(_FAILED, None, "decoding_failed")
