"""Bodies that come in: their shape only (``resolve_request`` decides what the values mean).

Every model is strict and closed: a number in quotes, a misspelt field or a field in the wrong place
is refused with the name that was probably meant.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from pusa_dist.errors import RequestError, instead_of
from pusa_dist.request import ConditioningParams, Fit, RequestParams
from serve.http.fetch import FetchError, check_url
from serve.policy.priority import Priority

MAX_NAME_SHOWN = 80
MAX_CONDITIONING = 256
"""Entries; each stands for a latent frame of its own. Checked first: every entry that is wrong costs an error."""
PRIVATE_FIELDS = ("prompt", "negative_prompt", "webhook")

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("invalid_text", "it has half a surrogate pair; send valid Unicode") from error
    return text


def _whole(value: Any) -> Any:
    """4.0 is 4 in JSON, and some clients write it so; beyond 2**53 a float no longer says which integer it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53 else value


def _position(value: Any) -> Any:
    return {name: _whole(one) for name, one in value.items()} if isinstance(value, dict) else _whole(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, AfterValidator(_encodable)]


class Closed(BaseModel):
    """Base of every part of a body."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


# What the document at /openapi.json says where a validator of ours says more than a type can.
_POSITION = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"enum": ["start", "end"]},
        {
            "type": "object",
            "properties": {"frame": {"type": "integer", "minimum": 0}},
            "required": ["frame"],
            "additionalProperties": False,
        },
    ]
}
_SECONDS = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
        {"type": "null"},
    ]
}
_SIZE_SCHEMA = {"anyOf": [{"type": "string", "pattern": "^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"}, {"type": "null"}]}


class ConditioningBody(Closed):
    """One given latent frame."""

    input: Whole | None = None
    """Index of the uploaded image or clip; default: the entry's own index, or the only clip."""
    position: Annotated[Any, BeforeValidator(_position), WithJsonSchema(_POSITION)] = None
    """Latent frame index, ``"start"``, ``"end"`` or ``{"frame": n}``."""
    noise_multiplier: float | None = None
    """0 keeps the frame exactly, 1 ignores it."""
    source: Whole | None = None
    """Clips: which latent of the clip; negative counts from its end. Default: same as position."""
    fit: Fit | None = None
    """How the picture is brought to the video's size; default stretch for images, crop for clips."""


def _number_or_experts(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or is_number or (isinstance(value, Mapping) and value):
        return value
    raise PydanticCustomError(
        "invalid_lora_alpha", 'use a number, or one for each expert such as {"high": 1.5, "low": 1.4}'
    )


def _webhook(url: str | None) -> str | None:
    if url is not None:
        try:
            check_url(url)
        except FetchError as error:
            raise PydanticCustomError(
                "invalid_webhook", "{why}; use a public https URL", {"why": error.message}
            ) from error
    return url


class PusaBody(Closed):
    """Our own parameters: the JSON part named ``pusa``, or plain fields of a JSON body."""

    conditioning: Annotated[list[ConditioningBody], Field(max_length=MAX_CONDITIONING)] = []
    """Where uploaded images and clips go; one image alone: the start."""
    num_inference_steps: Whole | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """1 runs without guidance, in half the time."""
    shift: float | None = None
    """Of the noise schedule."""
    seed: Whole | None = None
    """Default: drawn, and told in the answer."""
    negative_prompt: Text | None = None
    """What the video should not show."""
    fps: Whole | None = None
    """Frames a second of the file."""
    num_frames: Whole | None = None
    """4k+1; instead of ``seconds``."""
    lora_alpha: Annotated[float | dict[str, float] | None, BeforeValidator(_number_or_experts)] = None
    """Strength of the model's LoRA, or of each expert's."""
    priority: Priority = "interactive"
    """``batch`` jobs give way to the tenant's interactive ones."""
    preview_every: Annotated[Whole, Field(ge=0)] = 0
    """Steps between preview frames in the event stream; 0: none."""
    webhook: Annotated[str | None, Field(max_length=2048), AfterValidator(_webhook)] = None
    """Public https URL that is told when the job ends, at least once."""


def _seconds(value: Any) -> Any:
    """OpenAI's clients send a string; people send numbers."""
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    raise PydanticCustomError("invalid_seconds", "use a number of seconds such as 2 or 1.5")


def _size(value: Any) -> Any:
    if value is None or (isinstance(value, str) and _SIZE.fullmatch(value)):
        return value
    raise PydanticCustomError("invalid_size", "use WIDTHxHEIGHT in pixels, such as 832x480")


class VideoBody(Closed):
    """What is asked for, less its media: the same for a new video and for an extension."""

    prompt: Text
    """What the video shows."""
    model: str | None = None
    """Default: the one that is served."""
    seconds: Annotated[float | None, BeforeValidator(_seconds), WithJsonSchema(_SECONDS)] = None
    """Length: the largest 4k+1 frames within it are made. Default: by model."""
    size: Annotated[str | None, BeforeValidator(_size), WithJsonSchema(_SIZE_SCHEMA)] = None
    """WIDTHxHEIGHT in pixels, both multiples of 16. Default: by model."""
    pusa: PusaBody = PusaBody()
    """What OpenAI's contract has no words for."""

    def params(self, seed: int) -> RequestParams:
        """What was asked, in the engine's words; ``seed`` is used if none was given."""
        width, height = (int(side) for side in self.size.split("x")) if self.size else (None, None)
        plain = self.pusa.model_dump(exclude={"conditioning", "priority", "seed", "preview_every", "webhook"})
        return RequestParams(
            prompt=self.prompt,
            seed=seed if self.pusa.seed is None else self.pusa.seed,
            width=width,
            height=height,
            seconds=self.seconds,
            conditioning=tuple(ConditioningParams(**entry.model_dump()) for entry in self.pusa.conditioning),
            **plain,
        )

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Check the shape of a body.

        Raises:
            RequestError: the first field that is unknown, missing or of the wrong type.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            # A misspelt field explains a missing one, so it is named first.
            first = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
            raise _explain(first) from error


def _explain(error: ErrorDetails) -> RequestError:
    """A pydantic error as a sentence about a field of the public API."""
    loc = error["loc"]
    if loc[:2] == ("pusa", "lora_alpha"):  # a union adds the names of its members; they mean nothing to a user
        loc = loc[:2]
    param = param_name(loc)
    # Errors are logged and shown to others: no prompt and no URL's secret in them.
    given = param if loc[-1] in PRIVATE_FIELDS else f"{param}={_shortened(error['input'])}"
    message = f"{given}: {error['msg']}"
    match error["type"]:
        case "extra_forbidden":
            return unknown_field(str(loc[-1]), param, _fields_beside(loc))
        case "missing":
            return RequestError(f"{param} is missing; it is required", param, "missing_field")
        case "model_type":
            return RequestError(f"{param}: write a JSON object, {{...}}", param, "invalid_type")
        case "greater_than_equal":
            return RequestError(message, param, "out_of_range")
        case ours if ours.startswith("invalid_"):
            return RequestError(message, param, ours)
        case kind if kind.endswith("_type"):
            return RequestError(message, param, "invalid_type")
        case _:
            return RequestError(message, param, "invalid_value")


def param_name(loc: Iterable[str | int]) -> str:
    """A path into a body as users write it: ``pusa.conditioning[0].position``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


def unknown_field(name: str, param: str, known: list[str]) -> RequestError:
    """The refusal of a field that does not exist here, with the nearest one that does."""
    param = param[:MAX_NAME_SHOWN]
    if "." not in param and name in PusaBody.model_fields:
        remedy = "send it inside the JSON part 'pusa'"
    elif name in VideoBody.model_fields:
        remedy = "it is a field of its own, beside 'pusa'"
    else:
        remedy = instead_of(name, known)
    return RequestError(f"unknown field {param!r}; {remedy}", param, "unknown_field")


def _fields_beside(loc: tuple[str | int, ...]) -> list[str]:
    """Names that would have been right where ``loc`` ends."""
    if loc[:2] == ("pusa", "conditioning"):
        return list(ConditioningBody.model_fields)
    return list(PusaBody.model_fields if loc[0] == "pusa" else VideoBody.model_fields)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
