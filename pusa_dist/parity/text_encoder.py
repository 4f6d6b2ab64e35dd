"""``text_encoder``: a umT5 encoder whose weights lie in the case itself, and its rows zeroed past the prompt."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from pusa_dist.checkpoint.text import load_text_encoder, transformers_names
from pusa_dist.model.text import encode_ids
from pusa_dist.parity.cases import Case
from pusa_dist.parity.verdict import Check, Report, Tolerance
from pusa_dist.schedule import DTYPES

WEIGHT = "w/"
INPUTS = ("ids", "mask")


def check(case: Case) -> Report:
    """Compare the encoder's output and what the transformer is given of it."""
    tolerance, recorded = Tolerance.parse(case.description), case.tensors
    encoder = _encoder(case)
    checks: list[Check] = []
    for name in recorded:
        if name == "raw":
            with torch.no_grad():
                ours = encoder(input_ids=recorded["ids"], attention_mask=recorded["mask"]).last_hidden_state
        elif name == "embeds_zeroed":
            ours = encode_ids(encoder, recorded["ids"], recorded["mask"])
        elif name in INPUTS or name.startswith(WEIGHT):
            continue
        else:
            raise ValueError(f"tensor name {name!r} is not understood")
        checks += tolerance.compare(name, ours, recorded[name])
    return Report(checks)


def _encoder(case: Case) -> UMT5EncoderModel:
    dtype = DTYPES[case.precision]
    weights = {name.removeprefix(WEIGHT): t.to(dtype) for name, t in case.tensors.items() if name.startswith(WEIGHT)}
    with torch.device("meta"):
        encoder = UMT5EncoderModel(_config(case.description["config"]))
    load_text_encoder(encoder, transformers_names(weights), f"the text encoder of {case.name}")
    return encoder.eval().requires_grad_(False)


def _config(described: Mapping[str, Any]) -> UMT5Config:
    if described.get("shared_pos"):
        raise ValueError("shared_pos=true is T5's; umT5 has position biases in every layer")
    return UMT5Config(
        vocab_size=described["vocab"],
        d_model=described["dim"],
        d_kv=described["dim_attn"] // described["num_heads"],
        d_ff=described["dim_ffn"],
        num_layers=described["num_layers"],
        num_heads=described["num_heads"],
        relative_attention_num_buckets=described["num_buckets"],
    )
