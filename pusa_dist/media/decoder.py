"""The process that decodes what strangers upload; ``pusa_dist.media.decoders`` starts it and kills it.

For every file it forks, and the fork decodes under limits of its own. So every file is decoded in a process
that has seen no other and that started in milliseconds; a fork that comes to a bad end costs no more than
itself. Neither has an environment to tell of, and neither can write a file.
"""

import ctypes
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, BinaryIO

import cv2
from PIL import Image

from pusa_dist.errors import RequestError
from pusa_dist.media.probe import probe
from pusa_dist.media.source import InProcess
from pusa_dist.media.wire import END, FAILED, FRAME, HEADER, OUT_OF_MEMORY, READY, REFUSAL, RESULT, write

_MAX_OPEN_FILES = 32
_LAST_RESORT_S = 900
"""A fork ends after this long even if whoever would have killed it is dead."""
_PR_SET_PDEATHSIG = 1


def main(owner_fd: int) -> None:
    """Serve the requests that come over a socket, one after another, until it is closed."""
    Image.init()  # all that Pillow would import later, under the limits of a fork
    cv2.setNumThreads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_OPEN_FILES, _MAX_OPEN_FILES))
    owner = socket.socket(fileno=owner_fd)
    owner.sendall(HEADER.pack(READY, 0))
    while (order := _receive_order(owner)) is not None:
        request, data, pipe = order
        child = os.fork()
        if child == 0:
            owner.close()
            os._exit(_decode(request, data, pipe))
        os.close(pipe)
        del order, data
        _, status = os.waitpid(child, 0)
        how = os.WTERMSIG(status) if os.WIFSIGNALED(status) else _ENDS[os.WEXITSTATUS(status)]
        payload = str(how).encode()
        owner.sendall(HEADER.pack(END, len(payload)) + payload)


_ENDS = {0: 0, 1: FAILED, 2: OUT_OF_MEMORY}


def answer(request: Mapping[str, Any], data: bytes, pipe: BinaryIO) -> None:
    """Do with a file what is asked."""
    frames = InProcess()
    match request["operation"]:
        case "probe":
            write(pipe, RESULT, json.dumps(asdict(probe(data))).encode())
        case "image":
            write(pipe, FRAME, frames.image(data, **request["options"]))
            write(pipe, RESULT, b"null")
        case "clip":
            for frame in frames.clip(data, **request["options"]):
                write(pipe, FRAME, frame)
            write(pipe, RESULT, b"null")


def _decode(request: Mapping[str, Any], data: bytes, pipe_fd: int) -> int:
    """In the fork; returns its exit status."""
    try:
        _limit(request["memory_bytes"], request["cpu_s"])
        with open(pipe_fd, "wb") as pipe:
            try:
                answer(request, data, pipe)
            except RequestError as error:
                write(pipe, REFUSAL, json.dumps({"message": error.message, "code": error.code}).encode())
    except MemoryError:
        return 2
    except BaseException:  # noqa: BLE001 - the outermost frame of a process: its status says that it failed
        return 1
    return 0


def _limit(memory_bytes: int, cpu_s: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.alarm(_LAST_RESORT_S)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # at the second of the two it is SIGKILL


def _receive_order(owner: socket.socket) -> tuple[Mapping[str, Any], bytes, int] | None:
    """A request, its file and the pipe for the answer; None when the owner is gone."""
    header, files, _, _ = socket.recv_fds(owner, HEADER.size, 1)
    if not files:
        return None
    parts = [_receive(owner, HEADER.unpack(header)[1])]
    parts.append(_receive(owner, HEADER.unpack(_receive(owner, HEADER.size))[1]))
    return json.loads(parts[0]), bytes(parts[1]), files[0]


def _receive(owner: socket.socket, length: int) -> bytearray:
    received = bytearray(length)
    view = memoryview(received)
    while view:
        count = owner.recv_into(view)
        if not count:
            raise SystemExit  # the owner is gone
        view = view[count:]
    return received


if __name__ == "__main__":
    main(int(sys.argv[1]))
