"""What every request goes through before a route: an id, a key check, a limit on its size.

Plain ASGI, so that bodies stream through and nothing is buffered here.
"""

import logging
import secrets
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.arriving import no_more_than
from serve.http.errors import (
    ServeError,
    body_too_large,
    error_response,
    outline,
    storage_unavailable,
)
from serve.http.tenants import Tenants
from serve.logs import about
from serve.store.database import DATABASE_AWAY
from serve.traces import Traces

logger = logging.getLogger(__name__)


class BrokenOffError(Exception):
    """The answer had begun when it failed; the server must break the connection off."""


class RequestSpans:
    """A span for every request that may change something; one that only looks, or streams, is none."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._traces.span("POST", Headers(scope=scope).get("traceparent")) as span:
            if span is None:
                await self._app(scope, receive, send)
                return

            async def seen(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    route = getattr(scope.get("route"), "path", None)
                    if route is not None:
                        span.update_name(f"POST {route}")
                await send(message)

            await self._app(scope, receive, seen)


class RequestIds:
    """Name and time every request, in the answer and in the log, and answer for what nobody expected.

    Args:
        app: the rest.
        clock: Unix seconds.
        on_reject: told the code and the status of every answer that is an error.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float], on_reject: Callable[[str, int], None]) -> None:
        self._app = app
        self._clock = clock
        self._on_reject = on_reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["arrived_at"] = self._clock()
        started = False

        async def named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
                if message["status"] >= 400:
                    self._on_reject(scope["state"].get("error_code", "other"), message["status"])
            await send(message)

        try:
            with about(request=request_id):
                await self._app(scope, receive, named)
        except ClientDisconnect:
            logger.debug("%s: %s %s: the client went away", request_id, scope["method"], scope["path"])
        except Exception as error:  # noqa: BLE001 - the outermost boundary: what is unexpected gets an answer
            logger.error("%s: %s %s failed: %s", request_id, scope["method"], scope["path"], outline(error))
            if started:
                raise BrokenOffError(request_id) from None
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
                tenant = await self._tenants.authenticate(Headers(scope=scope).get("authorization"))
            except ServeError as error:
                await error_response(error)(scope, receive, send)
                return
            except DATABASE_AWAY as error:
                logger.error("a key could not be looked up: the database failed: %s", type(error).__name__)
                await error_response(storage_unavailable())(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
            with about(tenant=tenant):
                await self._app(scope, receive, send)
            return
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
        await self._app(scope, no_more_than(self._max_bytes, receive, body_too_large), send)
