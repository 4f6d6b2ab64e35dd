"""Names of the transformer's weights: the published Wan files' own, and diffusers'.

Diffusers' names are left alone, so files of either kind go through the same function.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from pusa_dist.errors import CheckpointError

T = TypeVar("T")

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
_BLOCK = re.compile(r"blocks\.\d+\.")
# Beginnings of original names and of diffusers' names; the first that fits counts.
_ATTENTION = {"q.": "to_q.", "k.": "to_k.", "v.": "to_v.", "o.": "to_out.0.", "": ""}
_IN_BLOCK = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
    "ffn.0.": "ffn.net.0.proj.",
    "ffn.2.": "ffn.net.2.",
    "norm3.": "norm2.",
    "modulation": "scale_shift_table",
}
_OUTSIDE = {
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "head.modulation": "scale_shift_table",
    "head.head.": "proj_out.",
}


def without_prefix(name: str) -> str:
    """Strip the wrapper that some tools save the model under."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def diffusers_name(name: str) -> str:
    """A weight's diffusers name, from that or from its original Wan name, prefixed or not."""
    return _renamed(without_prefix(name), _IN_BLOCK, _OUTSIDE)


def original_name(name: str) -> str:
    """A weight's original Wan name from its diffusers name: the reverse of ``diffusers_name``."""
    return _renamed(name, _reversed(_IN_BLOCK), _reversed(_OUTSIDE))


def with_diffusers_names(tensors: Mapping[str, T], what: str) -> dict[str, T]:
    """The same values under diffusers' names.

    Raises:
        CheckpointError: two keys are two names of one weight.
    """
    renamed: dict[str, T] = {}
    source: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = diffusers_name(key)
        if name in renamed:
            raise CheckpointError(f"{what}: {source[name]} and {key} are both {name}; keep one of them")
        renamed[name], source[name] = tensor, key
    return renamed


def _renamed(name: str, in_block: Mapping[str, str], outside: Mapping[str, str]) -> str:
    block = _BLOCK.match(name)
    start = block.end() if block else 0
    for old, new in (in_block if block else outside).items():
        if name.startswith(old, start):
            return name[:start] + new + name[start + len(old) :]
    return name


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
