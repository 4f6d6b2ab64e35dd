"""``python -m pusa_dist train vae|base|adapt``: the stages of a small model, one after the other.

Without options a stage is the recipe of the shipped weights. Under ``torchrun`` every rank takes samples of its
own. A stage that was interrupted goes on from its last checkpoint.
"""

import argparse
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pusa_dist.config import load_model_config


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the stages to a parser of their own."""
    stages = parser.add_subparsers(required=True, metavar="stage")
    _add_stage(stages.add_parser("vae", help="1: the autoencoder, on clips drawn as it goes"), _vae)
    _add_stage(stages.add_parser("base", help="2: the text-to-video base, with the text encoder"), _base)
    _add_stage(stages.add_parser("adapt", help="3: LoRA to a timestep per latent frame"), _adapt)


def _add_stage(parser: argparse.ArgumentParser, run: Callable[..., None]) -> None:
    parser.add_argument("--model", default="tiny", help="a shipped model's name, or a path to a YAML file: the shape")
    parser.add_argument("--run", type=Path, default=Path("outputs/tiny"), dest="folder", help="folder of the run")
    parser.add_argument("--threads", type=int, help="CPU threads of a rank; left out: torch's choice")
    for name, kind, meaning in _LOOP:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=meaning)
    if run is not _vae:
        parser.add_argument("--num-clips", type=int, help="clips encoded once and trained on")
        parser.add_argument("--caption-dropout", type=float, help="share of samples with the negative prompt")
    if run is _adapt:
        parser.add_argument("--rank", type=int, help="of the LoRA")
    parser.set_defaults(run=lambda arguments: _run(run, arguments))


_LOOP: tuple[tuple[str, Any, str], ...] = (
    ("steps", int, "optimiser steps"),
    ("batch_size", int, "samples a step, of each rank (the autoencoder's phases have their own)"),
    ("lr", float, "highest learning rate"),
    ("seed", int, "of everything random"),
    ("device", str, "cpu or cuda"),
    ("log_every", int, "steps between lines of log.jsonl"),
    ("save_every", int, "steps between checkpoints"),
    ("sample_every", int, "steps between sample grids"),
)


def _run(stage: Callable[..., None], arguments: argparse.Namespace) -> int:
    import torch

    from pusa_dist.training.distributed import join, leave

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model_config(arguments.model)
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
    from pusa_dist.training.stages import adapt_stage
    from pusa_dist.training.transformer import AdaptOptions

    adapt_stage(model, _options(AdaptOptions(), arguments), arguments.folder, ranks)


def _options(recipe: Any, arguments: argparse.Namespace) -> Any:
    """The recipe with what the command line says instead."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    loop = {name: given[name] for name, _, _ in _LOOP if name in given}
    own = {item.name: given[item.name] for item in fields(recipe) if item.name in given and item.name != "loop"}
    return replace(recipe, loop=replace(recipe.loop, **loop), **own)
