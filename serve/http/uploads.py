"""Reading a body: a form or JSON in, the same plain fields and media bytes out.

The stock client always sends multipart; people and other clients send JSON. Both say the same things:
plain fields, our own under ``pusa``, and media as files, as data URLs, or (for an extension) as the id
of a video made here. Media by URL is only noted here: see ``serve.http.media``.

What is not media is bounded before it is parsed or checked: one body must not stop the event loop, on which
every other request is answered, nor take many times its size of memory.
"""

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from pusa_dist.errors import RequestError
from serve.http.arriving import no_more_than
from serve.http.errors import ServeError, fields_too_large
from serve.http.schemas import PusaBody, unknown_field

URLENCODED = "application/x-www-form-urlencoded"
FORMS = ("multipart/form-data", URLENCODED)
MAX_PARTS = 1000
MAX_FIELDS_BYTES = 256 * 1024
"""Of all that is not media: several times the longest prompts, percent-encoded."""
MAX_VALUES = 4000
"""Objects, lists and members in JSON."""
MAX_NUMBER_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Upload:
    """One image or clip as it came in."""

    param: str
    """Where in the body it was, for errors."""
    data: bytes
    """What it is, its content says; what the sender called it is not kept."""

    @property
    def identity(self) -> bytes:
        """What tells it from other media when a request is repeated."""
        return self.data


@dataclass(frozen=True, slots=True)
class MediaUrl:
    """One image or clip that lies somewhere else, as its URL was written."""

    param: str
    url: str = field(repr=False)

    @property
    def identity(self) -> bytes:
        """What tells it from other media when a request is repeated."""
        return b"url:" + self.url.encode(errors="surrogatepass")


@dataclass(frozen=True, slots=True)
class VideoReference:
    """A video made here, by its id."""

    param: str
    id: str

    @property
    def identity(self) -> bytes:
        """What tells it from other media when a request is repeated."""
        return b"id:" + self.id.encode(errors="surrogatepass")


Media = Upload | MediaUrl | VideoReference


@dataclass(frozen=True, slots=True)
class IncomingBody:
    """A body, whatever it was written in."""

    fields: dict[str, Any]
    """Everything but the media; not validated yet."""
    media: tuple[Media, ...]
    """In the order they were sent."""


async def read_body(request: Request, media_field: str, max_inputs: int, max_bytes: int) -> IncomingBody:
    """Read the body of a request that may carry media in ``media_field``.

    Raises:
        RequestError: the body or a piece of media cannot be read as what it claims to be.
        ServeError: it is neither multipart nor JSON, or too large.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type in FORMS:
        if content_type == URLENCODED:  # carries no files, and is decoded on the event loop
            request = Request(request.scope, no_more_than(MAX_FIELDS_BYTES, request.receive, fields_too_large))
        async with request.form(max_files=MAX_PARTS, max_fields=MAX_PARTS, max_part_size=max_bytes) as form:
            body = await _from_form(form, media_field)
    elif content_type == "application/json":
        # Decoding tens of megabytes of base64 would hold up every other request.
        body = await asyncio.to_thread(_from_json, await request.body(), media_field)
    else:
        raise ServeError(
            415,
            "unsupported_content_type",
            f"content-type {content_type or 'is missing'}: send multipart/form-data or application/json",
        )
    if len(body.media) > max_inputs:
        raise RequestError(
            f"{len(body.media)} inputs were sent; send at most {max_inputs}", media_field, "too_many_inputs"
        )
    return body


def parse_json(text: str | bytes, param: str | None) -> Any:
    """Strict JSON of a bounded number of values: no NaN, no key twice in an object.

    Raises:
        RequestError: the text is not that.
    """
    raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    # No value comes without one of these before it, and base64 has none of them: media count for nothing.
    num_values = sum(raw.count(mark) for mark in b",[{")
    if num_values > MAX_VALUES:
        raise RequestError(
            f"{param or 'the body'} holds {num_values} commas and opening brackets; send at most {MAX_VALUES}",
            param,
            "too_many_values",
        )
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_short_float, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param or 'the body'} is not valid JSON: {error}", param, "invalid_json") from error


def _check_size(fields: dict[str, Any]) -> None:
    """Refuse fields that are too long together; without recursion, for they may be deep."""
    left: list[Any] = [fields]
    num_bytes = 0
    while left:
        match left.pop():
            case str(text):
                num_bytes += len(text)
            case dict(members):
                left += [*members, *members.values()]
            case list(members):
                left += members
    if num_bytes > MAX_FIELDS_BYTES:
        raise fields_too_large(MAX_FIELDS_BYTES)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _short_float(text: str) -> float:
    if len(text) > MAX_NUMBER_LENGTH:
        raise ValueError(f"a number of {len(text)} characters; use at most {MAX_NUMBER_LENGTH}")
    return float(text)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name!r} is given twice")
    return values


async def _from_form(form: FormData, media_field: str) -> IncomingBody:
    fields: dict[str, Any] = {}
    media: list[Media] = []
    for name, value in form.multi_items():
        if name == media_field or name.startswith(f"{media_field}["):
            param = f"{media_field}[{len(media)}]" if name.endswith("[]") else name
            if isinstance(value, UploadFile):
                media.append(Upload(param, await value.read()))
            else:
                media.append(await asyncio.to_thread(_from_part, name, value, media_field, param))
        elif isinstance(value, UploadFile):
            raise RequestError(f"{name} came as a file; files belong in {media_field!r}", name, "unexpected_file")
        elif name in fields:
            raise RequestError(f"{name} is given twice; give it once", name, "duplicate_field")
        elif name.startswith("pusa["):
            raise RequestError(
                f"{name}: send 'pusa' as one text part that holds JSON, such as json.dumps({{...}})",
                "pusa",
                "invalid_json",
            )
        else:
            fields[name] = value
    _check_size(fields)
    if "pusa" in fields:
        fields["pusa"] = await asyncio.to_thread(parse_json, fields["pusa"], "pusa")
    return IncomingBody(fields, tuple(media))


def _from_part(name: str, text: str, media_field: str, param: str) -> Media:
    """A text part: ``input_reference[image_url]`` is what the stock client makes of an object."""
    if name in (media_field, f"{media_field}[]"):
        return _from_url(text, param)
    key = name.removesuffix("]").rpartition("[")[2]
    return _from_object({key: text}, media_field)


def _from_json(raw: bytes, media_field: str) -> IncomingBody:
    fields = parse_json(raw, None)
    if not isinstance(fields, dict):
        raise RequestError("the body is not a JSON object; send {...}", None, "invalid_json")
    references = fields.pop(media_field, None)
    _check_size(fields)
    media = [] if references is None else list(_from_references(references, media_field))
    pusa = fields.pop("pusa", None)
    if isinstance(pusa, str):
        pusa = parse_json(pusa, "pusa")
    fields["pusa"] = _with_plain_fields(fields, {} if pusa is None else pusa)
    return IncomingBody(fields, tuple(media))


def _with_plain_fields(fields: dict[str, Any], pusa: Any) -> Any:
    """Move our own parameters, written as plain fields of a JSON body, to where multipart has them."""
    plain = {name: fields.pop(name) for name in list(fields) if name in PusaBody.model_fields}
    if not plain or not isinstance(pusa, dict):
        return pusa
    twice = sorted(plain.keys() & pusa.keys())
    if twice:
        raise RequestError(f"{twice[0]} is given beside and inside 'pusa'; give it once", twice[0], "duplicate_field")
    return {**pusa, **plain}


def _from_references(value: Any, media_field: str) -> Iterable[Media]:
    if not isinstance(value, list):
        yield _from_reference(value, media_field)
        return
    for index, one in enumerate(value):
        yield _from_reference(one, f"{media_field}[{index}]")


def _from_reference(value: Any, param: str) -> Media:
    if isinstance(value, str):
        return _from_url(value, param)
    if isinstance(value, dict) and len(value) == 1:
        return _from_object(value, param)
    raise RequestError(f'{param}: write {{"image_url": "data:..."}}', param, "invalid_reference")


def _from_object(reference: dict[str, Any], param: str) -> Media:
    ((key, value),) = reference.items()
    where = f"{param}.{key}"
    if not isinstance(value, str):
        raise RequestError(f"{where} is not a string", where, "invalid_reference")
    match key:
        case "image_url" | "video_url":
            return _from_url(value, where)
        case "id":
            return VideoReference(where, value)
        case "file_id":
            raise RequestError(
                f"{where}: there is no files API here; upload the file itself or send a data URL",
                where,
                "not_supported",
            )
    raise unknown_field(key, where, ["image_url", "id"])


def _from_url(url: str, param: str) -> Upload | MediaUrl:
    scheme, _, rest = url.partition(":")
    if scheme.lower() in ("http", "https"):
        return MediaUrl(param, url)
    header, comma, payload = rest.partition(",")
    parameters = header.split(";")[1:]
    if scheme.lower() != "data" or not comma or "base64" not in parameters:
        raise RequestError(
            f"{param}: write a data URL such as data:image/png;base64,... or upload the file itself",
            param,
            "invalid_data_url",
        )
    try:
        return Upload(param, base64.b64decode(payload, validate=True))
    except ValueError as error:
        raise RequestError(f"{param}: the data URL's base64 is broken: {error}", param, "invalid_data_url") from error
