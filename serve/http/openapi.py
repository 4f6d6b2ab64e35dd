"""The document at /openapi.json: what FastAPI reads off the routes, and what only we know.

That is the bodies of POST in both their forms with the limits of the model that is served, the errors of
every route with their codes, and what is no JSON: files and event streams. A test (Schemathesis) holds
the API to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pusa_dist.config import ModelConfig
from pusa_dist.request import MAX_PROMPT_BYTES, MAX_SEED
from serve.config import UploadLimits
from serve.http.errors import ErrorBody
from serve.http.events import DeletedEvent, PreviewEvent, ProgressEvent
from serve.http.idempotency import MAX_KEY_LENGTH
from serve.http.schemas import ConditioningBody, PusaBody, VideoBody
from serve.store.jobs import JOB_ID_PATTERN

Json = dict[str, Any]

CODES: Mapping[int, Sequence[str]] = {
    400: (
        "animated_image", "clip_too_long", "clip_too_short", "conflict", "decoding_failed", "decoding_too_large",
        "decoding_too_slow", "duplicate_field", "duplicate_position", "empty_prompt",
        "image_too_large", "image_too_small", "input_out_of_range", "invalid_clip", "invalid_data_url",
        "invalid_idempotency_key", "invalid_image", "invalid_json", "invalid_lora_alpha", "invalid_multipart",
        "invalid_num_frames", "invalid_position", "invalid_reference", "invalid_seconds", "invalid_size",
        "invalid_text", "invalid_type", "invalid_value", "invalid_webhook", "media_by_url_disabled",
        "media_too_large", "media_url_invalid_url", "media_url_too_large", "media_url_too_many_redirects",
        "media_url_too_slow", "media_url_unexpected_encoding", "media_url_unexpected_status", "media_url_unreachable",
        "missing_conditioning", "missing_field", "missing_position", "moderation_refused", "not_a_clip",
        "not_supported", "one_video", "out_of_range", "position_out_of_range", "prompt_too_long", "size_too_large",
        "size_too_small", "too_many_inputs", "too_many_tokens", "too_many_values", "too_short", "unexpected_file",
        "unknown_expert", "unknown_field", "unsupported_media", "unused_input",
    ),
    401: ("invalid_api_key",),
    403: ("tenant_erased",),
    404: ("content_expired", "model_not_found", "unknown_route", "variant_not_found", "video_not_found"),
    405: ("method_not_allowed",),
    408: ("upload_too_slow",),
    409: (
        "already_finished", "cancelled", "idempotency_key_reused", "video_not_ready",
        "the code of the failure of a job that has failed",
    ),
    413: ("body_too_large", "fields_too_large"),
    415: ("unsupported_content_type",),
    416: ("range_not_satisfiable",),
    429: (
        "cost_over_quota", "daily_cost_exceeded", "rate_limit_exceeded", "shape_over_quota", "too_many_queued",
        "too_many_streams",
    ),
    500: ("internal_error",),
    503: (
        "decoding_busy", "decoding_unavailable", "moderation_unavailable", "storage_unavailable",
        "too_many_streams", "unreadable_job", "uploads_busy",
    ),
}  # fmt: skip
"""Every code an answer may carry, by status."""

_MEANING = {
    400: "A value that cannot be honoured; nothing was stored. `param` says which.",
    401: "No valid key.",
    403: "The tenant was erased.",
    404: "It does not exist, or is another tenant's.",
    408: "The body stopped coming, or came too slowly.",
    409: "Not in the state this needs.",
    413: "More bytes than are read.",
    415: "Neither multipart nor JSON.",
    416: "The range lies outside the file.",
    429: "Over quota. `Retry-After` says when to try again; `x-should-retry: false` that it is pointless for now.",
    500: "A fault of ours; quote `x-request-id`.",
    503: "Try again later.",
}
_ALWAYS = (500, 503)
_ERRORS: Mapping[tuple[str, str], Sequence[int]] = {
    ("/v1/videos", "post"): (400, 403, 404, 408, 409, 413, 415, 429),
    ("/v1/videos", "get"): (400,),
    ("/v1/videos/extensions", "post"): (400, 403, 404, 408, 409, 413, 415, 429),
    ("/v1/videos/edits", "post"): (400, 413),
    ("/v1/videos/characters", "post"): (400, 413),
    ("/v1/videos/characters/{character_id}", "get"): (400,),
    ("/v1/videos/{video_id}/remix", "post"): (400, 413),
    ("/v1/videos/{video_id}", "get"): (404,),
    ("/v1/videos/{video_id}", "delete"): (404, 413),
    ("/v1/videos/{video_id}/cancel", "post"): (404, 409, 413),
    ("/v1/videos/{video_id}/content", "get"): (400, 404, 409, 416),
    ("/v1/videos/{video_id}/events", "get"): (404, 429),
    ("/v1/usage", "get"): (400,),
    ("/v1/models/{name}", "get"): (404,),
}
_IN_PATHS = {
    "video_id": "Id of the video.",
    "character_id": "Of a character; there are none.",
    "name": "Name of the model.",
}
_NOT_OFFERED = ("/v1/videos/edits", "/v1/videos/characters", "/v1/videos/{video_id}/remix")
_FILES = ("video/mp4", "image/webp", "image/jpeg", "application/zip")

_BASE64 = "([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
_DATA_URL = {
    "type": "string",
    "pattern": f"^data:[^,]*;base64,{_BASE64}$",
    "description": "A data URL, such as data:image/png;base64,...",
}
_PUBLIC_URL = {"type": "string", "format": "uri", "pattern": "^https://", "description": "A public https URL."}
_IMAGE_EXAMPLE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQAAAAA3iMLMAAAAD0lEQVR42mP8z8DEQAICADIBAR/gNl"
    "hXAAAAAElFTkSuQmCC"
)


def describe(app: FastAPI, model: ModelConfig, uploads: UploadLimits, require_keys: bool) -> Json:
    """The OpenAPI 3.1 document of an API.

    Args:
        app: with its routes.
        model: whose limits bodies must keep.
        uploads: limits of bodies and their media.
        require_keys: whether requests need one.
    """
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document["components"]["schemas"]
    schemas.update(_schemas(model, uploads))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            statuses = [*_ALWAYS, *_ERRORS.get((path, method), ()), *([401] if require_keys else [])]
            operation["responses"] = _responses(operation["responses"], statuses)
            operation["tags"] = [path.removeprefix("/v1").split("/")[1]]
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    parameter["description"] = _IN_PATHS[parameter["name"]]
                if parameter["name"] == "video_id":
                    parameter["schema"]["pattern"] = JOB_ID_PATTERN
    paths = document["paths"]
    _set_body(paths["/v1/videos"]["post"], "CreateVideo", "input_reference")
    _set_body(paths["/v1/videos/extensions"]["post"], "ExtendVideo", "video")
    paths["/v1/videos/{video_id}/content"]["get"]["responses"].update(_content_answers())
    paths["/v1/videos/{video_id}/events"]["get"]["responses"].update(_event_answers())
    for path in _NOT_OFFERED:
        del paths[path]["post"]["responses"]["200"]
    del paths["/v1/videos/characters/{character_id}"]["get"]["responses"]["200"]
    if require_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _responses(found: Json, statuses: Sequence[int]) -> Json:
    answers = {status: answer for status, answer in found.items() if status not in ("4XX", "5XX", "422")}
    for status in sorted(statuses):
        answers.setdefault(str(status), _error(status))
    for answer in answers.values():
        answer.setdefault("headers", {})["x-request-id"] = {"schema": {"type": "string"}, "required": True}
    return answers


def _error(status: int) -> Json:
    codes = CODES[status]
    example = {"error": {"message": _MEANING[status], "type": "invalid_request_error", "param": None, "code": codes[0]}}
    return {
        "description": f"{_MEANING[status]} Codes: {', '.join(codes)}.",
        "content": {"application/json": {"schema": _ref("ErrorBody"), "example": example}},
    }


def _schemas(model: ModelConfig, uploads: UploadLimits) -> Json:
    models: list[type[BaseModel]] = [
        VideoBody, PusaBody, ConditioningBody, ErrorBody, ProgressEvent, PreviewEvent, DeletedEvent
    ]  # fmt: skip
    _, found = models_json_schema([(one, "validation") for one in models], ref_template="#/components/schemas/{model}")
    schemas: Json = found["$defs"]
    _limit(schemas["PusaBody"]["properties"], model)
    entry = schemas["ConditioningBody"]["properties"]
    entry["input"]["anyOf"][0] |= {"minimum": 0, "maximum": uploads.max_inputs - 1}
    entry["noise_multiplier"]["anyOf"][0] |= {"minimum": 0, "maximum": 1}
    video, ours = schemas.pop("VideoBody"), schemas["PusaBody"]["properties"]
    video["properties"]["prompt"] |= {"minLength": 1, "maxLength": MAX_PROMPT_BYTES}
    video["properties"]["model"]["anyOf"][0] |= {"enum": [model.name]}
    video["properties"]["seconds"]["anyOf"][0] |= {"maximum": model.limits.max_frames}
    url: Json = {"anyOf": [_DATA_URL, _PUBLIC_URL]} if uploads.media_by_url else _DATA_URL
    reference = {
        "anyOf": [
            url,
            {
                "type": "object",
                "properties": {"image_url": url, "video_url": url},
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
        ]
    }
    made_here = {
        "type": "object",
        "properties": {"id": {"type": "string", "description": "Of a video made here."}},
        "required": ["id"],
        "additionalProperties": False,
    }
    references = {"type": "array", "items": reference, "maxItems": uploads.max_inputs}
    both = {**video, "properties": {**video["properties"], **ours}}
    schemas["CreateVideo"] = _with_media(both, "input_reference", {"anyOf": [reference, references, {"type": "null"}]})
    schemas["ExtendVideo"] = _with_media(both, "video", {"anyOf": [*reference["anyOf"], made_here]}, required=True)
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = {**video, "properties": _as_text(video["properties"])}
    files = {"type": "array", "items": file, "maxItems": uploads.max_inputs}
    schemas["CreateVideoForm"] = _with_media(form, "input_reference", files)
    schemas["ExtendVideoForm"] = _with_media(form, "video", file, required=True)
    return schemas


def _with_media(schema: Json, name: str, media: Json, *, required: bool = False) -> Json:
    described = {"description": "Images and clips, in the order that `conditioning` counts them.", **media}
    return {
        **schema,
        "properties": {**schema["properties"], name: described},
        "required": [*schema["required"], *([name] if required else [])],
    }


def _as_text(properties: Json) -> Json:
    """Properties of a JSON body as they are in a form: text, and only ``pusa`` is JSON."""
    text = {name: _without_null(schema) for name, schema in properties.items()}
    text["seconds"] = {**text["seconds"], "anyOf": [{"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"}]}
    return text


def _without_null(schema: Json) -> Json:
    if "anyOf" not in schema:
        return schema
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "default")}
    return {**rest, "anyOf": [one for one in schema["anyOf"] if one != {"type": "null"}]}


def _limit(ours: Json, model: ModelConfig) -> None:
    """Write the limits of ``resolve_request`` into the schema of ``pusa``."""
    limits = model.limits
    for name, bounds in {
        "num_inference_steps": {"minimum": 1, "maximum": limits.max_steps},
        "guidance_scale": {"minimum": 1, "maximum": 30},
        "shift": {"minimum": 0.1, "maximum": 100},
        "seed": {"minimum": 0, "maximum": MAX_SEED},
        "fps": {"minimum": 1, "maximum": 120},
        "num_frames": {"enum": list(range(1, limits.max_frames + 1, 4))},
        "negative_prompt": {"maxLength": MAX_PROMPT_BYTES},
        "webhook": {"format": "uri", "pattern": "^https://"},
    }.items():
        ours[name]["anyOf"][0] |= bounds
    ours["preview_every"] |= {"minimum": 0, "maximum": limits.max_steps}
    strength = {"type": "number", "minimum": 0.1, "maximum": 5}
    by_expert = {
        "type": "object",
        "properties": dict.fromkeys(model.lora.alpha if model.lora else (), strength),
        "additionalProperties": False,
        "minProperties": 1,
    }
    ours["lora_alpha"]["anyOf"] = [strength, by_expert, {"type": "null"}] if model.lora else [{"type": "null"}]


def _set_body(operation: Json, schema: str, media_field: str) -> None:
    fields = {"prompt": "a cat on a windowsill", "seconds": "2", "pusa": {"num_inference_steps": 4, "seed": 7}}
    reference = {"image_url": _IMAGE_EXAMPLE}
    is_extension = media_field == "video"
    json_example = (
        {**fields, "video": {"id": f"video_{'0' * 34}"}} if is_extension else {**fields, media_field: reference}
    )
    operation["requestBody"] = {
        "required": True,
        "content": {
            "application/json": {"schema": _ref(schema), "example": json_example},
            "multipart/form-data": {
                "schema": _ref(f"{schema}Form"),
                "encoding": {
                    "pusa": {"contentType": "application/json"},
                    media_field: {"contentType": "image/*, video/mp4"},
                },
            },
        },
    }
    operation.setdefault("parameters", []).append(
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "However often a request arrives with it, it makes one video.",
            "schema": {"type": "string", "maxLength": MAX_KEY_LENGTH},
        }
    )


def _content_answers() -> Json:
    files = {kind: {"schema": {"type": "string", "contentMediaType": kind}} for kind in _FILES}
    return {
        "200": {"description": "The file.", "content": files},
        "206": {"description": "A range of it.", "content": files},
        "302": {
            "description": "Where a bucket serves it for the next hour; send no key there.",
            "headers": {"Location": {"schema": {"type": "string", "format": "uri"}, "required": True}},
        },
    }


def _event_answers() -> Json:
    data = {"progress": "ProgressEvent", "preview": "PreviewEvent", "deleted": "DeletedEvent"}
    data |= dict.fromkeys(("completed", "failed", "cancelled"), "ProgressEvent")
    event = {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "pattern": "^[0-9]+-[a-z_]+-[0-9]+-[0-9]+$"},
                    "event": {"const": name},
                    "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(schema)},
                },
                "required": ["id", "event", "data"],
            }
            for name, schema in data.items()
        ],
        "description": "One event.",
    }
    example = (
        "id: 1-denoise-3-0\nevent: progress\n"
        'data: {"id":"video_0","state":"in_progress","stage":"denoise","step":3,"num_steps":10,"attempt":1,'
        '"estimated_seconds_left":12.5,"error":null}\n\n'
    )
    return {
        "200": {
            "description": "Events until the video ends.",
            "content": {"text/event-stream": {"schema": event, "example": example}},
        },
        "204": {"description": "`Last-Event-ID` was the last event: there will be no other."},
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
