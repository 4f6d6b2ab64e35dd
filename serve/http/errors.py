"""What the API answers when it cannot do what was asked, in the OpenAI shape.

Every answer is ``{"error": {"message", "type", "param", "code"}}``: ``code`` is stable, ``message``
says what is wrong, with which value, and what to do instead. Translation of the engine's
``RequestError`` and of the framework's own refusals happens here and nowhere else.
"""

import logging
import traceback
from collections.abc import Mapping
from pathlib import PurePath

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from pusa_dist.errors import RequestError
from serve.http.views import Answer
from serve.policy.quota import Refusal
from serve.store.artifacts import StorageError
from serve.store.database import DATABASE_AWAY
from serve.store.job import UnreadableRowError

logger = logging.getLogger(__name__)

_KINDS = {429: "rate_limit_error"}
"""OpenAI's words where they are neither ``server_error`` nor ``invalid_request_error``."""


class ServeError(Exception):
    """An answer that is not what was asked for.

    All data is passed positionally to ``Exception`` so that it survives pickling across Ray.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        retry_after_s: int | None = None,
        should_retry: bool | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, message, param, retry_after_s, should_retry, headers)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        # The stock client tries 408, 409 and 429 again by itself; mostly that changes nothing.
        self.should_retry = status >= 500 if should_retry is None else should_retry
        self.headers = headers or {}

    def __str__(self) -> str:
        return self.message


def unauthenticated() -> ServeError:
    """401: no key, or one that is not ours."""
    return ServeError(
        401, "invalid_api_key", "no valid API key was given; send the header 'Authorization: Bearer <your key>'"
    )


def video_not_found(video_id: str) -> ServeError:
    """404: no such job, or another tenant's: the two look alike on purpose."""
    return ServeError(
        404, "video_not_found", f"video {video_id!r} does not exist; GET /v1/videos lists those that do", "video_id"
    )


def body_too_large(limit: int) -> ServeError:
    """413: more bytes than the gateway reads."""
    return ServeError(
        413, "body_too_large", f"the body has more than {limit} bytes; send smaller or fewer images and clips"
    )


def fields_too_large(limit: int) -> ServeError:
    """413: more of what is not media than any order needs."""
    return ServeError(
        413,
        "fields_too_large",
        f"the fields have more than {limit} bytes, media apart; shorten them, and send media as files of "
        "multipart/form-data or as data URLs in JSON",
    )


def upload_too_slow(num_bytes: int) -> ServeError:
    """408: the body stopped coming, or came too slowly."""
    return ServeError(
        408,
        "upload_too_slow",
        f"the body stopped or came too slowly after {num_bytes} bytes; send it again over a faster connection, "
        "or send smaller images and clips",
        should_retry=True,
        headers={"connection": "close"},
    )


def unreadable_job(job_id: str) -> ServeError:
    """503: another version of the service wrote the job, and this one does not know what it says."""
    return ServeError(
        503,
        "unreadable_job",
        f"video {job_id} was made by another version of this service, which this one cannot read; try again when "
        "the service is updated everywhere, or DELETE the video",
        "video_id",
        retry_after_s=30,
    )


def storage_unavailable() -> ServeError:
    """503: the disk is full, or the database does not answer."""
    return ServeError(
        503, "storage_unavailable", "jobs cannot be stored or read at the moment; try again later", retry_after_s=5
    )


def over_quota(refusal: Refusal) -> ServeError:
    """429: the tenant may not have this job, or not now."""
    return ServeError(429, refusal.code, refusal.message, refusal.param, refusal.retry_after_s, refusal.should_retry)


def moderation_unavailable() -> ServeError:
    """503: nobody can say whether this may pass, so it does not."""
    return ServeError(
        503, "moderation_unavailable", "the request could not be moderated; try again later", retry_after_s=5
    )


def tenant_erased() -> ServeError:
    """403: the operator has erased the tenant."""
    return ServeError(403, "tenant_erased", "this tenant was erased; ask the operator to set it up again")


def uploads_busy() -> ServeError:
    """503: the bodies that are here already take the memory there is for them."""
    return ServeError(
        503, "uploads_busy", "too many uploads are on their way at the moment; try again later", retry_after_s=5
    )


def too_many_streams(limit: int) -> ServeError:
    """429: one tenant watches very many jobs."""
    return ServeError(
        429,
        "too_many_streams",
        f"{limit} event streams of this tenant are open; close one, or poll the videos instead",
        retry_after_s=30,
    )


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    """What is wrong, with which value, and what to do instead."""
    type: str
    """OpenAI's word for the kind of error."""
    param: str | None = None
    """Field of the request that is wrong; None: no single one."""
    code: str
    """Stable reason, for programs."""


class ErrorBody(Answer):
    """Body of every answer that is not a success."""

    error: ErrorDetail
    """What went wrong, in OpenAI's shape."""


def outline(error: BaseException) -> str:
    """Kinds and places of an error and its causes, for a log: its own words may quote a prompt or a path."""
    parts = []
    one: BaseException | None = error
    while one is not None:
        frames = traceback.extract_tb(one.__traceback__)
        places = " > ".join(f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-6:])
        parts.append(f"{type(one).__name__} at {places or 'nowhere'}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "; because of ".join(parts)


class ErrorResponse(JSONResponse):
    """The answer for an error; leaves its code with the request, for whoever counts them."""

    def __init__(self, error: ServeError, body: ErrorBody, headers: dict[str, str]) -> None:
        super().__init__(body.model_dump(), error.status, headers)
        self._code = error.code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer (ASGI)."""
        scope.setdefault("state", {})["error_code"] = self._code
        await super().__call__(scope, receive, send)


def error_response(error: ServeError) -> JSONResponse:
    """The answer for an error; tells the stock client not to retry where that is pointless."""
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    param = None if error.param is None else _encodable(error.param)
    body = ErrorBody(error=ErrorDetail(message=_encodable(error.message), type=kind, param=param, code=error.code))
    headers = dict(error.headers)
    if not error.should_retry:
        headers["x-should-retry"] = "false"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return ErrorResponse(error, body, headers)


def _encodable(text: str) -> str:
    """Names come from the body, and JSON can spell half a surrogate pair, which no answer can hold."""
    return text.encode(errors="backslashreplace").decode()


def install_error_handlers(app: FastAPI) -> None:
    """Give every refusal, ours and the framework's, the same shape."""

    @app.exception_handler(ServeError)
    async def _ours(_: Request, error: ServeError) -> JSONResponse:
        return error_response(error)

    async def _database(request: Request, error: Exception) -> JSONResponse:
        reason = getattr(error, "orig", None) or error
        logger.error("%s %s: the database failed: %s", request.method, request.url.path, type(reason).__name__)
        return error_response(storage_unavailable())

    for failure in DATABASE_AWAY:
        app.add_exception_handler(failure, _database)

    @app.exception_handler(StorageError)
    async def _files(request: Request, error: StorageError) -> JSONResponse:
        logger.error("%s %s: the artifact store failed: %s", request.method, request.url.path, error)
        return error_response(storage_unavailable())

    @app.exception_handler(UnreadableRowError)
    async def _foreign(request: Request, error: UnreadableRowError) -> JSONResponse:
        logger.warning("%s %s: the row of job %s cannot be read", request.method, request.url.path, error.job_id)
        return error_response(unreadable_job(error.job_id))

    @app.exception_handler(RequestError)
    async def _engine(_: Request, error: RequestError) -> JSONResponse:
        return error_response(ServeError(400, error.code, error.message, error.param))

    @app.exception_handler(RequestValidationError)
    async def _query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        if first["type"] == "extra_forbidden":
            return error_response(ServeError(400, "unknown_field", f"unknown query parameter {name!r}", name))
        message = f"{name}={first.get('input')!r}: {first['msg']}"
        return error_response(ServeError(400, "invalid_value", message, name))

    @app.exception_handler(HTTPException)
    async def _framework(request: Request, error: HTTPException) -> JSONResponse:
        response = error_response(_from_http(request, error))
        response.headers.update(error.headers or {})
        return response


def _from_http(request: Request, error: HTTPException) -> ServeError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ServeError(404, "unknown_route", f"{where} does not exist; the routes are listed at /openapi.json")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return ServeError(405, "method_not_allowed", f"{where} is not possible; use {allowed}")
    if error.status_code == 400:  # Starlette's multipart parser
        return ServeError(400, "invalid_multipart", f"the multipart body cannot be read: {error.detail}")
    return ServeError(error.status_code, "http_error", str(error.detail))
