"""Latents and text embeddings of a folder of clips, computed once: training reads nothing else.

A cache is a folder: ``cache.json`` says what was cached for which model, and one safetensors file a clip
holds ``latents`` (C, F, H, W) and ``prompt`` (rows that the caption uses, E). Files are written whole or not
at all and carry what they were made of, so caching goes on where it stopped, and several processes may each
cache their share of the clips.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from pusa_dist.config import ModelConfig, Precision, from_mapping
from pusa_dist.errors import CheckpointError, ConfigError, RequestError
from pusa_dist.geometry import PIXEL_MULTIPLE, TEMPORAL_STRIDE, latent_shape
from pusa_dist.prompt_encoder import PromptEncoder
from pusa_dist.training.footage import Clip, frames_of, read_footage
from pusa_dist.video_codec import VideoCodec

logger = logging.getLogger(__name__)

INDEX = "cache.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """What a cache's tensors depend on, besides the clips."""

    model: str
    revision: str
    width: int
    height: int
    num_frames: int
    precision: Precision
    """Of the VAE and the text encoder."""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.width % PIXEL_MULTIPLE or self.height % PIXEL_MULTIPLE or min(self.width, self.height) < PIXEL_MULTIPLE:
            raise ConfigError(f"size {self.width}x{self.height}: both sides must be multiples of {PIXEL_MULTIPLE}")
        if self.num_frames < 1 or (self.num_frames - 1) % TEMPORAL_STRIDE:
            raise ConfigError(f"num_frames={self.num_frames}: use 4k+1, such as 81")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIndex:
    """The content of ``cache.json``."""

    settings: CacheSettings
    samples: tuple[str, ...]
    """Names of the safetensors files, without the suffix, in the order of the metadata."""


def make_cache(
    model: ModelConfig,
    data: Path,
    out: Path,
    *,
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Encode every clip and caption of a folder that is not in the cache yet.

    Clips that cannot be used do not stop the others; they are named at the end.

    Args:
        model: whose VAE and text encoder.
        data: folder with ``metadata.csv`` and ``train/``.
        out: the cache; made if need be.
        size: (width, height) in pixels; None: the model's default.
        num_frames: of every clip, from its start; None: the model's default.
        device: where to encode.
        rank: this process caches clips ``rank``, ``rank + world_size``, ...
        world_size: processes that share the work; they need not know of each other.

    Returns:
        How many clips were encoded, the others being there already.

    Raises:
        ConfigError: the folder cannot be used, or the cache is of something else.
        CheckpointError: weights cannot be loaded.
        RequestError: some clips could not be encoded; the message names each with the reason.
    """
    width, height = size or (model.defaults.width, model.defaults.height)
    settings = CacheSettings(
        model=model.name,
        revision=model.revision,
        width=width,
        height=height,
        num_frames=num_frames or model.defaults.num_frames,
        precision=model.precision_on(torch.device(device).type),
    )
    clips = read_footage(data)
    names = [_name(clip) for clip in clips]
    _begin(out, settings, names)
    mine = list(dict(zip(names, clips, strict=True)).items())[rank::world_size]
    todo = [(name, clip) for name, clip in mine if not _is_made(out / f"{name}.safetensors", _origin(clip))]
    if not todo:
        return 0
    encode = _Encoder(model, settings, device)
    problems = []
    for name, clip in tqdm(todo, desc="cache", unit="clip", disable=rank != 0):
        try:
            _write(out / f"{name}.safetensors", encode(clip), _origin(clip))
        except RequestError as error:
            problems.append(f"{clip.path}: {error.message}")
            logger.warning("%s", problems[-1])
    if problems:
        raise RequestError(
            f"{len(problems)} of {len(clips)} clips could not be cached; mend them or remove their lines from the "
            f"metadata and run this again, the others are kept: {'; '.join(problems)}"
        )
    return len(todo)


class _Encoder:
    """A clip and its caption to what is cached."""

    def __init__(self, model: ModelConfig, settings: CacheSettings, device: str) -> None:
        self._settings = settings
        self._codec, self._text = VideoCodec(model, device), PromptEncoder(model, device)

    def __call__(self, clip: Clip) -> dict[str, Tensor]:
        settings = self._settings
        prompt = self._text.encode(clip.text)
        used = int(prompt.any(dim=1).nonzero().max()) + 1  # rows past the caption are zero
        frames = frames_of(clip, settings.width, settings.height, settings.num_frames)
        latents = torch.stack(list(self._codec.encode_frames(frames)), dim=1)
        return {"latents": latents.contiguous(), "prompt": prompt[:used].contiguous()}


class LatentCache:
    """A finished cache, read one sample at a time.

    Attributes:
        settings: what it was made with.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Open a cache for a model.

        Args:
            folder: of the cache.
            model: must be the one it was made with.

        Raises:
            ConfigError: there is no cache, it is not finished, or it is of another model.
        """
        self.settings, self._names = _index(folder)
        made_for = (self.settings.model, self.settings.revision)
        if made_for != (model.name, model.revision):
            raise ConfigError(
                f"the cache in {folder} is of model {made_for[0]} revision {made_for[1]}, not of {model.name} "
                f"revision {model.revision}; cache the clips again, into another folder"
            )
        missing = [name for name in self._names if not (folder / f"{name}.safetensors").is_file()]
        if missing:
            raise ConfigError(
                f"the cache in {folder} lacks {len(missing)} of {len(self._names)} clips "
                f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}); run `train cache` again to finish it"
            )
        self._folder, self._max_tokens = folder, model.text_encoder.max_tokens
        self._shape = latent_shape(model.vae.z_dim, self.settings.num_frames, self.settings.height, self.settings.width)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Latents (C, F, H, W) and the caption's embedding (L, E), zero past its rows, as they were computed.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._folder / f"{self._names[index]}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                latents, used = file.get_tensor("latents"), file.get_tensor("prompt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete it and run `train cache` again") from error
        if latents.shape != self._shape or len(used) > self._max_tokens:
            raise CheckpointError(
                f"{path} holds latents {tuple(latents.shape)} and {len(used)} rows of text, not {self._shape} and at "
                f"most {self._max_tokens}; delete it and run `train cache` again"
            )
        prompt = used.new_zeros(self._max_tokens, used.shape[1])
        prompt[: len(used)] = used
        return latents, prompt

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several samples: latents (B, C, F, H, W) and embeddings (B, L, E)."""
        latents, prompts = zip(*(self[index] for index in indices), strict=True)
        return torch.stack(latents), torch.stack(prompts)


def sample_order(num_samples: int, seed: int) -> Callable[[int], int]:
    """Which sample the run sees at which place: every sample once, shuffled, then again in another order.

    The order depends on the seed alone, so ranks agree and an interrupted run goes on where it was.

    Args:
        num_samples: of the data.
        seed: of the run.
    """
    shuffled: dict[int, list[int]] = {}

    def at(place: int) -> int:
        epoch, offset = divmod(place, num_samples)
        if epoch not in shuffled:
            shuffled.clear()
            generator = torch.Generator().manual_seed(_seed(seed, epoch))
            shuffled[epoch] = torch.randperm(num_samples, generator=generator).tolist()
        return shuffled[epoch][offset]

    return at


def _seed(seed: int, epoch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()[:7], "big")


def _name(clip: Clip) -> str:
    return hashlib.sha256(f"{clip.file_name}\n{clip.text}".encode()).hexdigest()[:24]


def _origin(clip: Clip) -> dict[str, str]:
    """What a sample was made of. A clip that changes is encoded again."""
    stat = clip.path.stat()
    return {"file": clip.file_name, "text": clip.text, "bytes": str(stat.st_size), "mtime_ns": str(stat.st_mtime_ns)}


def _is_made(path: Path, origin: dict[str, str]) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() == origin
    except (OSError, SafetensorError):  # none, or a damaged one
        return False


def _write(path: Path, tensors: dict[str, Tensor], origin: dict[str, str]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(tensors, partial, metadata=origin)
    partial.replace(path)


def _begin(out: Path, settings: CacheSettings, names: Iterable[str]) -> None:
    """Write the index, unless the folder holds a cache made with other settings."""
    path = out / INDEX
    if path.exists():
        there = _index(out)[0]
        different = [
            f"{key}={value} there, {asdict(settings)[key]} here"
            for key, value in asdict(there).items()
            if value != asdict(settings)[key]
        ]
        if different:
            raise ConfigError(f"{out} holds a cache of something else ({'; '.join(different)}); use another folder")
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"settings": asdict(settings), "samples": list(names)}, indent=1) + "\n")
    partial.replace(path)


def _index(folder: Path) -> tuple[CacheSettings, tuple[str, ...]]:
    path = folder / INDEX
    try:
        values: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); make the cache with `python -m pusa_dist train cache`"
        ) from error
    index = from_mapping(CacheIndex, values, str(path))
    if index.settings.format != FORMAT or not index.samples:
        raise ConfigError(f"{path} is of another version or lists no clip; cache the clips again, into another folder")
    return index.settings, index.samples
