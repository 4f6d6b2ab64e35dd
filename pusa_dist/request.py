"""A request, resolved: every default filled in, every position a latent frame (no torch).

``resolve_request`` is the one place where what a user asked becomes what will be run; the HTTP
gateway and the command line both call it, so both refuse the same things with the same words.
Nothing is rounded, clipped or dropped: a value that cannot be honoured raises ``RequestError``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any, Literal, get_args

from pusa_dist.config import ModelConfig, ParallelConfig
from pusa_dist.errors import RequestError
from pusa_dist.geometry import (
    PIXEL_MULTIPLE,
    TEMPORAL_STRIDE,
    latent_frame_of,
    num_frames_within,
    num_latent_frames,
    tokens_per_frame,
)

Fit = Literal["stretch", "crop", "letterbox"]
MAX_PROMPT_BYTES = 20_000
MAX_SEED = 2**63 - 1


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``832x480`` of a command line as width and height.

    Raises:
        RequestError: it is not written so.
    """
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise RequestError(f"--size={text}: write WIDTHxHEIGHT, such as 832x480", "size")
    return int(width), int(height)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaInfo:
    """What is known of an uploaded image or clip before it is decoded for good."""

    kind: Literal["image", "clip"]
    width: int
    height: int
    num_frames: int
    """Pixel frames; 1 for an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """One given latent frame: where it comes from, where it goes, how noisy it stays."""

    input: int
    """Index of the uploaded image or clip."""
    position: int
    """Latent frame it is put at, 0..F-1."""
    noise_multiplier: float
    """Scales that frame's sigma and timestep: 0 keeps it exactly, 1 ignores it."""
    source: int | None = None
    """Clips: which latent of the clip; negative counts from the clip's end. None for images."""
    fit: Fit = "stretch"
    """How the picture is brought to the video's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Everything that determines a generation, apart from weights, precision and parallel degrees."""

    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    shift: float
    seed: int
    lora_alpha: Mapping[str, float]
    """Strength of the model's LoRA per expert; empty if it has none."""
    conditioning: tuple[Conditioning, ...] = ()

    @property
    def num_latent_frames(self) -> int:
        """F."""
        return num_latent_frames(self.num_frames)

    @property
    def uses_guidance(self) -> bool:
        """Whether the unconditional branch is run: a scale of exactly 1 needs one branch only."""
        return self.guidance_scale != 1.0

    @property
    def num_tokens(self) -> int:
        """Tokens of one forward of one sample."""
        return self.num_latent_frames * tokens_per_frame(self.height, self.width)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` restores an equal request."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationRequest":
        """Inverse of ``to_dict``."""
        entries = tuple(Conditioning(**entry) for entry in values["conditioning"])
        return cls(**{**values, "conditioning": entries})


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditioningParams:
    """One entry of ``pusa.conditioning`` as a user writes it; None means the default."""

    input: int | None = None
    position: int | str | Mapping[str, int] | None = None
    noise_multiplier: float | None = None
    source: int | None = None
    fit: Fit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParams:
    """A request as a user writes it; None means the model's default."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    lora_alpha: float | Mapping[str, float] | None = None
    conditioning: Sequence[ConditioningParams] = field(default_factory=tuple)


def check_request(parallel: ParallelConfig, request: GenerationRequest) -> None:
    """Raise RequestError if a gang of these degrees cannot run the request.

    Ranks share the tokens of each frame and every rank needs at least one.
    """
    tokens = tokens_per_frame(request.height, request.width)
    if tokens < parallel.sequence_degree:
        raise RequestError(
            f"size={request.width}x{request.height}: a frame has {tokens} tokens and {parallel.sequence_degree} ranks "
            f"share it; use a size of at least {parallel.sequence_degree} tokens ({PIXEL_MULTIPLE}x{PIXEL_MULTIPLE} "
            "pixels each)",
            "size",
            "size_too_small",
        )


def resolve_request(params: RequestParams, inputs: Sequence[MediaInfo], model: ModelConfig) -> GenerationRequest:
    """Fill in the model's defaults and check every value.

    Args:
        params: what the user asked for.
        inputs: the uploaded images and clips, in order.
        model: whose defaults and limits apply.

    Raises:
        RequestError: the first value that cannot be honoured, by its name in the public API.
    """
    d = model.defaults
    _check_prompt(params.prompt, "prompt")
    if not params.prompt.strip():
        raise RequestError("prompt is empty; describe the video in words", "prompt", "empty_prompt")
    negative = d.negative_prompt if params.negative_prompt is None else params.negative_prompt
    _check_prompt(negative, "pusa.negative_prompt")
    width = d.width if params.width is None else params.width
    height = d.height if params.height is None else params.height
    fps = d.fps if params.fps is None else params.fps
    _check_range(fps, 1, 120, "pusa.fps")
    num_frames = _num_frames(params, fps, model)
    _check_size(width, height, num_frames, model)
    steps = d.num_inference_steps if params.num_inference_steps is None else params.num_inference_steps
    _check_range(steps, 1, model.limits.max_steps, "pusa.num_inference_steps")
    guidance = d.guidance_scale if params.guidance_scale is None else params.guidance_scale
    _check_range(guidance, 1.0, 30.0, "pusa.guidance_scale")
    shift = d.shift if params.shift is None else params.shift
    _check_range(shift, 0.1, 100.0, "pusa.shift")
    _check_range(params.seed, 0, MAX_SEED, "pusa.seed")
    return GenerationRequest(
        model=model.name,
        prompt=params.prompt,
        negative_prompt=negative,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=float(guidance),
        shift=float(shift),
        seed=params.seed,
        lora_alpha=_lora_alpha(params.lora_alpha, model),
        conditioning=_conditioning(params.conditioning, inputs, num_latent_frames(num_frames), d.noise_multiplier),
    )


def resolve_position(position: int | str | Mapping[str, int], num_latents: int, param: str) -> int:
    """Latent frame index of a position: an index, "start", "end" or ``{"frame": n}``.

    Raises:
        RequestError: the position lies outside the video, or is not a position.
    """
    last = num_latents - 1
    if position == "start":
        return 0
    if position == "end":
        return last
    if isinstance(position, Mapping):
        frame = position.get("frame")
        if set(position) != {"frame"} or not isinstance(frame, int) or isinstance(frame, bool):
            raise RequestError(f'{param}={dict(position)}: write {{"frame": n}}', param, "invalid_position")
        last_frame = last * TEMPORAL_STRIDE
        if not 0 <= frame <= last_frame:
            raise RequestError(
                f"{param}.frame={frame} is outside the video; use 0 to {last_frame}", param, "position_out_of_range"
            )
        return latent_frame_of(frame)
    if isinstance(position, bool) or not isinstance(position, int):
        raise RequestError(
            f'{param}={position!r}: use a latent frame index, "start", "end" or {{"frame": n}}',
            param,
            "invalid_position",
        )
    if not 0 <= position <= last:
        raise RequestError(
            f"{param}={position} is outside the video's {num_latents} latent frames; use 0 to {last}",
            param,
            "position_out_of_range",
        )
    return position


def _check_prompt(text: str, param: str) -> None:
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if size > MAX_PROMPT_BYTES:
        raise RequestError(
            f"{param} has {size} bytes; shorten it to at most {MAX_PROMPT_BYTES}", param, "prompt_too_long"
        )


def _check_range(value: float, low: float, high: float, param: str) -> None:
    if not low <= value <= high:  # also refuses NaN
        least, most = _shortened(low, ROUND_CEILING), _shortened(high, ROUND_FLOOR)
        raise RequestError(f"{param}={value} is out of range; use {least} to {most}", param, "out_of_range")


def _shortened(bound: float, rounding: str) -> str:
    """A bound in four digits at most, rounded into the range: what is printed is accepted."""
    if isinstance(bound, int):
        return str(bound)
    return f"{Context(prec=4, rounding=rounding).create_decimal(repr(bound)).normalize():f}"


def _num_frames(params: RequestParams, fps: int, model: ModelConfig) -> int:
    if params.num_frames is not None and params.seconds is not None:
        raise RequestError("seconds and pusa.num_frames were both given; give one of them", "seconds", "conflict")
    if params.seconds is not None:
        _check_range(params.seconds, 1 / fps, model.limits.max_frames / fps, "seconds")
        return num_frames_within(params.seconds, fps)
    frames = model.defaults.num_frames if params.num_frames is None else params.num_frames
    _check_range(frames, 1, model.limits.max_frames, "pusa.num_frames")
    if (frames - 1) % TEMPORAL_STRIDE:
        below = frames - (frames - 1) % TEMPORAL_STRIDE
        raise RequestError(
            f"pusa.num_frames={frames} is not 4k+1; use {below} or {below + TEMPORAL_STRIDE}",
            "pusa.num_frames",
            "invalid_num_frames",
        )
    return frames


def _check_size(width: int, height: int, num_frames: int, model: ModelConfig) -> None:
    limits = model.limits
    size = f"{width}x{height}"
    if width % PIXEL_MULTIPLE or height % PIXEL_MULTIPLE or width < PIXEL_MULTIPLE or height < PIXEL_MULTIPLE:
        raise RequestError(f"size={size}: both sides must be multiples of {PIXEL_MULTIPLE}", "size", "invalid_size")
    if max(width, height) > limits.max_side:
        raise RequestError(
            f"size={size}: the longer side of {model.name} is at most {limits.max_side}", "size", "size_too_large"
        )
    tokens = num_latent_frames(num_frames) * tokens_per_frame(height, width)
    if tokens > limits.max_tokens:
        raise RequestError(
            f"size={size} with {num_frames} frames is {tokens} tokens; {model.name} accepts {limits.max_tokens}: "
            "use a smaller size or fewer frames",
            "size",
            "too_many_tokens",
        )


def _lora_alpha(value: float | Mapping[str, float] | None, model: ModelConfig) -> dict[str, float]:
    if model.lora is None:
        if value is not None:
            raise RequestError(
                f"{model.name} has no LoRA; leave pusa.lora_alpha out", "pusa.lora_alpha", "not_supported"
            )
        return {}
    alpha = dict(model.lora.alpha)
    if isinstance(value, Mapping):
        unknown = sorted(set(value) - set(alpha))
        if unknown:
            raise RequestError(
                f"pusa.lora_alpha names {', '.join(unknown)}; the experts of {model.name} are "
                f"{', '.join(model.experts)}",
                "pusa.lora_alpha",
                "unknown_expert",
            )
        alpha.update(value)
    elif value is not None:
        alpha = dict.fromkeys(alpha, value)
    for strength in alpha.values():
        _check_range(strength, 0.1, 5.0, "pusa.lora_alpha")
    return {name: float(strength) for name, strength in alpha.items()}


def _conditioning(
    entries: Sequence[ConditioningParams], inputs: Sequence[MediaInfo], num_latents: int, default_multiplier: float
) -> tuple[Conditioning, ...]:
    if not entries and len(inputs) == 1 and inputs[0].kind == "image":
        entries = (ConditioningParams(position="start"),)
    if not entries and inputs:
        raise RequestError(
            f"{len(inputs)} inputs were given and pusa.conditioning says of none where it goes; add one entry for each",
            "pusa.conditioning",
            "missing_conditioning",
        )
    resolved = []
    taken: dict[int, int] = {}
    for index, entry in enumerate(entries):
        one = _conditioning_entry(index, entry, inputs, num_latents, default_multiplier)
        if one.position in taken:
            raise RequestError(
                f"pusa.conditioning[{index}] and [{taken[one.position]}] both give latent frame {one.position}; "
                "give each position once",
                f"pusa.conditioning[{index}].position",
                "duplicate_position",
            )
        taken[one.position] = index
        resolved.append(one)
    unused = sorted(set(range(len(inputs))) - {one.input for one in resolved})
    if unused:
        raise RequestError(
            f"input {unused[0]} is used by no entry of pusa.conditioning; use it or leave it out",
            "pusa.conditioning",
            "unused_input",
        )
    return tuple(resolved)


def _conditioning_entry(
    index: int,
    entry: ConditioningParams,
    inputs: Sequence[MediaInfo],
    num_latents: int,
    default_multiplier: float,
) -> Conditioning:
    where = f"pusa.conditioning[{index}]"
    # One clip feeds all entries; several images feed one entry each.
    default_input = 0 if len(inputs) == 1 and inputs[0].kind == "clip" else index
    which = default_input if entry.input is None else entry.input
    if not 0 <= which < len(inputs):
        raise RequestError(
            f"{where}.input={which}, but {len(inputs)} inputs were uploaded; upload one more or use fewer positions",
            f"{where}.input",
            "input_out_of_range",
        )
    if entry.position is None:
        raise RequestError(
            f'{where}.position is missing; use a latent frame index, "start", "end" or {{"frame": n}}',
            f"{where}.position",
            "missing_position",
        )
    position = resolve_position(entry.position, num_latents, f"{where}.position")
    multiplier = default_multiplier if entry.noise_multiplier is None else entry.noise_multiplier
    _check_range(multiplier, 0.0, 1.0, f"{where}.noise_multiplier")
    media = inputs[which]
    if entry.fit is not None and entry.fit not in get_args(Fit):
        raise RequestError(
            f"{where}.fit={entry.fit!r}: use {', '.join(get_args(Fit))}", f"{where}.fit", "invalid_value"
        )
    # What Pusa does: a picture is stretched to the video's size, a clip is cropped around its centre.
    fit = entry.fit or ("stretch" if media.kind == "image" else "crop")
    return Conditioning(
        input=which,
        position=position,
        noise_multiplier=float(multiplier),
        source=_source(entry.source, position, media, where),
        fit=fit,
    )


def _source(source: int | None, position: int, media: MediaInfo, where: str) -> int | None:
    if media.kind == "image":
        if source is not None:
            raise RequestError(
                f"{where}.source={source}: an image has a single frame; leave source out",
                f"{where}.source",
                "not_supported",
            )
        return None
    chosen = position if source is None else source
    available = num_latent_frames(media.num_frames)
    if not -available <= chosen < available:
        raise RequestError(
            f"{where}.source={chosen}, but the clip's {media.num_frames} frames hold {available} latent frames; "
            "give a longer clip or another source",
            f"{where}.source",
            "clip_too_short",
        )
    return chosen
