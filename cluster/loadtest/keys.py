"""Tenants' API keys, from where secrets are kept: a file or the environment, never the command line."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.loadtest.settings import SettingsError, read_yaml

PREFIX = "PUSA_KEY_"


def read_keys(tenants: Iterable[str], file: Path | None, environment: Mapping[str, str]) -> dict[str, str | None]:
    """A key for every tenant, or for none: then the service must ask for none.

    Args:
        tenants: names.
        file: YAML or JSON of keys by tenant; None: the environment has them.
        environment: with ``PUSA_KEY_AMBER`` for the tenant ``amber``.

    Raises:
        SettingsError: some tenants have a key and others have none.
    """
    names = list(tenants)
    given = read_yaml(file) if file is not None else {name: environment.get(variable(name)) for name in names}
    keys = {name: str(given[name]) if given.get(name) else None for name in names}
    missing = [name for name, key in keys.items() if key is None]
    if missing and (file is not None or len(missing) < len(keys)):
        raise SettingsError(f"no key for {', '.join(missing)}; set {', '.join(map(variable, missing))} or use --keys")
    return keys


def variable(tenant: str) -> str:
    """The environment variable of a tenant's key."""
    return PREFIX + "".join(one if one.isalnum() else "_" for one in tenant).upper()
