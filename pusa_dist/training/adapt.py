"""The adaptation of a model from a cache of its latents: Wan2.1-14B, or any other of the kind.

The base is read weight by weight, straight into each rank's shard: no process ever holds it whole. The clips,
the VAE and the text encoder are not needed here (``cache``).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from pusa_dist.checkpoint.load import check_exactly
from pusa_dist.checkpoint.transformer import stored_weights
from pusa_dist.config import ModelConfig, Precision
from pusa_dist.errors import ConfigError
from pusa_dist.model.transformer import VectorTimestepTransformer, new_transformer
from pusa_dist.schedule import DTYPES
from pusa_dist.training.adapter import first_value, inject, read_adapter, save_adapter
from pusa_dist.training.cache import LatentCache, sample_order
from pusa_dist.training.distributed import ALONE, Ranks, checkpoint_blocks, like, shard
from pusa_dist.training.loop import LoopOptions, autocast, train
from pusa_dist.training.objective import TrainingSchedule, draw, lesson, loss, sample_generator

ADAPTER, RUN = "lora.safetensors", "run.json"
_MAY_CHANGE = ("device", "log_every", "save_every", "sample_every")
"""Settings that another start of the same run may have other values of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedOptions:
    """How a model is adapted; by default as the public code's script does it on 8 GPUs, for some ten epochs of 1200.

    Its learning rate is constant, this one falls on half a cosine; and it clips no gradients.
    """

    loop: LoopOptions = field(
        default_factory=lambda: LoopOptions(
            steps=1500, batch_size=1, lr=1e-5, warmup=0, ema=0.0, log_every=1, save_every=100
        )
    )
    rank: int = 512
    alpha: float | None = None
    """The update is ``alpha / rank * (B @ A)``; None: the rank."""
    sharded: bool = False
    """Cut the weights over the ranks, instead of a copy on each."""
    checkpointing: bool = True
    """Keep blocks' inputs only and run each again in the backward pass."""


def adapt(
    model: ModelConfig,
    data: Path,
    out: Path,
    options: CachedOptions,
    *,
    start: Path | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Adapt a model, or go on doing so; collective over the ranks.

    Args:
        model: whose transformer.
        data: a finished cache.
        out: folder of checkpoint, log and adapter, which all ranks see.
        options: of the run.
        start: an adapter in Pusa's format to start from, of the same rank.
        ranks: who trains together.

    Returns:
        The adapter's file, in Pusa's format.

    Raises:
        ConfigError: the cache or the settings cannot be used, or ``out`` holds another run.
        CheckpointError: weights cannot be loaded.
    """
    if len(model.experts) > 1:
        raise ConfigError(
            f"{model.name} has two experts; the adaptation is known for models with one, such as Wan2.1's"
        )
    cache = LatentCache(data, model)
    if ranks.is_first:  # an error here ends the others too
        _same_run(out / RUN, model, data, options, ranks)
    precision = model.precision_on(torch.device(options.loop.device).type)
    options = replace(options, loop=replace(options.loop, bf16=precision == "bf16"))
    transformer = adapted_transformer(model, options, precision, ranks=ranks, start=start)
    schedule, order = TrainingSchedule.of(precision), sample_order(len(cache), options.loop.seed)

    def step_loss(step: int, _: torch.Generator) -> Mapping[str, Tensor]:
        numbers = ranks.numbers(step, options.loop.batch_size)
        latents, context = cache.batch([order(number) for number in numbers])
        noise, indices = draw(latents, [sample_generator(options.loop.seed, number) for number in numbers])
        given = lesson(latents.to(options.loop.device), noise, indices, schedule)
        with autocast(options.loop):
            velocity = transformer(given.noisy, given.timesteps, context.to(options.loop.device))
        return {"loss": loss(velocity, given), "mse": (velocity.detach().float() - given.target).square().mean()}

    train(transformer, step_loss, options.loop, out, ranks=ranks)
    save_adapter(transformer, out / ADAPTER, write=ranks.is_first)
    return out / ADAPTER


def adapted_transformer(
    model: ModelConfig,
    options: CachedOptions,
    precision: Precision,
    *,
    ranks: Ranks = ALONE,
    start: Path | None = None,
) -> VectorTimestepTransformer:
    """The frozen base with an adapter, on the device of the run, sharded if that is wanted.

    Args:
        model: whose transformer.
        options: of the run.
        precision: of the base's weights.
        ranks: who shares it.
        start: an adapter to start from.

    Raises:
        CheckpointError: the base's weights, or the adapter's, do not fit.
    """
    with torch.device("meta"):
        transformer = new_transformer(model.transformer).requires_grad_(False)
    weights = stored_weights(model, model.experts[0], transformer)
    check_exactly(transformer, weights, f"transformer {model.name}/{model.experts[0]}")
    for parameter in transformer.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    inject(transformer, options.rank, options.alpha)
    if options.checkpointing:
        checkpoint_blocks(transformer)
    if options.sharded:
        shard(transformer, ranks)
    transformer.to_empty(device=options.loop.device)
    _fill(transformer, weights, options.loop.seed)
    if start is not None:
        read_adapter(transformer, start)
    return transformer.eval()


@torch.no_grad()
def _fill(transformer: nn.Module, weights: Mapping[str, Tensor], seed: int) -> None:
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad:
            value = first_value(parameter.shape, seed, name)
        else:
            value = weights[name.replace(".base_layer.", ".")]
        parameter.copy_(like(value.to(parameter.dtype), parameter))


def _same_run(path: Path, model: ModelConfig, data: Path, options: CachedOptions, ranks: Ranks) -> None:
    """Write down what the run is, or see that it is the one that was begun here. For the first rank to do."""
    described = asdict(options)
    loop = {key: value for key, value in described.pop("loop").items() if key not in _MAY_CHANGE}
    of = {"model": model.name, "revision": model.revision, "data": str(data), "ranks": ranks.world_size}
    run = json.loads(json.dumps({**of, **described, **loop}))
    if path.exists():
        begun = json.loads(path.read_text())
        different = [f"{key}={begun.get(key)} there, {run.get(key)} here" for key in run if begun.get(key) != run[key]]
        if different:
            raise ConfigError(
                f"{path.parent} holds a run with other settings ({'; '.join(different)}); repeat them, or use another "
                f"folder and --init-adapter {path.parent / ADAPTER}"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1) + "\n")
