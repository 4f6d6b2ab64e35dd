import dataclasses

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pusa_dist.config import ModelConfig, WeightsConfig, load_model_config
from pusa_dist.errors import ConfigError
from pusa_dist.tokenizer import byte_tokenizer, clean_prompt, count_tokens, load_tokenizer, token_ids


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        ("  a \n\t cat  ", "a cat"),
        ("fish &amp;amp; chips &lt;3", "fish & chips <3"),
        ("caf\u00c3\u00a9", "caf\u00e9"),
        ("A Cat", "A Cat"),
        ("lone \ud800 surrogate", "lone \ufffd surrogate"),
        ("nul\x00byte", "nulbyte"),
        ("\u3000\u00a0", ""),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(written, cleaned):
    assert clean_prompt(written) == cleaned


def test_the_debug_tokenizer_gives_one_token_per_byte_and_the_end_of_text():
    tokenizer = byte_tokenizer()
    for text in ("", "cat", "h\u00e9llo", "\U0001f600", "a </s> <pad>"):
        ids = token_ids(tokenizer, text)
        assert len(ids) == len(text.encode()) + 1
        assert ids[-1] == 1
        assert all(3 <= token < 259 for token in ids[:-1])
    assert token_ids(tokenizer, "ab") != token_ids(tokenizer, "ba")


def test_counting_cleans_first():
    assert count_tokens(byte_tokenizer(), "  a &amp;  b ") == len("a & b") + 1


def with_tokenizer(name: str | None, root: str) -> ModelConfig:
    return dataclasses.replace(load_model_config("debug"), weights=WeightsConfig(root=root, tokenizer=name))


def test_a_tokenizer_file_is_read_without_its_padding_and_truncation(tmp_path):
    saved = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3}, unk_token="<unk>"))
    saved.pre_tokenizer = pre_tokenizers.Whitespace()
    saved.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    saved.enable_truncation(3)
    saved.enable_padding(length=8)
    saved.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(with_tokenizer("tokenizer.json", str(tmp_path)))
    assert token_ids(tokenizer, "cat cat cat dog") == [3, 3, 3, 2, 1]
    assert count_tokens(tokenizer, "cat") == 2


def test_a_tokenizer_that_is_missing_or_broken_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json cannot be read"):
        load_tokenizer(with_tokenizer("broken.json", str(tmp_path)))
    with pytest.raises(ConfigError, match=r"matches weights\.tokenizer: absent\.json"):
        load_tokenizer(with_tokenizer("absent.json", str(tmp_path)))
    with pytest.raises(ConfigError, match="names no file"):
        load_tokenizer(with_tokenizer(None, str(tmp_path)))
