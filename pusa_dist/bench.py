"""Speed of the forward, measured where it can be and counted where it cannot.

On a CPU: our forward against diffusers' own, which is given a timestep per token, with the same
weights, interleaved. At full size: a trace on meta tensors, whose floating-point operations must be
the model's and nothing more, and which must never make a tensor of modulation per token. What a checkpoint
costs at full size is held against the least time that its steps can take.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from pusa_dist.config import ParallelConfig, TransformerConfig, load_model_config
from pusa_dist.errors import ConfigError
from pusa_dist.geometry import PATCH, latent_shape
from pusa_dist.model.transformer import VectorTimestepTransformer, new_transformer
from pusa_dist.request import RequestParams, resolve_request
from pusa_dist.state import GenerationState
from pusa_dist.trace import meta_transformer, trace_forward

Write = Callable[[str], None]

MIN_ROUNDS = 5
MIN_SPEEDUP = 1.2
MAX_DIFFERENCE = 1e-5
"""Between the two forwards, relative: below it they are the same computation."""

BENCH_MODEL = TransformerConfig(
    num_layers=2, num_attention_heads=12, attention_head_dim=128, ffn_dim=4096, text_dim=512
)
BENCH_LATENTS = (16, 9, 16, 24)
"""(C, F, H, W): 9 frames of 8 x 12 = 96 tokens, 864 in all."""
BENCH_TEXT_TOKENS = 64
"""7 % of the tokens; the 512 of production are 1.6 % of those of a 480p clip. Both forwards do the same with them."""
BENCH_THREADS = 2

FULL_MODEL = "pusa-v1-14b"
FULL_SIZES = {"480p": (480, 832, 1678.0), "720p": (720, 1280, 6523.0)}
"""Height, width and TFLOP of one forward over 81 frames."""
MAX_FLOP_DEVIATION = 1e-3

CHECKPOINT_EVERY = 10
"""``checkpoint_every`` of a denoiser unless it is configured."""
FASTEST_GANG_TFLOPS = 8 * 989.0
"""Dense bf16 peak of eight H200 (data sheet): no gang of them makes a step in less than its operations take at that."""
MAX_CHECKPOINT_COST = 0.02


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement and what it must be."""

    name: str
    measured: float
    unit: str
    required: str
    is_good: bool


def run(write: Write, *, rounds: int = 15, json_path: Path | None = None) -> int:
    """Measure everything and write it as a Markdown table.

    Args:
        write: takes one line.
        rounds: timed rounds of each forward, at least 5; the minimum counts.
        json_path: where to write the same figures as JSON, if anywhere.

    Returns:
        Exit status: 0 if every row is as required, else 1.

    Raises:
        ConfigError: too few rounds.
    """
    rows = [*speed_rows(rounds), *trace_rows(), *checkpoint_rows(rounds)]
    write("| measurement | measured | required | verdict |")
    write("|---|---|---|---|")
    for row in rows:
        measured = f"{row.measured:.4g} {row.unit}".strip()
        write(f"| {row.name} | {measured} | {row.required} | {'ok' if row.is_good else 'MISSED'} |")
    if json_path is not None:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return 0 if all(row.is_good for row in rows) else 1


def speed_rows(rounds: int) -> list[Row]:
    """Our forward against diffusers' with a timestep per token: same weights, same inputs, interleaved."""
    if rounds < MIN_ROUNDS:
        raise ConfigError(f"rounds={rounds}: use at least {MIN_ROUNDS}, since the minimum counts")
    ours, theirs = forward_pair(BENCH_MODEL, BENCH_LATENTS, BENCH_TEXT_TOKENS)
    with torch.inference_mode(), threads(BENCH_THREADS):
        wanted, got = theirs(), ours()  # also the warm-up
        difference = float((got - wanted).norm() / wanted.norm())
        our_s, their_s = fastest([ours, theirs], rounds)
    ratio = their_s / our_s
    frames, tokens = BENCH_LATENTS[1], BENCH_LATENTS[1] * BENCH_LATENTS[2] * BENCH_LATENTS[3] // PATCH**2
    shape = f"{tokens} tokens in {frames} frames, 12 x 128, 2 layers, fp32, {BENCH_THREADS} threads"
    how = f"minimum of {rounds}"
    return [
        Row(f"diffusers, a timestep per token ({shape})", their_s * 1e3, "ms", how, True),
        Row(f"ours, a timestep per frame ({shape})", our_s * 1e3, "ms", how, True),
        Row("diffusers / ours", ratio, "", f"at least {MIN_SPEEDUP}", ratio >= MIN_SPEEDUP),
        Row("their relative difference", difference, "", f"at most {MAX_DIFFERENCE:g}", difference <= MAX_DIFFERENCE),
    ]


def trace_rows() -> list[Row]:
    """FLOPs and the largest tensor of one forward of the full-size model over 81 frames."""
    config = load_model_config(FULL_MODEL).transformer
    model = meta_transformer(config)
    rows = []
    for name, (height, width, tflop) in FULL_SIZES.items():
        trace = trace_forward(model, latent_shape(config.in_channels, 81, height, width))
        deviation = abs(trace.total_tflops / tflop - 1)
        modulation = trace.tokens * 6 * config.dim
        largest = f"`{list(trace.largest_tensor_shape)}` of {trace.largest_tensor_op}"
        rows += [
            Row(
                f"{FULL_MODEL} {name}, one forward (meta trace)",
                trace.total_tflops,
                "TFLOP",
                f"{tflop:g} within {MAX_FLOP_DEVIATION:.1%}",
                deviation <= MAX_FLOP_DEVIATION,
            ),
            Row(
                f"{FULL_MODEL} {name}, largest tensor {largest}",
                trace.largest_tensor_numel / 1e6,
                "M elements",
                f"below modulation per token, {modulation / 1e6:.4g} M",
                trace.largest_tensor_numel < modulation,
            ),
        ]
    return rows


def checkpoint_rows(rounds: int) -> list[Row]:
    """Seconds that go into a checkpoint of a full-size generation, as a part of the steps between two of them.

    An upper bound of what it delays them by: a rank makes it on another thread than its steps.
    """
    rows = []
    for name, (height, width, tflop) in FULL_SIZES.items():
        state = full_size_state(height, width)
        (seconds,) = fastest([state.to_bytes], rounds)
        least_s = CHECKPOINT_EVERY * 2 * tflop / FASTEST_GANG_TFLOPS
        what = f"checkpoint of {len(state.to_bytes()) / 2**20:.3g} MiB"
        share = seconds / least_s
        rows += [
            Row(f"{FULL_MODEL} {name}, {what}", seconds * 1e3, "ms", f"minimum of {rounds}", True),
            Row(
                f"{FULL_MODEL} {name}, one every {CHECKPOINT_EVERY} steps, of their time on eight H200 at peak",
                share * 100,
                "%",
                f"below {MAX_CHECKPOINT_COST:.0%}",
                share < MAX_CHECKPOINT_COST,
            ),
        ]
    return rows


def full_size_state(height: int, width: int) -> GenerationState:
    """A generation of 81 frames with guidance, as it is after its first step."""
    model = load_model_config(FULL_MODEL)
    params = RequestParams(prompt="a prompt", seed=0, num_frames=81, height=height, width=width, num_inference_steps=50)
    request = resolve_request(params, (), model)
    context = torch.zeros(model.text_encoder.max_tokens, model.text_encoder.d_model, dtype=torch.bfloat16)
    state = GenerationState.start(request, model, "bf16", ParallelConfig(), context, context, None)
    return replace(state, step=1, latents=state.latents.float())


def forward_pair(
    config: TransformerConfig, latents_shape: tuple[int, int, int, int], text_tokens: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Our forward and diffusers', sharing weights and inputs, as calls without arguments."""
    torch.manual_seed(0)
    model = new_transformer(config).eval().requires_grad_(False)
    peer = diffusers_twin(model)
    _, frames, height, width = latents_shape
    latents = torch.randn(1, *latents_shape)
    context = torch.randn(1, text_tokens, config.text_dim)
    timestep = torch.linspace(0, 999, frames).round().unsqueeze(0)
    per_token = timestep.repeat_interleave((height // PATCH) * (width // PATCH), dim=1)

    def ours() -> Tensor:
        return model(latents, timestep, context)

    def theirs() -> Tensor:
        return peer(latents, per_token, context, return_dict=False)[0]

    return ours, theirs


def diffusers_twin(model: VectorTimestepTransformer) -> Any:
    """Diffusers' own transformer over the very same parameters."""
    with torch.device("meta"):
        twin: Any = WanTransformer3DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    twin.load_state_dict(model.state_dict(), assign=True)
    # Its rotary tables are buffers outside the state dict, so that they must be made on a real device.
    shape = (model.config[key] for key in ("attention_head_dim", "patch_size", "rope_max_seq_len"))
    twin.rope = type(twin.rope)(*shape)
    return twin.eval().requires_grad_(False)


def fastest(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Least seconds of each call over ``rounds``, taken in turn so that all meet the same machine."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with this many CPU threads, and put the number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
