"""The stages in a run's folder, each from the files of the one before.

RUN/weights/    vae, transformer, text_encoder, pusa_lora .safetensors and tokenizer.json: a model's files
RUN/latents.safetensors    the encoded clips
RUN/vae, RUN/base, RUN/adapt    checkpoint, log and sample grids of a stage
"""

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pusa_dist.checkpoint.text import build_text_encoder, new_text_encoder
from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.checkpoint.vae import build_vae
from pusa_dist.config import ModelConfig
from pusa_dist.model.text import encode_ids
from pusa_dist.model.transformer import new_transformer
from pusa_dist.training.accelerate import as_written, compile_blocks
from pusa_dist.training.adapter import inject, save_adapter
from pusa_dist.training.data import encode_world, load_world, tokenise_all
from pusa_dist.training.distributed import Ranks
from pusa_dist.training.export import STORED, fold_statistics, save_text_encoder, save_transformer, save_vae
from pusa_dist.training.loop import LoopOptions, train
from pusa_dist.training.preview import preview
from pusa_dist.training.transformer import AdaptOptions, BaseOptions, Batches, TextToVideo, adapt_loss, base_loss
from pusa_dist.training.vae import VaeOptions, train_vae
from pusa_dist.world.caption import caption
from pusa_dist.world.scene import Scene, scene
from pusa_dist.world.vocabulary import world_tokenizer

logger = logging.getLogger(__name__)

WEIGHTS = "weights"
NUM_STATISTICS_CLIPS = 512
NUM_PREVIEWS = 32


def vae_stage(model: ModelConfig, options: VaeOptions, run: Path, ranks: Ranks) -> None:
    """Train the autoencoder and write ``vae.safetensors``, its latents normalised."""
    vae = train_vae(model.vae, options, run / "vae", ranks)
    if not ranks.is_first:
        return
    latents = encode_world(vae, range(NUM_STATISTICS_CLIPS)).float()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    logger.info("latents: mean %s, deviation %s", _rounded(mean), _rounded(std))
    fold_statistics(vae, mean.to(vae.device), std.to(vae.device))
    save_vae(vae, model.vae.num_res_blocks, run / WEIGHTS / "vae.safetensors")


def base_stage(model: ModelConfig, options: BaseOptions, run: Path, ranks: Ranks) -> None:
    """Train the text-to-video base; write ``transformer.safetensors``, ``text_encoder.safetensors``, the tokenizer."""
    loop = options.loop
    tokenizer = world_tokenizer()
    vae = build_vae(in_folder(model, run), device=loop.device, precision="fp32")
    world = load_world(vae, tokenizer, model.text_encoder.max_tokens, options.num_clips, run / "latents.safetensors")
    negative = tokenise_all(tokenizer, [model.defaults.negative_prompt], model.text_encoder.max_tokens)
    torch.manual_seed(loop.seed)
    net = TextToVideo(new_transformer(model.transformer), new_text_encoder(model.text_encoder)).to(loop.device)
    if options.compile:
        compile_blocks(net.transformer)
    batches = Batches(world, negative, loop, options.caption_dropout, shared=True)
    scenes, prompts = _held_out(model, tokenizer)

    def sample(step: int) -> None:
        contexts = (encode_ids(net.text_encoder, *prompts), encode_ids(net.text_encoder, *negative))
        with as_written(net.transformer):
            seen = preview(model, net.transformer, vae, scenes, contexts, run / "base" / f"text-{step:06d}.png")
        _report(run / "base", step, text=seen)

    def loss(step: int, _: torch.Generator) -> dict[str, Tensor]:
        return dict(base_loss(net, batches, loop, ranks.numbers(step, loop.batch_size)))

    train(net, loss, loop, run / "base", sample, ranks)
    if ranks.is_first:
        save_transformer(net.transformer, run / WEIGHTS / "transformer.safetensors")
        save_text_encoder(net.text_encoder, run / WEIGHTS / "text_encoder.safetensors")
        tokenizer.save(str(run / WEIGHTS / "tokenizer.json"))
        _record(run, "base", loop, ranks)


def adapt_stage(model: ModelConfig, options: AdaptOptions, run: Path, ranks: Ranks) -> None:
    """Adapt the base to a timestep per latent frame; write ``pusa_lora.safetensors``."""
    loop, base = options.loop, in_folder(model, run)
    tokenizer = world_tokenizer()
    vae = build_vae(base, device=loop.device, precision="fp32")
    text_encoder = build_text_encoder(base, device=loop.device, precision="fp32")
    world = load_world(vae, tokenizer, model.text_encoder.max_tokens, options.num_clips, run / "latents.safetensors")
    negative = tokenise_all(tokenizer, [model.defaults.negative_prompt], model.text_encoder.max_tokens)
    transformer = build_transformer(base, "main", device=loop.device, precision="fp32")
    inject(transformer, options.rank, seed=loop.seed)
    if options.compile:
        compile_blocks(transformer)
    batches = Batches(world, negative, loop, options.caption_dropout, shared=False)
    scenes, prompts = _held_out(model, tokenizer)
    contexts = (encode_ids(text_encoder, *prompts), encode_ids(text_encoder, *negative))

    def sample(step: int) -> None:
        show = partial(preview, model, transformer, vae, scenes, contexts)
        with as_written(transformer):
            text = show(run / "adapt" / f"text-{step:06d}.png")
            image = show(run / "adapt" / f"image-{step:06d}.png", first_frame=True)
        _report(run / "adapt", step, text=text, image=image)

    def loss(step: int, _: torch.Generator) -> dict[str, Tensor]:
        numbers = ranks.numbers(step, loop.batch_size)
        return dict(adapt_loss(transformer, text_encoder, batches, loop, numbers))

    train(transformer, loss, loop, run / "adapt", sample, ranks)
    if ranks.is_first:
        save_adapter(transformer, run / WEIGHTS / "pusa_lora.safetensors", dtype=STORED)
        _record(run, "adapt", loop, ranks)


def in_folder(model: ModelConfig, run: Path) -> ModelConfig:
    """The model with the weights of a run."""
    return replace(model, weights=replace(model.weights, root=str(run / WEIGHTS)))


def _held_out(model: ModelConfig, tokenizer: object) -> tuple[list[Scene], tuple[Tensor, Tensor]]:
    scenes = [scene(seed, "held-out") for seed in range(NUM_PREVIEWS)]
    return scenes, tokenise_all(tokenizer, [caption(each) for each in scenes], model.text_encoder.max_tokens)  # type: ignore[arg-type]


def _report(folder: Path, step: int, **found: dict[str, float]) -> None:
    line = {"step": step} | {name: {key: round(x, 3) for key, x in shares.items()} for name, shares in found.items()}
    with (folder / "previews.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    logger.info("%s", line)


def _record(run: Path, stage: str, loop: LoopOptions, ranks: Ranks) -> None:
    """Keep beside the weights what a stage has cost; ``make quality`` judges it."""
    path = run / WEIGHTS / "training.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    samples = loop.steps * loop.batch_size * ranks.world_size
    stages[stage] = {"steps": loop.steps, "samples": samples, "seed": loop.seed}
    path.write_text(json.dumps(stages, indent=1) + "\n")


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.tolist()]
