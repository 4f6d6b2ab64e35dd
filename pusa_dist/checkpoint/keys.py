"""Names of the transformer's weights: the published Wan files' own, and diffusers'.

Every rule leaves diffusers' names alone, so files of either kind go through the same function.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

from pusa_dist.errors import CheckpointError

T = TypeVar("T")

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
_BLOCK = r"^(blocks\.\d+\.)"
_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_BLOCK + r"self_attn\.", r"\1attn1."),
        (_BLOCK + r"cross_attn\.", r"\1attn2."),
        (_BLOCK + r"(attn[12]\.)([qkv])\.", r"\1\2to_\3."),
        (_BLOCK + r"(attn[12]\.)o\.", r"\1\2to_out.0."),
        (_BLOCK + r"ffn\.0\.", r"\1ffn.net.0.proj."),
        (_BLOCK + r"ffn\.2\.", r"\1ffn.net.2."),
        (_BLOCK + r"norm3\.", r"\1norm2."),
        (_BLOCK + r"modulation$", r"\1scale_shift_table"),
        (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
        (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
        (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
        (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
        (r"^time_projection\.1\.", "condition_embedder.time_proj."),
        (r"^head\.modulation$", "scale_shift_table"),
        (r"^head\.head\.", "proj_out."),
    )
)
_REVERSED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (_BLOCK + r"(attn[12])\.to_out\.0\.", r"\1\2.o."),
        (_BLOCK + r"(attn[12])\.to_([qkv])\.", r"\1\2.\3."),
        (_BLOCK + r"attn1\.", r"\1self_attn."),
        (_BLOCK + r"attn2\.", r"\1cross_attn."),
        (_BLOCK + r"ffn\.net\.0\.proj\.", r"\1ffn.0."),
        (_BLOCK + r"ffn\.net\.2\.", r"\1ffn.2."),
        (_BLOCK + r"norm2\.", r"\1norm3."),
        (_BLOCK + r"scale_shift_table$", r"\1modulation"),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
    )
)


def without_prefix(name: str) -> str:
    """Strip the wrapper that some tools save the model under."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def diffusers_name(name: str) -> str:
    """A weight's diffusers name, from that or from its original Wan name, prefixed or not."""
    name = without_prefix(name)
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


def original_name(name: str) -> str:
    """A weight's original Wan name from its diffusers name: the reverse of ``diffusers_name``."""
    for pattern, replacement in _REVERSED:
        name = pattern.sub(replacement, name)
    return name


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
