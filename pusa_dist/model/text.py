"""Tokens to embeddings with umT5, rows past the prompt exactly zero.

The transformer attends to all L rows without a mask, so what stands past the prompt matters: zeros.
Letters: B batch, L text length, E width of the encoder.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import UMT5EncoderModel

from pusa_dist.errors import RequestError
from pusa_dist.tokenizer import PAD, token_ids


def tokenise(tokenizer: Tokenizer, cleaned: str, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens of a prompt as a tensor of fixed length.

    Args:
        tokenizer: appends the end of text.
        cleaned: the prompt as ``clean_prompt`` returns it (cleaning twice is not the same as once).
        max_tokens: L.

    Returns:
        ids (1, L), padded, and mask (1, L), 1 for the prompt's tokens; both int64.

    Raises:
        RequestError: the prompt has more than L tokens; nothing is cut off.
    """
    tokens = token_ids(tokenizer, cleaned)
    if len(tokens) > max_tokens:
        raise RequestError(
            f"prompt has {len(tokens)} tokens; shorten it to at most {max_tokens}", "prompt", "prompt_too_long"
        )
    ids = torch.full((1, max_tokens), PAD, dtype=torch.int64)
    ids[0, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    mask = (torch.arange(max_tokens) < len(tokens)).to(torch.int64)[None]
    return ids, mask


@torch.no_grad()
def encode_ids(encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings of tokenised prompts.

    Only the columns some prompt uses are run: a masked column changes nothing, and 512 of them cost
    far more than a typical prompt's 30.

    Args:
        encoder: the text encoder.
        ids: (B, L) int64, on the encoder's device.
        mask: (B, L), 1 for the prompt's tokens, which come first.

    Returns:
        (B, L, E) in the encoder's dtype; rows past a prompt are zero.
    """
    used = int(mask.sum(dim=1).max())
    hidden = encoder(input_ids=ids[:, :used], attention_mask=mask[:, :used]).last_hidden_state
    embeddings = hidden.new_zeros(*ids.shape, hidden.shape[-1])
    # Not a product with the mask: nothing a padded row may hold, NaN included, survives.
    embeddings[:, :used] = torch.where(mask[:, :used, None].bool(), hidden, 0.0)
    return embeddings
