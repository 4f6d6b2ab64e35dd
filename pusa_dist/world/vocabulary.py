"""The tokenizer of captions: one token a word, any other word unknown."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pusa_dist.world.scene import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS

SPECIAL = ("<pad>", "</s>", "<unk>")
"""At the indices that ``pusa_dist.tokenizer`` relies on."""
GLUE = ("a", "moves", "on", "background")


def words() -> list[str]:
    """Every token in the order of its index."""
    kinds = (GLUE, SIZES, COLOURS, SHAPES, SPEEDS, DIRECTIONS, BACKGROUNDS)
    return [*SPECIAL, *dict.fromkeys(word for kind in kinds for word in kind)]


def world_tokenizer() -> Tokenizer:
    """Lower case, split at white space and punctuation, the end of text appended."""
    vocabulary = {word: index for index, word in enumerate(words())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = vocabulary["</s>"]
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return tokenizer
