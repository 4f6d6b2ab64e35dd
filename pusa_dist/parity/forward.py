"""``forward``: one call of the transformer with a timestep per frame."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.model.transformer import VectorTimestepTransformer, sinusoid
from pusa_dist.parity.cases import Case
from pusa_dist.parity.verdict import Check, Report, Tolerance
from pusa_dist.schedule import DTYPES

INPUTS = ("x", "timestep", "context")


def check(case: Case) -> Report:
    """Compare the velocity, and what the embeddings and every block put out on the way to it."""
    tolerance, recorded, dtype = Tolerance.parse(case.description), case.tensors, DTYPES[case.precision]
    model = case.model()
    transformer = build_transformer(model, model.experts[0], device="cpu", precision=case.precision)
    latents, context = recorded["x"].to(dtype), recorded["context"].to(dtype)
    # What is fed is rounded to the precision; our transformer takes the rounded value in float32.
    timestep = recorded["timestep"].to(dtype).float()
    ours = _trace(transformer, model.transformer.freq_dim, latents, timestep, context)
    checks: list[Check] = []
    for name in recorded:
        if name not in INPUTS:
            checks += tolerance.compare(name, _named(ours, name), recorded[name])
    return Report(checks)


def _named(ours: dict[str, Tensor], name: str) -> Tensor:
    if name not in ours:
        raise ValueError(f"tensor name {name!r} is not understood")
    return ours[name]


def _trace(
    transformer: VectorTimestepTransformer, freq_dim: int, latents: Tensor, timestep: Tensor, context: Tensor
) -> dict[str, Tensor]:
    """Run the forward and keep what the recordings name, in their shapes."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name] = output

        return hook

    embedder = transformer.condition_embedder
    hooked = {"temb": embedder.time_embedder, "tproj": embedder.time_proj, "ctx_emb": embedder.text_embedder}
    hooked |= {f"block{index}": block for index, block in enumerate(transformer.blocks)}
    for name, module in hooked.items():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        output = transformer(latents, timestep, context)
        patches = transformer.embed_patches(latents)
    blocks = {name: kept[name].flatten(1, 2) for name in kept if name.startswith("block")}  # (B, F, S, E)
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    return (
        kept
        | blocks
        | {
            "output": output,
            "patch": patches.unflatten(2, (rows, columns)).permute(0, 4, 1, 2, 3),
            "sinusoid": sinusoid(timestep, freq_dim).to(latents.dtype),
        }
    )
