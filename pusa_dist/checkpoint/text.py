"""Building the text encoder: published umT5 names to transformers' names, or weights drawn from a seed."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from pusa_dist.checkpoint.load import load_exactly, read_tensors
from pusa_dist.checkpoint.seeded import seeded_state
from pusa_dist.config import ModelConfig, Precision, TextEncoderConfig
from pusa_dist.schedule import DTYPES
from pusa_dist.weights import files_of

# Published name to transformers' name; a block's names follow its number.
_WHOLE = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_REVERSED = {new: old for old, new in _BLOCK.items()}
_IN_ENCODER = re.compile(r"encoder\.block\.(\d+)\.(.+)")
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_TIED = "encoder.embed_tokens.weight"


def build_text_encoder(model: ModelConfig, *, device: str, precision: Precision) -> UMT5EncoderModel:
    """The model's text encoder with its weights, ready to run.

    Args:
        model: its shape and where its weights are.
        device: where the weights go.
        precision: dtype of the weights and of what is computed.

    Raises:
        CheckpointError: the file's tensors are not exactly the encoder's.
        ConfigError: the file does not exist.
    """
    dtype = DTYPES[precision]
    with torch.device("meta"):
        encoder = new_text_encoder(model.text_encoder)
    if model.weights.seed is not None:
        drawn = seeded_state(encoder, model.weights.seed, "text_encoder")
        tensors = {name: tensor.to(device, dtype) for name, tensor in drawn.items()}
        tensors[_TIED] = tensors["shared.weight"]
    else:
        files = files_of(model, "weights.text_encoder", model.weights.text_encoder)
        tensors = transformers_names(read_tensors(files, dtype=dtype, device=device))
    load_text_encoder(encoder, tensors, f"the text encoder of {model.name}")
    return encoder.eval().requires_grad_(False)


def new_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """A umT5 encoder of this shape on the current default device, its weights not yet meaningful."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.d_kv,
            d_ff=config.d_ff,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
        )
    )


def load_text_encoder(encoder: UMT5EncoderModel, tensors: Mapping[str, Tensor], what: str) -> None:
    """Give the encoder its weights by transformers' names; the two names of the embedding stay one tensor.

    Raises:
        CheckpointError: listing every missing, unexpected and misshapen key.
    """
    load_exactly(encoder, tensors, what)
    encoder.encoder.embed_tokens.weight = encoder.shared.weight


def transformers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published umT5 encoder's tensors as transformers names them.

    Names that are none of the published ones stay, so a file in transformers' own format passes unchanged.
    """
    renamed = {_transformers_name(name): tensor for name, tensor in tensors.items()}
    if "shared.weight" in renamed:
        renamed.setdefault(_TIED, renamed["shared.weight"])
    return renamed


def original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an encoder's tensors as the published umT5 names them: the reverse of ``transformers_names``."""
    return {_original_name(name): tensor for name, tensor in tensors.items() if name != _TIED}


def _original_name(name: str) -> str:
    match = _IN_ENCODER.fullmatch(name)
    if match and match[2] in _REVERSED:
        return f"blocks.{match[1]}.{_REVERSED[match[2]]}"
    return {new: old for old, new in _WHOLE.items()}.get(name, name)


def _transformers_name(name: str) -> str:
    match = _IN_BLOCK.fullmatch(name)
    if match and match[2] in _BLOCK:
        return f"encoder.block.{match[1]}.{_BLOCK[match[2]]}"
    return _WHOLE.get(name, name)
