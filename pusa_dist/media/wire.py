"""What a decoder process and its owner say to each other: messages of a kind, a length and bytes.

Over a socket the process says READY once it can work. A request is a REQUEST of JSON, with a pipe that the
answer is to be written to, and a FILE. Into that pipe go any number of FRAMEs, then one RESULT or REFUSAL
of JSON; over the socket comes an END, how the decoding ended: 0, the number of a signal, or OUT_OF_MEMORY
or FAILED. The pipe is the only thing that the code which sees the file can write to, and it is used once.
"""

import struct
from typing import Any, BinaryIO

HEADER = struct.Struct(">cQ")
"""Kind and length of a message."""
READY, REQUEST, FILE, END = b"0", b"Q", b"D", b"E"
FRAME, RESULT, REFUSAL = b"F", b"R", b"X"
OUT_OF_MEMORY, FAILED = 1001, 1002


def write(file: BinaryIO, kind: bytes, payload: Any) -> None:
    """Send one message; ``payload`` is anything with a contiguous buffer."""
    view = memoryview(payload).cast("B")
    file.write(HEADER.pack(kind, view.nbytes))
    file.write(view)
    file.flush()
