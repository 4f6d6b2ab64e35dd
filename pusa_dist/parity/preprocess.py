"""``preprocess``: pictures and frames of clips brought to the video's size.

The tensors' names say what was done: ``image_uint8_hwc`` became ``vae_input``; ``X_bgr_uint8`` became
``X_out_rgb_HxW_everyKth``, of which every K-th row and column was kept.
"""

import re

import numpy as np
import torch
from torch import Tensor

from pusa_dist.media.clips import fit_clip_frame
from pusa_dist.media.frames import to_model_range
from pusa_dist.media.images import fit_image
from pusa_dist.parity.cases import Case
from pusa_dist.parity.verdict import Check, Report, Tolerance

IMAGE, IMAGE_OUT = "image_uint8_hwc", "vae_input"
FRAME = "_bgr_uint8"
_FRAME_OUT = re.compile(
    r"(?P<stem>.+)_out_(?P<order>rgb|bgr)_(?P<height>\d+)x(?P<width>\d+)(?:_every(?P<every>\d+)\w+)?"
)


def check(case: Case) -> Report:
    """Compare every output with what we make of its input."""
    tolerance = Tolerance.parse(case.description)
    checks: list[Check] = []
    for name, recorded in case.tensors.items():
        if name.endswith(IMAGE_OUT):
            source = case.tensors[name.removesuffix(IMAGE_OUT) + IMAGE]
            checks += _compare_image(name, source, recorded, case, tolerance)
        elif match := _FRAME_OUT.fullmatch(name):
            ours = _fitted(case.tensors[match["stem"] + FRAME], int(match["width"]), int(match["height"]))
            every = int(match["every"] or 1)
            ours = ours[::every, ::every]
            checks += tolerance.compare(name, ours if match["order"] == "rgb" else ours.flip(2), recorded)
        elif not name.endswith((IMAGE, FRAME)):
            raise ValueError(f"tensor name {name!r} is not understood")
    return Report(checks)


def _compare_image(name: str, source: Tensor, recorded: Tensor, case: Case, tolerance: Tolerance) -> list[Check]:
    height, width = recorded.shape[-2:]
    described = tuple(case.description.get(key, size) for key, size in (("height", height), ("width", width)))
    if described != (height, width):
        raise ValueError(f"{name} is {height}x{width}, its JSON says {described[0]}x{described[1]}")
    pixels = fit_image(source.numpy(), width, height, case.description.get("fit", "stretch"))
    ours = torch.from_numpy(to_model_range(pixels[None]))[None]
    if "max_uint8_levels" in tolerance.limits.get("", {}):
        ours, recorded = _levels(ours), _levels(recorded)
    return tolerance.compare(name, ours, recorded)


def _levels(model_range: Tensor) -> Tensor:
    """-1..1 back to 0..255, unrounded."""
    return (model_range.double() + 1) * (255 / 2)


def _fitted(bgr: Tensor, width: int, height: int) -> Tensor:
    rgb = np.ascontiguousarray(bgr.numpy()[..., ::-1])
    return torch.from_numpy(fit_clip_frame(rgb, width, height, "crop"))
