"""What every request goes through before a route: an id, a key check, a limit on its size.

Plain ASGI, so that bodies stream through and nothing is buffered here.
"""

import logging
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.errors import ServeError, body_too_large, error_response
from serve.http.tenants import Tenants

logger = logging.getLogger(__name__)


class RequestIds:
    """Name every request, in the answer and in the log, and answer for what nobody expected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            logger.exception("%s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:  # too late for an answer; the server must break the connection off
                raise
            unexpected = ServeError(
                500, "internal_error", f"something went wrong here; quote {request_id} when you report it"
            )
            await error_response(unexpected)(scope, receive, named)


class Authentication:
    """Find the tenant, on every route, before anything of the body is read."""

    def __init__(self, app: ASGIApp, tenants: Tenants) -> None:
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] == "http":
            try:
                tenant = self._tenants.authenticate(Headers(scope=scope).get("authorization"))
            except ServeError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuse a body as soon as it is known to be too large: by its header, or while it streams in."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await error_response(body_too_large(self._max_bytes))(scope, receive, send)
            return
        num_received = 0

        async def limited() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_bytes:
                raise body_too_large(self._max_bytes)
            return message

        await self._app(scope, limited, send)
