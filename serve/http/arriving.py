"""Bodies on their way in: what ``receive`` of a request (ASGI) is wrapped in, so that none is too much or too slow."""

import asyncio
from collections.abc import Callable

from starlette.types import Message, Receive

from serve.http.errors import ServeError, upload_too_slow

SILENCE_S = 20.0
"""A body of which nothing comes for so long is given up."""
GRACE_S, LEAST_BYTES_PER_S = 30.0, 64 * 1024
"""How long a body may be waited for in all: so long, and a second more for so many bytes of it."""


def no_more_than(max_bytes: int, receive: Receive, refusal: Callable[[int], ServeError]) -> Receive:
    """``receive`` that raises ``refusal(max_bytes)`` as soon as more has come."""
    num_bytes = 0

    async def bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise refusal(max_bytes)
        return message

    return bounded


def paced(receive: Receive, take: Callable[[int], None]) -> Receive:
    """``receive`` of a body that has to keep coming, so that who vanishes in the middle holds nothing for long.

    Only the time of waiting for the client counts. What is returned raises ``ServeError`` 408 when that was too
    long, and what ``take`` raises.

    Args:
        receive: of the request.
        take: told how many bytes have come, before they are kept.
    """
    waited_s, num_bytes = 0.0, 0

    async def in_time() -> Message:
        nonlocal waited_s, num_bytes
        now = asyncio.get_running_loop().time
        began = now()
        left_s = GRACE_S + num_bytes / LEAST_BYTES_PER_S - waited_s
        try:
            async with asyncio.timeout(min(SILENCE_S, left_s)):
                message = await receive()
        except TimeoutError as error:
            raise upload_too_slow(num_bytes) from error
        waited_s += now() - began
        num_more = len(message.get("body", b""))
        take(num_more)
        num_bytes += num_more
        return message

    return in_time
