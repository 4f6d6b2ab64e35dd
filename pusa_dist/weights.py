"""Files of a model's weights: which of them its configuration names, and whether they are there (no torch)."""

from collections.abc import Iterator
from pathlib import Path

from pusa_dist.config import ModelConfig
from pusa_dist.errors import ConfigError


def files_of(model: ModelConfig, setting: str, pattern: str | None) -> list[Path]:
    """Files of one part of a model, sorted.

    Args:
        model: whose files.
        setting: where the model's configuration names them, for the error.
        pattern: what it says there: a glob under the folder of weights.

    Raises:
        ConfigError: the configuration names none, or there is no such file.
    """
    found = _found(model, setting, pattern)
    if not found:
        raise _missing(model, [f"{setting}: {pattern}"])
    return found


def check_files(model: ModelConfig) -> None:
    """Find out, before anything is loaded, whether every part of a model has its files on this machine.

    Raises:
        ConfigError: naming every part that has none.
    """
    named = _named(model) if model.weights.seed is None else ()
    missing = [f"{setting}: {pattern}" for setting, pattern in named if not _found(model, setting, pattern)]
    if missing:
        raise _missing(model, missing)


def _named(model: ModelConfig) -> Iterator[tuple[str, str | None]]:
    """Every setting that names files which a service of the model reads, and what it says."""
    for expert in model.experts:
        yield f"weights.transformer.{expert}", model.weights.transformer.get(expert)
    yield "weights.vae", model.weights.vae
    yield "weights.text_encoder", model.weights.text_encoder
    yield "weights.tokenizer", model.weights.tokenizer
    for part, lora in (("lora", model.lora), ("distill_lora", model.distill_lora)):
        if lora is not None and lora.rank is None:
            yield from ((f"{part}.files.{expert}", lora.files.get(expert)) for expert in model.experts)


def _found(model: ModelConfig, setting: str, pattern: str | None) -> list[Path]:
    root = model.weights.root
    if root is None or pattern is None:
        raise ConfigError(f"{model.name}: {setting} names no file under a weights.root; add it")
    return sorted(path for path in Path(root).glob(pattern) if path.is_file())


def _missing(model: ModelConfig, parts: list[str]) -> ConfigError:
    return ConfigError(
        f"{model.name}: no file under {model.weights.root} matches {', '.join(parts)}; put the published files there, "
        "or name their folder with --weights (weights_root in a Serve config file)"
    )
