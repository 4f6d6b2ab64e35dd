"""What a model is and how its ranks are laid out: frozen, validated values (no torch).

A model is one YAML file under ``configs/model``; ``load_model_config`` finds it by name or by path.
Unknown keys are errors, so a misspelt setting can never be silently ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pusa_dist.errors import ConfigError
from pusa_dist.geometry import PIXEL_MULTIPLE, TEMPORAL_STRIDE, tokens_per_frame

T = TypeVar("T")

Precision = Literal["fp32", "bf16"]
PristineWeights = Literal["device", "host"]

# The 16 channel statistics of the Wan2.1 VAE's latents (facts of the published checkpoint).
WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def from_mapping(cls: type[T], values: object, where: str) -> T:
    """Build a dataclass from plain YAML or JSON values, refusing unknown and missing keys and other types.

    Args:
        cls: a dataclass; its fields may be dataclasses, sequences and mappings in turn.
        values: what YAML or JSON gave.
        where: name of this part, for the error.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    hints = get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        raise ConfigError(f"{where}: unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
    required = [n for n, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{where}: missing setting {', '.join(missing)}")
    return cls(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _convert(hint: Any, value: object, where: str) -> object:
    """The value as its type hint wants it, with lists as tuples."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_that_fits(parts, value, where)
    if is_dataclass(hint):
        return from_mapping(hint, value, where)  # type: ignore[arg-type]
    if origin in (tuple, Sequence) and isinstance(value, list | tuple):
        hints = parts if origin is tuple and parts[-1] is not ... else parts[:1] * len(value)
        if len(hints) == len(value):
            return tuple(_convert(*each, f"{where}[{i}]") for i, each in enumerate(zip(hints, value, strict=True)))
    elif origin is Mapping and isinstance(value, Mapping):
        return {key: _convert(parts[1], item, f"{where}.{key}") for key, item in value.items()}
    elif origin is Literal:
        if value in parts:
            return value
        raise ConfigError(f"{where}={value!r}: use {' or '.join(map(str, parts))}")
    elif origin is None and isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool):
        return value
    raise ConfigError(f"{where}={value!r}: expected {hint.__name__ if origin is None else hint}")


def _first_that_fits(hints: Sequence[Any], value: object, where: str) -> object:
    if value is None and NoneType in hints:
        return None
    *others, last = (hint for hint in hints if hint is not NoneType)
    for hint in others:
        try:
            return _convert(hint, value, where)
        except ConfigError:
            continue  # a later type may fit; if none does, the last one says what is wrong
    return _convert(last, value, where)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Shape of the DiT, under diffusers' ``WanTransformer3DModel`` names."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    text_dim: int
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.attention_head_dim % 6 not in (0, 2):
            raise ConfigError(
                f"attention_head_dim={self.attention_head_dim}: 3-D rotary embedding splits it in three; "
                "use one that leaves 0 or 2 when divided by 6, such as 24, 32 or 128"
            )

    @property
    def dim(self) -> int:
        """Width E of the model."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_parameters(self) -> int:
        """Weights of one transformer, without making it: a few linears around its blocks."""
        e, wide = self.dim, 4 * self.out_channels  # a token is 1 x 2 x 2 latents
        embeddings = (4 * self.in_channels + 1) * e + (self.freq_dim + 1) * e + (self.text_dim + 1) * e
        shared = embeddings + 8 * (e + 1) * e + (e + 1) * wide + 2 * e
        # Biases, the norms of queries and keys, the norm between the attentions, and the modulation table.
        small = 8 * e + self.ffn_dim + e + 4 * e + 2 * e + 6 * e
        return shared + self.num_layers * small + self.num_adapted

    @property
    def num_adapted(self) -> int:
        """Those of them that Pusa's LoRA changes: the matrices of the blocks' linears."""
        return self.num_layers * (8 * self.dim**2 + 2 * self.dim * self.ffn_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeConfig:
    """Shape of the VAE, under diffusers' ``AutoencoderKLWan`` names."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD
    tile: tuple[int, int] | None = None
    """Latent (height, width) of a decode tile; None decodes whole frames."""
    tile_stride: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.tile is None:
            return
        stride = self.tile_stride or (0, 0)
        if not all(0 < step <= side for step, side in zip(stride, self.tile, strict=True)):
            raise ConfigError(f"vae.tile_stride={stride}: give two numbers from 1 to those of vae.tile={self.tile}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """Shape of the umT5 encoder, under transformers' ``UMT5Config`` names."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    max_tokens: int = 512
    """Rows of the embedding; a longer prompt is refused, a shorter one zero-filled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsConfig:
    """Where the weights are: files under ``root``, or none and a seed (the debug models)."""

    seed: int | None = None
    """Draw every weight from this seed, in memory; no file is read."""
    root: str | None = None
    """Folder of the files below, relative to the YAML's own; the ``--weights`` option overrides it."""
    transformer: Mapping[str, str] = field(default_factory=dict)
    """Expert name to a glob of its safetensors shards."""
    vae: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    """``tokenizer.json`` of the text encoder; None with a seed: one token per byte."""

    def __post_init__(self) -> None:
        if (self.seed is None) == (self.root is None):
            raise ConfigError("weights: give either seed (random weights) or root (a folder of files)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """A low-rank adaptation merged into the transformer at a strength."""

    alpha: Mapping[str, float]
    """Default strength per expert."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Expert name to a file under the weights' root."""
    rank: int | None = None
    """Debug models: draw a LoRA of this rank from the weights' seed instead of reading files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request means when it does not say."""

    width: int
    height: int
    num_frames: int
    fps: int
    num_inference_steps: int = 10
    guidance_scale: float = 5.0
    """A file with a ``distill_lora`` that leaves it out means 1.0: distilled models run without guidance."""
    shift: float = 5.0
    noise_multiplier: float = 0.2
    negative_prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest request this model's deployment accepts."""

    max_frames: int
    max_tokens: int
    """Tokens of one generation (latent frames x tokens of a frame); bounds memory and time."""
    max_steps: int = 50
    max_side: int = 1280
    """Pixels of the longer side of the video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One servable model: its parts, weights, defaults and limits."""

    name: str
    revision: str
    """Changes whenever the weights do; recorded with every job."""
    transformer: TransformerConfig
    vae: VaeConfig
    text_encoder: TextEncoderConfig
    weights: WeightsConfig
    defaults: Defaults
    limits: Limits
    experts: tuple[str, ...] = ("main",)
    """One transformer, or two in the order high-noise, low-noise (Wan2.2)."""
    boundary: float = 0.875
    """Two experts: steps whose timestep is below ``1000 * boundary`` use the second."""
    lora: LoraConfig | None = None
    """The vectorized-timestep adaptation; its strength is the request's ``lora_alpha``."""
    distill_lora: LoraConfig | None = None
    """A step-distillation LoRA, merged first, at a fixed strength."""
    pristine_weights: PristineWeights = "device"
    """Where the copies are kept that a change of ``lora_alpha`` starts from. On the device they nearly double its
    weights; in pinned memory of the host they take none of it, and every change copies them over the bus."""
    precision: Precision | None = None
    """Overrides the rule of ``precision_on`` (bf16 on CUDA, fp32 on a CPU)."""

    def __post_init__(self) -> None:
        if len(self.experts) not in (1, 2):
            raise ConfigError(f"experts={list(self.experts)}: give one expert, or high-noise then low-noise")
        for part in (self.lora, self.distill_lora):
            if part is not None and set(part.alpha) != set(self.experts):
                raise ConfigError(f"lora alpha names {sorted(part.alpha)}; the experts are {sorted(self.experts)}")
        d = self.defaults
        if (d.num_frames - 1) % TEMPORAL_STRIDE or d.width % PIXEL_MULTIPLE or d.height % PIXEL_MULTIPLE:
            raise ConfigError(
                f"defaults: {d.width}x{d.height}, {d.num_frames} frames; sides must be multiples of "
                f"{PIXEL_MULTIPLE} and frames 4k+1"
            )

    @property
    def num_weights(self) -> int:
        """Those of all transformers, and the copies that a change of LoRA starts from: what every rank holds."""
        copies = 0 if self.lora is None else self.transformer.num_adapted
        return len(self.experts) * (self.transformer.num_parameters + copies)

    def precision_on(self, device_type: str) -> Precision:
        """Precision of this model on a device: what it is fed depends on it, so jobs record it."""
        return self.precision or ("bf16" if device_type == "cuda" else "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Widths of the gang's mesh axes. Ranks are ordered cfg (outermost), ring, ulysses."""

    cfg_degree: int = 1
    ring_degree: int = 1
    ulysses_degree: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            if getattr(self, item.name) < 1:
                raise ConfigError(f"{item.name}={getattr(self, item.name)}: must be at least 1")
        if self.cfg_degree > 2:
            raise ConfigError(f"cfg_degree={self.cfg_degree}: guidance has two branches; use 1 or 2")

    @property
    def sequence_degree(self) -> int:
        """Ranks that share the tokens of one forward."""
        return self.ring_degree * self.ulysses_degree

    @property
    def world_size(self) -> int:
        """Ranks of the gang."""
        return self.cfg_degree * self.sequence_degree

    def check(self, model: ModelConfig) -> Self:
        """Return self, or raise ConfigError if these degrees cannot run ``model``, saying which can."""
        check_heads(self.ulysses_degree, model.transformer.num_attention_heads)
        d = model.defaults
        tokens = tokens_per_frame(d.height, d.width)
        if tokens < self.sequence_degree:
            raise ConfigError(
                f"ring_degree * ulysses_degree = {self.sequence_degree} ranks, but a default "
                f"{d.width}x{d.height} frame has only {tokens} tokens; use at most {tokens}"
            )
        return self


def check_heads(ulysses_degree: int, num_attention_heads: int) -> None:
    """Raise ConfigError, saying which degrees can, if ranks of the ulysses axis cannot share the heads evenly."""
    if num_attention_heads % ulysses_degree:
        divisors = [str(n) for n in range(1, num_attention_heads + 1) if num_attention_heads % n == 0]
        raise ConfigError(
            f"ulysses_degree={ulysses_degree} does not divide num_attention_heads={num_attention_heads}; "
            f"use one of {', '.join(divisors)}"
        )


def model_names() -> list[str]:
    """Names of the models that ship with the package."""
    folder = files("configs") / "model"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_model_config(name_or_path: str, weights_root: str | None = None) -> ModelConfig:
    """Read a model's YAML.

    Args:
        name_or_path: a shipped name (``debug``), or a path (anything ending in .yaml).
        weights_root: folder of the weights, instead of the one the YAML names.

    Raises:
        ConfigError: there is no such model, its YAML cannot work, or it reads no weights from a folder.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        source: Any = Path(name_or_path)
    elif name_or_path in model_names():
        source = files("configs") / "model" / f"{name_or_path}.yaml"
    else:
        raise ConfigError(
            f"model {name_or_path!r} is unknown; use one of {', '.join(model_names())} or a path to a .yaml file"
        )
    try:
        values = yaml.safe_load(source.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"model configuration {source} cannot be read: {' '.join(str(error).split())}") from error
    if isinstance(values, dict) and values.get("distill_lora") and isinstance(values.get("defaults"), dict):
        values["defaults"].setdefault("guidance_scale", 1.0)
    model = from_mapping(ModelConfig, values, str(source))
    if weights_root is None:
        return _beside(Path(str(source)).parent, model)
    if model.weights.seed is not None:
        raise ConfigError(f"weights folder {weights_root!r}: {model.name} draws its weights from a seed; leave it out")
    return replace(model, weights=replace(model.weights, root=weights_root))


def _beside(folder: Path, model: ModelConfig) -> ModelConfig:
    root = model.weights.root
    return model if root is None else replace(model, weights=replace(model.weights, root=str(folder / root)))
