"""``vae``: clips to latents and latents to clips, whole and in tiles."""

import torch
from torch import Tensor

from pusa_dist.checkpoint.vae import build_vae
from pusa_dist.config import ModelConfig
from pusa_dist.geometry import SPATIAL_STRIDE
from pusa_dist.model.vae import decode_chunks, encode
from pusa_dist.parity.cases import Case
from pusa_dist.parity.verdict import Check, Report, Tolerance
from pusa_dist.schedule import DTYPES

INPUTS = ("video", "decode_input")


def check(case: Case) -> Report:
    """Compare with the folder's VAE; where it holds several, with the one that agrees best."""
    tolerance = Tolerance.parse(case.description)
    models = case.folder.vae_models()
    if not models:
        raise ValueError("no weights case of this folder describes a VAE (vae_dim in its JSON)")
    channels = {t.shape[1] for name, t in case.tensors.items() if name.startswith("latents") or name == INPUTS[1]}
    fitting = [model for model in models if channels <= {model.vae.z_dim}]
    if not fitting:
        raise ValueError(f"latents have {sorted(channels)} channels, which no VAE of this folder has")
    found = {model.name: _compare(case, model, tolerance) for model in fitting}
    best = min(found, key=lambda name: max((check.severity for check in found[name]), default=0.0))
    return Report(found[best], [f"weights {best}"] if len(found) > 1 else [])


def _compare(case: Case, model: ModelConfig, tolerance: Tolerance) -> list[Check]:
    vae = build_vae(model, device="cpu", precision=case.precision)
    dtype = DTYPES[case.precision]
    checks: list[Check] = []
    for name, recorded in case.tensors.items():
        if name in INPUTS:
            continue
        cut = _tiles(case) if "tiled" in name else {}
        if name.startswith("latents"):
            video = case.tensors["video"].to(dtype)
            ours = encode(vae, video[:, :, :1] if "first_frame_only" in name else video, **cut)
        elif name.startswith("decoded"):
            ours = torch.cat(list(decode_chunks(vae, _decode_input(case).to(dtype), **cut)), dim=2)
        else:
            raise ValueError(f"tensor name {name!r} is not understood")
        checks += tolerance.compare(name, ours, recorded)
    return checks


def _tiles(case: Case) -> dict[str, tuple[int, int]]:
    height, width = case.description["tile_size"]
    step_height, step_width = case.description["tile_stride"]
    return {"tile": (height, width), "tile_stride": (step_height, step_width)}


def _decode_input(case: Case) -> Tensor:
    """The case's own, or that of the vae case of this folder that it refers to."""
    if INPUTS[1] in case.tensors:
        return case.tensors[INPUTS[1]]
    holders = [
        c for c in case.folder.cases if c.listed_kind == "vae" and c.name != case.name and INPUTS[1] in c.tensors
    ]
    named = [c for c in holders if f"{c.name}.safetensors" in case.description.get("exercises", "")]
    size = next(t.shape[-2:] for name, t in case.tensors.items() if name.startswith("decoded"))
    fitting = [
        c for c in named or holders if [s * SPATIAL_STRIDE for s in c.tensors[INPUTS[1]].shape[-2:]] == list(size)
    ]
    if len(fitting) != 1:
        raise ValueError(f"it has no decode_input, and {len(fitting)} vae cases of this folder have one that fits")
    return fitting[0].tensors[INPUTS[1]]
