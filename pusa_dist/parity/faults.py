"""Faults of the public code that we do not repeat, and what is checked in their place.

Fault 2: with every frame given and every multiplier below 1, the public scheduler looks its step up
from the largest scaled timestep, so several steps resolve to one index. We use the loop's own sigma.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pusa_dist.parity.cases import Case

_KNOWN = {2: "upstream fault 2: checked against the loop's own sigma, not against the recording"}


def known_fault(case: Case) -> str | None:
    """What to say of a recording of a fault; None for a sound one.

    Raises:
        ValueError: the case records a fault we do not know.
    """
    fault = case.description.get("upstream_fault")
    if fault is None:
        return None
    if fault not in _KNOWN:
        raise ValueError(f"upstream_fault={fault!r} is not known")
    return _KNOWN[fault]


def expected_tables(
    sigmas: Tensor, timesteps: Tensor, num_latent_frames: int, multipliers: Mapping[int, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model is fed, sigma and next sigma, each (N, F), from a recorded scalar schedule, by loop index.

    Written apart from ``step_tables``, so that the two can be compared.

    Args:
        sigmas: (N,) recorded.
        timesteps: (N,) recorded, in the dtype of the precision.
        num_latent_frames: F.
        multipliers: of each given latent frame.
    """
    columns = []
    following = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
    for frame in range(num_latent_frames):
        share = multipliers.get(frame, 1.0)
        fed = (timesteps * share).trunc().float() if multipliers else timesteps.float()
        moves = (fed != 0) if frame in multipliers else torch.ones_like(fed, dtype=torch.bool)
        columns.append(torch.stack([fed, sigmas * share * moves, following * share * moves]))
    fed, sigma, sigma_next = torch.stack(columns, dim=-1)
    return fed, sigma, sigma_next
