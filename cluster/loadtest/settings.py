"""YAML files as frozen dataclasses: a key that nobody knows is an error, not a default that stays."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


class SettingsError(ValueError):
    """A file that cannot be meant; the message says where, which value, and what to write instead."""


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a file.

    Raises:
        SettingsError: it cannot be read, or holds none.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error
    return mapping(found, str(path))


def mapping(given: Any, where: str) -> Mapping[str, Any]:
    """A mapping with names for keys.

    Raises:
        SettingsError: it is something else.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise SettingsError(f"{where}: {given!r} is not a mapping of names")
    return given


def made(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """A dataclass of a mapping.

    Raises:
        SettingsError: unknown or missing keys, or values that the class refuses.
    """
    known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(given.keys() - known.keys()):
        raise SettingsError(f"{where}: unknown {', '.join(unknown)}; it may have {', '.join(sorted(known))}")
    missing = [
        name
        for name, one in known.items()
        if name not in given and one.default is MISSING and one.default_factory is MISSING
    ]
    if missing:
        raise SettingsError(f"{where}: {', '.join(missing)} must be given")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{where}: {error}") from error


def require(holds: bool, what: str) -> None:
    """Refuse a value.

    Raises:
        SettingsError: ``what`` does not hold.
    """
    if not holds:
        raise SettingsError(what)
