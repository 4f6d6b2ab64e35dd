"""``python -m pusa_dist train vae|base|adapt``: the stages of a small model, one after the other.

Without options a stage is the recipe of the shipped weights. Under ``torchrun`` every rank takes samples of its
own. A stage that was interrupted goes on from its last checkpoint.

``train cache`` and ``train adapt --data`` adapt a model that exists, such as Wan2.1-14B, to a folder of clips, and
``train plan`` says what GPU memory that takes.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pusa_dist.config import load_model_config
from pusa_dist.errors import ConfigError
from pusa_dist.request import parse_size


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the stages to a parser of their own."""
    stages = parser.add_subparsers(required=True, metavar="stage")
    _add_stage(stages.add_parser("vae", help="stage 1: the autoencoder, on clips that are drawn as it goes"), _vae)
    _add_stage(stages.add_parser("base", help="stage 2: the text-to-video base, with the text encoder"), _base)
    _add_stage(
        stages.add_parser("adapt", help="stage 3: a LoRA that adapts the base to a timestep for each latent frame"),
        _adapt,
    )
    _add_cache(stages.add_parser("cache", help="encode a folder of clips and their captions once, for adapt --data"))
    _add_plan(stages.add_parser("plan", help="work out, without a GPU, how much GPU memory an adaptation takes"))


def _add_stage(parser: argparse.ArgumentParser, run: Callable[..., None]) -> None:
    parser.add_argument(
        "--model", default="tiny", help="name or YAML file of the model whose shape is trained (default: %(default)s)"
    )
    # --run is no name to use under torchrun, which takes it for an option of its own.
    parser.add_argument("--out", "--run", type=Path, dest="folder", help="folder of the run (default: outputs/MODEL)")
    parser.add_argument("--threads", type=int, help="CPU threads of each rank (default: PyTorch's choice)")
    for name, kind, meaning in _LOOP:
        choices = ("cpu", "cuda") if name == "device" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, choices=choices, help=meaning)
    if run is not _vae:
        parser.add_argument("--num-clips", type=int, help="number of clips to encode once and train on")
        parser.add_argument(
            "--caption-dropout", type=float, help="share of the samples that are given the negative prompt, 0 to 1"
        )
    if run is _adapt:
        parser.add_argument("--rank", type=int, help="rank of the LoRA")
        _add_cached(parser.add_argument_group("adapting a model that exists to your own clips"))
    parser.set_defaults(run=lambda arguments: _run(run, arguments))


def _add_cached(group: Any) -> None:
    group.add_argument("--data", type=Path, help="adapt to this cache of clips, made by `train cache`")
    group.add_argument("--weights", help="folder of the model's weights (default: the one that its YAML names)")
    group.add_argument("--alpha", type=float, help="the update is alpha / rank * (B @ A) (default: the rank)")
    group.add_argument("--init-adapter", type=Path, help="adapter in Pusa's format to start from")
    group.add_argument(
        "--sharded", action="store_true", default=None, help="divide the weights among the ranks (FSDP2)"
    )
    group.add_argument(
        "--no-checkpointing",
        action="store_false",
        default=None,
        dest="checkpointing",
        help="keep all activations instead of computing them again: faster, more memory",
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", metavar="WxH", help="video size in pixels (default: the model's)")
    parser.add_argument("--num-frames", type=int, help="frames of every clip, 4k+1 (default: the model's)")


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a shipped model's name, or a path to a YAML file")
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.csv (file_name,text) and train/")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the cache; an interrupted run continues where it stopped"
    )
    parser.add_argument("--weights", help="folder of the model's weights (default: the one that its YAML names)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="device each process uses (default: %(default)s)"
    )
    _add_size(parser)
    parser.set_defaults(run=_cache)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="pusa-v1-14b", help="a shipped model's name, or a path to a YAML file (default: %(default)s)"
    )
    parser.add_argument("--rank", type=int, default=512, help="rank of the LoRA (default: %(default)s)")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1, 8, 16], help="numbers of GPUs to compare (default: 1 8 16)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="samples of each GPU in a step (default: %(default)s)"
    )
    _add_size(parser)
    parser.set_defaults(run=_plan)


_LOOP: tuple[tuple[str, Any, str], ...] = (
    ("steps", int, "optimiser steps"),
    ("batch_size", int, "samples of each rank in a step (the autoencoder's phases have their own)"),
    ("lr", float, "highest learning rate"),
    ("cycle", int, "steps after which the learning rate starts again from its highest"),
    ("seed", int, "seed of everything random"),
    ("device", str, "device each rank uses (default: cpu)"),
    ("log_every", int, "steps between lines of log.jsonl"),
    ("save_every", int, "steps between checkpoints"),
    ("sample_every", int, "steps between sample grids"),
)


def _run(stage: Callable[..., None], arguments: argparse.Namespace) -> int:
    import torch

    from pusa_dist.training.distributed import join, leave

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model_config(arguments.model, vars(arguments).get("weights"))
    arguments.folder = arguments.folder or Path("outputs") / model.name
    ranks = join(arguments.device or "cpu")
    try:
        stage(model, arguments, ranks)
    finally:
        if ranks.world_size > 1:
            leave()
    return 0


def _vae(model: Any, arguments: argparse.Namespace, ranks: Any) -> None:
    from pusa_dist.training.stages import vae_stage
    from pusa_dist.training.vae import VaeOptions

    vae_stage(model, _options(VaeOptions(), arguments), arguments.folder, ranks)


def _base(model: Any, arguments: argparse.Namespace, ranks: Any) -> None:
    from pusa_dist.training.stages import base_stage
    from pusa_dist.training.transformer import BaseOptions

    base_stage(model, _options(BaseOptions(), arguments), arguments.folder, ranks)


def _adapt(model: Any, arguments: argparse.Namespace, ranks: Any) -> None:
    _refuse_given(arguments, *(("--data", _CACHED_ONLY) if arguments.data is None else ("no --data", _WORLD_ONLY)))
    if arguments.data is not None:
        from pusa_dist.training.adapt import CachedOptions, adapt

        options = _options(CachedOptions(), arguments)
        adapt(model, arguments.data, arguments.folder / "adapt", options, start=arguments.init_adapter, ranks=ranks)
        return
    from pusa_dist.training.stages import adapt_stage
    from pusa_dist.training.transformer import AdaptOptions

    adapt_stage(model, _options(AdaptOptions(), arguments), arguments.folder, ranks)


_CACHED_ONLY = ("weights", "alpha", "init_adapter", "sharded", "checkpointing")
_WORLD_ONLY = ("num_clips", "caption_dropout", "sample_every")


def _refuse_given(arguments: argparse.Namespace, wanted: str, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        listed = ", ".join(f"--{'no-' * (name == 'checkpointing')}{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{listed}: only with {wanted}; leave it out")


def _options(recipe: Any, arguments: argparse.Namespace) -> Any:
    """The recipe with what the command line says instead."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    loop = {name: given[name] for name, _, _ in _LOOP if name in given}
    own = {item.name: given[item.name] for item in fields(recipe) if item.name in given and item.name != "loop"}
    return replace(recipe, loop=replace(recipe.loop, **loop), **own)


def _cache(arguments: argparse.Namespace) -> int:
    import os

    from pusa_dist.parallel.mesh import check_device
    from pusa_dist.training.cache import make_cache

    model = load_model_config(arguments.model, arguments.weights)
    # Processes share the clips by number and never talk, so each may also be started by hand.
    rank, world_size, place = (int(os.environ.get(name, default)) for name, default in _PLACE)
    device = f"cuda:{place}" if arguments.device == "cuda" else "cpu"
    check_device(device)
    made = make_cache(
        model,
        arguments.data,
        arguments.out,
        size=parse_size(arguments.size),
        num_frames=arguments.num_frames,
        device=device,
        rank=rank,
        world_size=world_size,
    )
    logging.getLogger(__name__).info("%d clips encoded into %s, the others were there", made, arguments.out)
    return 0


_PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _plan(arguments: argparse.Namespace) -> int:
    from pusa_dist.training.memory import describe, plan_memory

    model = load_model_config(arguments.model)
    width, height = parse_size(arguments.size) or (model.defaults.width, model.defaults.height)
    num_frames = arguments.num_frames or model.defaults.num_frames
    plans = [
        plan_memory(
            model,
            rank=arguments.rank,
            gpus=gpus,
            width=width,
            height=height,
            num_frames=num_frames,
            batch_size=arguments.batch_size,
        )
        for gpus in arguments.gpus
    ]
    sys.stdout.write(f"{model.name}: LoRA of rank {arguments.rank}, {width}x{height}, {num_frames} frames\n")
    sys.stdout.write("\n".join(describe(plans)) + "\n")
    return 0
