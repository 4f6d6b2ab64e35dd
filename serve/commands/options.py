"""What every command is told in the same words: where the store is, and who asks."""

import argparse
import getpass
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy import make_url

from pusa_dist.errors import ConfigError, instead_of
from serve.config import ServeConfig
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import JobStore

_OVERRIDES = (
    ("model", "model"),
    ("state_dir", "state"),
    ("weights_root", "weights"),
    ("require_keys", "require_keys"),
)
"""Settings, and the option of the command line that says otherwise."""


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """What a file says: a Serve config file with one application, or settings alone."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    http: Mapping[str, Any] = field(default_factory=dict)
    """``http_options``: where to listen."""
    has_policy: bool = False
    """Whether the application has an ``autoscaling_policy``."""


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the store is."""
    parser.add_argument("--state", metavar="DIR", help="folder of the database and the artifacts (default: state)")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="Serve config file, such as configs/serve/production.yaml, or a YAML file of settings",
    )


def read_config(options: argparse.Namespace) -> ServeConfig:
    """The configuration of the command line: a file, then its overrides.

    Raises:
        ConfigError: the file cannot be read, or a setting cannot work.
    """
    values = dict(read_file(options.config).settings)
    for name, option in _OVERRIDES:
        given = getattr(options, option, None)
        if given is not None:
            values[name] = given
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        faults = [_fault(one) for one in error.errors(include_url=False, include_context=False, include_input=False)]
        many = f"{len(faults)} settings cannot work:\n  " if len(faults) > 1 else ""
        raise ConfigError(many + "\n  ".join(faults)) from None


def _fault(error: ErrorDetails) -> str:
    """What is wrong with a setting, without its value, which may be a password."""
    where = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            return f"{where} is unknown; {instead_of(str(error['loc'][-1]), _settings_beside(error['loc']))}"
        case "model_type":
            return f"{where}: expected a mapping of settings"
        case _:
            message = error["msg"].removeprefix("Value error, ")
            return f"{where}: {message}" if where else message


def _settings_beside(loc: tuple[str | int, ...]) -> list[str]:
    """Names that would have been right where ``loc`` ends."""
    part: Any = ServeConfig
    for name in loc[:-1]:
        part = part.model_fields[name].annotation
    return list(part.model_fields)


def open_store(options: argparse.Namespace, *, may_be_new: bool = False) -> JobStore:
    """The job store of the command line's configuration; the service may be running on it.

    Args:
        options: with ``add_store_arguments``.
        may_be_new: whether a database that does not exist is made, and not a mistyped folder.

    Raises:
        ConfigError: there is no such database, or a newer version's, or its folder cannot be written.
    """
    config = read_config(options)
    url = config.resolved_database_url
    new = new_file(url)
    if new is not None and not may_be_new:
        raise ConfigError(f"there is no database {new}; name the service's own with --state or --config")
    try:
        store = JobStore(url)
    except OSError as error:
        raise ConfigError(
            f"state_dir={config.state_dir} cannot be written: {error.strerror}; choose another with --state"
        ) from error
    store.create_tables()
    if new is not None:
        print(f"serve: {new} is a new database; a service uses it when it is given the same --state", file=sys.stderr)
    return store


def new_file(database_url: str) -> Path | None:
    """The file of a database that does not exist yet; None: it does, or is no file."""
    address = make_url(database_url)
    if address.get_backend_name() != "sqlite" or address.database is None or Path(address.database).exists():
        return None
    return Path(address.database)


def open_artifacts(options: argparse.Namespace) -> ArtifactStore:
    """The artifact store of the command line's configuration."""
    return ArtifactStore(read_config(options).resolved_artifacts_url)


def actor() -> str:
    """Who is asking, for the audit log: the account and the machine."""
    try:
        account = getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        account = "unknown"
    return f"{account}@{socket.gethostname()}"


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns side by side; None is a dash."""
    cells = [heads, *(tuple("-" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def read_file(path: str | None) -> ServiceFile:
    """What a file says; None: nothing.

    Raises:
        ConfigError: it cannot be read, or is of another shape.
    """
    if path is None:
        return ServiceFile()
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}") from error
    whole = _mapping(values, f"configuration {path}")
    if "applications" not in whole:
        return ServiceFile(whole)
    applications = whole["applications"]
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError(f"configuration {path}: expected exactly one application")
    application = _mapping(applications[0], f"configuration {path}: applications")
    return ServiceFile(
        _mapping(application.get("args") or {}, f"configuration {path}: args"),
        _mapping(whole.get("http_options") or {}, f"configuration {path}: http_options"),
        bool(application.get("autoscaling_policy")),
    )


def _mapping(values: object, where: str) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    return values
