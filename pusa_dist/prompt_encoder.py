"""The text encoder with everything around it: a prompt to the embeddings the transformer reads."""

from functools import lru_cache

import torch
from torch import Tensor

from pusa_dist.checkpoint.text import build_text_encoder
from pusa_dist.config import ModelConfig
from pusa_dist.model.text import encode_ids, tokenise
from pusa_dist.tokenizer import clean_prompt, load_tokenizer


class PromptEncoder:
    """Encodes prompts and remembers the latest: a negative prompt is the same for every job."""

    def __init__(self, model: ModelConfig, device: str, cache_size: int = 256) -> None:
        """Load the tokenizer and the text encoder.

        Args:
            model: whose text encoder.
            device: where it runs.
            cache_size: prompts remembered; the least recently used is forgotten.
        """
        precision = model.precision_on(torch.device(device).type)
        self._tokenizer = load_tokenizer(model)
        self._encoder = build_text_encoder(model, device=device, precision=precision)
        self._max_tokens = model.text_encoder.max_tokens
        self._device = torch.device(device)
        self._cached = lru_cache(maxsize=cache_size)(self._encode)

    def encode(self, prompt: str) -> Tensor:
        """Embeddings (L, E) of a prompt on the CPU in the encoder's dtype, zero past its tokens.

        Prompts equal after cleaning share one tensor, which callers must not write to.

        Raises:
            RequestError: the prompt has more than L tokens.
        """
        return self._cached(clean_prompt(prompt))

    def _encode(self, prompt: str) -> Tensor:
        ids, mask = tokenise(self._tokenizer, prompt, self._max_tokens)
        return encode_ids(self._encoder, ids.to(self._device), mask.to(self._device))[0].cpu()
