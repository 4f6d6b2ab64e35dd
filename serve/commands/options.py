"""What every command is told in the same words: where the store is, and who asks."""

import argparse
import getpass
import socket
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from sqlalchemy import make_url

from pusa_dist.errors import ConfigError
from serve.config import ServeConfig
from serve.store.artifacts import ArtifactStore
from serve.store.jobs import JobStore


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the store is."""
    parser.add_argument("--state", metavar="DIR", help="folder of the database and artifacts (default: state)")
    parser.add_argument("--config", metavar="FILE", help="Serve config file, such as configs/serve/production.yaml")


def read_config(options: argparse.Namespace) -> ServeConfig:
    """The configuration of the command line: a file, then its overrides.

    Raises:
        ConfigError: the file cannot be read, or a setting cannot work.
    """
    values = {} if options.config is None else _application_args(Path(options.config))
    for name, option in (("model", "model"), ("state_dir", "state"), ("weights_root", "weights")):
        given = getattr(options, option, None)
        if given is not None:
            values[name] = given
    try:
        return ServeConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        # Not its value: it may hold a password.
        raise ConfigError(f"{where}: {first['msg']}") from None


def open_store(options: argparse.Namespace, *, may_be_new: bool = False) -> JobStore:
    """The job store of the command line's configuration; the service may be running on it.

    Args:
        options: with ``add_store_arguments``.
        may_be_new: whether a database that does not exist is made, and not a mistyped folder.

    Raises:
        ConfigError: there is no such database, or a newer version's.
    """
    url = read_config(options).resolved_database_url
    new = new_file(url)
    if new is not None and not may_be_new:
        raise ConfigError(f"there is no database {new}; name the service's own with --state or --config")
    store = JobStore(url)
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


def _application_args(path: Path) -> dict[str, Any]:
    """``args`` of the only application in a Serve config file, or the whole file when it has no applications."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path}: expected a mapping of settings, got {type(values).__name__}")
    if "applications" not in values:
        return values
    applications = values["applications"]
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError(f"configuration {path}: expected exactly one application")
    return dict(applications[0].get("args") or {})
