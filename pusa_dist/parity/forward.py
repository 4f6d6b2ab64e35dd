"""``forward``: one call of the transformer with a timestep per frame."""

import torch

from pusa_dist.checkpoint.transformer import build_transformer
from pusa_dist.parity.cases import Case
from pusa_dist.parity.verdict import Check, Report, Tolerance
from pusa_dist.schedule import DTYPES
from pusa_dist.trace import record_forward

INPUTS = {"x", "timestep", "context"}


def check(case: Case) -> Report:
    """Compare the velocity, and what the embeddings and every block put out on the way to it."""
    tolerance, recorded, dtype = Tolerance.parse(case.description), case.tensors, DTYPES[case.precision]
    model = case.model()
    transformer = build_transformer(model, model.experts[0], device="cpu", precision=case.precision)
    latents, context = recorded["x"].to(dtype), recorded["context"].to(dtype)
    # What is fed is rounded to the precision; our transformer takes the rounded value in float32.
    timestep = recorded["timestep"].to(dtype).float()
    with torch.no_grad():
        ours = record_forward(transformer, latents, timestep, context)
    checks: list[Check] = []
    for name in sorted(recorded.keys() - INPUTS):
        if name not in ours:
            raise ValueError(f"tensor name {name!r} is not understood")
        checks += tolerance.compare(name, ours[name], recorded[name])
    return Report(checks)
