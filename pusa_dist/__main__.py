"""Command line of the engine: ``python -m pusa_dist generate|plan|parity|bench|train``.

``generate`` also runs under ``torchrun --nproc-per-node N -m pusa_dist generate ...``.
"""

import argparse
import json
import logging
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pusa_dist.config import ModelConfig, ParallelConfig, from_mapping, load_model_config
from pusa_dist.errors import PusaError, RequestError
from pusa_dist.geometry import shard_sizes, tokens_per_frame
from pusa_dist.request import GenerationRequest, RequestParams, check_request, parse_size, resolve_request
from pusa_dist.training.cli import add_train

OTHER_RANKS_WAIT_S = 10.0
"""torchrun ends a gang well within this once one of its ranks has failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; user errors print one line and exit with 2."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        return arguments.run(arguments)
    except (PusaError, OSError) as error:
        _report(error, rank=int(os.environ.get("RANK", "0")))
        return 2


def _report(error: Exception, rank: int) -> None:
    """Tell the user, once: all ranks meet a mistake in the command, so rank 0 tells it and torchrun ends the others."""
    if rank != 0:
        time.sleep(OTHER_RANKS_WAIT_S)  # still running: it is this rank's own
    print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pusa_dist", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_generate(commands.add_parser("generate", help="generate one video to a file"))
    _add_plan(commands.add_parser("plan", help="show how a gang would split a video, without any GPU"))
    parity = commands.add_parser("parity", help="compare with recorded tensors of the public code")
    parity.add_argument("folder", type=Path, help="folder with recorded tensors and their manifest.json")
    parity.set_defaults(run=_parity)
    add_train(
        commands.add_parser("train", help="train a small model stage by stage, or adapt a model to a folder of clips")
    )
    bench = commands.add_parser("bench", help="measure the engine against diffusers in one run")
    bench.add_argument(
        "--rounds", type=int, default=15, help="timed rounds of each variant, at least 5 (default: %(default)s)"
    )
    bench.add_argument("--json", type=Path, help="also write the figures to this file")
    bench.set_defaults(run=_bench)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="tiny", help="a shipped model's name, or a path to a YAML file (default: %(default)s)"
    )
    parser.add_argument(
        "--cfg-degree", type=int, default=1, help="ranks for the two guidance branches, 1 or 2 (default: %(default)s)"
    )
    parser.add_argument("--ring-degree", type=int, default=1, help="ranks of the ring axis (default: %(default)s)")
    parser.add_argument(
        "--ulysses-degree", type=int, default=1, help="ranks of the Ulysses axis (default: %(default)s)"
    )
    parser.add_argument("--size", metavar="WxH", help="video size in pixels, multiples of 16 (default: the model's)")
    parser.add_argument("--num-frames", type=int, help="frames of the video, 4k+1 (default: the model's)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--prompt", required=True, help="what the video shows")
    parser.add_argument("--negative-prompt", help="what it should not show (default: the model's)")
    parser.add_argument("--input", type=Path, action="append", default=[], help="image or clip; may be repeated")
    parser.add_argument(
        "--conditioning",
        default="[]",
        help='JSON list as in the API, e.g. [{"input": 0, "position": "start", "noise_multiplier": 0.2}] '
        "(default: one image alone is the start)",
    )
    parser.add_argument("--fps", type=int, help="frames a second of the video (default: the model's)")
    parser.add_argument("--num-inference-steps", type=int, help="denoising steps, 1 to 50 (default: the model's)")
    parser.add_argument(
        "--guidance-scale", type=float, help="classifier-free guidance; 1 turns it off (default: the model's)"
    )
    parser.add_argument("--shift", type=float, help="shift of the sigma schedule (default: the model's)")
    parser.add_argument(
        "--lora-alpha",
        help="strength of the Pusa LoRA: a number, or a JSON object with one for each expert (default: the model's)",
    )
    parser.add_argument("--seed", type=int, help="seed of the noise (default: drawn, and printed)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="device each rank uses (default: %(default)s)"
    )
    parser.add_argument("--threads", type=_count, help="CPU threads of each rank (default: PyTorch's choice)")
    parser.add_argument("--weights", help="folder of the weights (default: the one that the model's YAML names)")
    parser.add_argument(
        "--attention",
        default="ours",
        choices=("ours", "xfuser"),
        help="attention implementation for several ranks (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/generated.mp4"), help="the MP4 to write (default: %(default)s)"
    )
    parser.add_argument(
        "--repeat",
        type=_count,
        default=1,
        help="generate it this often on the loaded model and time each run (default: %(default)s)",
    )
    parser.set_defaults(run=_generate)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.set_defaults(run=_plan)


def _parallel(arguments: argparse.Namespace) -> ParallelConfig:
    return ParallelConfig(
        cfg_degree=arguments.cfg_degree,
        ring_degree=arguments.ring_degree,
        ulysses_degree=arguments.ulysses_degree,
    )


def _size(arguments: argparse.Namespace) -> tuple[int | None, int | None]:
    return parse_size(arguments.size) or (None, None)


def _json(text: str, option: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"{option} is not valid JSON: {error}", option) from error


def _request(arguments: argparse.Namespace, model: ModelConfig, inputs: Sequence[bytes]) -> GenerationRequest:
    from pusa_dist.media.probe import probe

    width, height = _size(arguments)
    values = {
        "prompt": arguments.prompt,
        "negative_prompt": arguments.negative_prompt,
        "width": width,
        "height": height,
        "num_frames": arguments.num_frames,
        "fps": arguments.fps,
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "shift": arguments.shift,
        "seed": random.SystemRandom().getrandbits(31) if arguments.seed is None else arguments.seed,
        "lora_alpha": None if arguments.lora_alpha is None else _json(arguments.lora_alpha, "--lora-alpha"),
        "conditioning": _json(arguments.conditioning, "--conditioning"),
    }
    params = from_mapping(RequestParams, values, "request")
    media = [probe(data, f"--input {path}") for data, path in zip(inputs, arguments.input, strict=True)]
    request = resolve_request(params, media, model)
    check_request(_parallel(arguments), request)
    return request


def _generate(arguments: argparse.Namespace) -> int:
    from pusa_dist.generate import Generator, Place
    from pusa_dist.worker import WorkerOptions

    model = load_model_config(arguments.model, arguments.weights)
    inputs = [path.read_bytes() for path in arguments.input]
    request = _request(arguments, model, inputs)
    place = Place.from_environment()
    options = WorkerOptions(
        device=arguments.device,
        threads=arguments.threads,
        attention=arguments.attention,
    )
    generator = Generator(model, _parallel(arguments), options, place)
    try:
        request = generator.share(request)  # a seed that is drawn must be the same on every rank
        for _ in range(arguments.repeat):
            seconds = generator.generate(request, inputs, arguments.out)
            if place.rank == 0:
                print(json.dumps({"out": str(arguments.out), "seed": request.seed, "seconds": seconds}))
    finally:
        generator.close()
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pusa_dist.checkpoint.memory import weights_memory

    model = load_model_config(arguments.model)
    parallel = _parallel(arguments).check(model)
    width, height = _size(arguments)
    params = RequestParams(prompt="plan", seed=0, width=width, height=height, num_frames=arguments.num_frames)
    request = resolve_request(params, [], model)
    check_request(parallel, request)
    per_frame = tokens_per_frame(request.height, request.width)
    shards = shard_sizes(per_frame, parallel.sequence_degree)
    print(f"{model.name}: {request.width}x{request.height}, {request.num_frames} frames")
    print(f"latent frames {request.num_latent_frames}, tokens a frame {per_frame}, no padding")
    print(
        f"ranks {parallel.world_size} = cfg {parallel.cfg_degree} x ring {parallel.ring_degree} "
        f"x ulysses {parallel.ulysses_degree}"
    )
    print(f"tokens of a frame on each sequence rank: {', '.join(map(str, shards))}")
    for line in weights_memory(model, model.precision_on("cuda")).describe():
        print(line)
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from pusa_dist.parity import run

    return run(arguments.folder, print)


def _bench(arguments: argparse.Namespace) -> int:
    from pusa_dist.bench import run

    return run(print, rounds=arguments.rounds, json_path=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
