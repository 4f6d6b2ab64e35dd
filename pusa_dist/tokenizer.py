"""Prompts to tokens (no torch): the gateway counts them, the text encoder reads them.

A prompt is cleaned first, the way Wan's is: mojibake repaired, HTML entities resolved, white space
collapsed; case is kept.
"""

import html

import ftfy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from pusa_dist.config import ModelConfig
from pusa_dist.errors import ConfigError
from pusa_dist.weights import files_of

PAD, EOS = 0, 1
_FIRST_BYTE = 3  # after padding, end of text and unknown, as in ByT5


def clean_prompt(text: str) -> str:
    """Repair the encoding, resolve HTML entities (twice: ``&amp;lt;`` is met in practice), collapse white space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def load_tokenizer(model: ModelConfig) -> Tokenizer:
    """The tokenizer of a model's text encoder; it appends the end of text and neither pads nor truncates.

    Raises:
        ConfigError: the file is missing or is no ``tokenizer.json``.
    """
    if model.weights.tokenizer is None and model.weights.seed is not None:
        return byte_tokenizer()
    path = files_of(model, "weights.tokenizer", model.weights.tokenizer)[0]
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ConfigError(f"tokenizer {path} cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, then the end of text: for models without a vocabulary of their own."""
    # Byte-pair encoding without any pair: the alphabet stands for the 256 bytes.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<unk>": 2} | {c: i + _FIRST_BYTE for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return tokenizer


def token_ids(tokenizer: Tokenizer, cleaned: str) -> list[int]:
    """Tokens of a prompt that ``clean_prompt`` has cleaned, the end of text included."""
    ids: list[int] = tokenizer.encode(cleaned).ids
    return ids


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """How many rows of the text encoder's limit a prompt as the user wrote it takes, the end of text included."""
    return len(token_ids(tokenizer, clean_prompt(text)))
