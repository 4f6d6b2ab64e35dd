"""``python -m serve tenants``: weights, quotas, webhook secrets, erasure. A running service follows at once."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from serve.commands.options import actor, add_store_arguments, open_artifacts, open_store, table
from serve.policy.quota import Quota
from serve.store.artifacts import ArtifactStore, StorageError, job_prefix
from serve.store.jobs import JobStore
from serve.store.tenants import Tenant

_LIMITS: dict[str, tuple[str, Callable[[str], float], str]] = {
    "requests_per_minute": ("requests_per_minute", int, "most jobs ordered in a minute"),
    "max_queued": ("max_queued", int, "most jobs that wait"),
    "max_running": ("max_running", int, "most jobs in progress at once"),
    "cost_per_day": ("gang_seconds_per_day", float, "most seconds of a gang's work in a UTC day"),
    "max_tokens": ("max_video_tokens", int, "most tokens of one video"),
}
"""Of every quota: what the command line calls it, its type and meaning."""
_PAGE = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``set``, ``list``, ``webhook-secret`` and ``erase``."""
    parser.description = "Sets and lists the tenants' weights and quotas; shows webhook secrets; erases a tenant."
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    setting = commands.add_parser("set", help="set a tenant up, or change what is given")
    setting.add_argument("tenant", help="name of the tenant; it is set up if it is new")
    setting.add_argument("--weight", type=float, help="share of the gangs relative to the other tenants' (1 at first)")
    for quota, (name, number, meaning) in _LIMITS.items():
        option = "--" + name.replace("_", "-")
        setting.add_argument(option, dest=quota, type=_limit(number), metavar="N", help=f"{meaning}, or 'none'")
    setting.add_argument("--new-webhook-secret", action="store_true", help="replace the secret that signs its webhooks")
    setting.set_defaults(command=_set)
    listing = commands.add_parser("list", help="every tenant with its weight and quotas")
    listing.set_defaults(command=_list)
    secret = commands.add_parser("webhook-secret", help="print the secret that signs a tenant's webhooks")
    secret.add_argument("tenant", help="name of the tenant")
    secret.set_defaults(command=_webhook_secret)
    erase = commands.add_parser(
        "erase",
        help="remove everything of a tenant for good",
        description="Removes its jobs, their inputs and results, keys, usage, quotas and deliveries, and stops what "
        "runs. The service may be running. Backups made before still hold it; the audit log keeps that it was erased.",
    )
    erase.add_argument("tenant", help="name of the tenant")
    erase.set_defaults(command=_erase)
    for command in (setting, listing, secret, erase):
        add_store_arguments(command)


def _set(options: argparse.Namespace) -> int:
    store = open_store(options, may_be_new=True)
    limits = {name: getattr(options, name) for name in _LIMITS if getattr(options, name) is not None}
    limits = {name: None if limit == "none" else limit for name, limit in limits.items()}
    tenant = store.set_tenant(
        options.tenant,
        weight=options.weight,
        limits=limits,
        replace_webhook_secret=options.new_webhook_secret,
        actor=actor(),
    )
    store.close()
    print(_listing([tenant]))
    return 0


def _list(options: argparse.Namespace) -> int:
    store = open_store(options)
    print(_listing(store.tenants()))
    store.close()
    return 0


def _webhook_secret(options: argparse.Namespace) -> int:
    store = open_store(options)
    tenant = store.tenant(options.tenant)
    store.close()
    if tenant is None:
        print(f"serve: there is no tenant {options.tenant}; 'tenants list' shows those there are", file=sys.stderr)
        return 1
    print(tenant.webhook_secret)
    return 0


def _erase(options: argparse.Namespace) -> int:
    store, artifacts = open_store(options), open_artifacts(options)
    try:
        store.erase_tenant(options.tenant, actor=actor())
        num_jobs = remove_erased(store, artifacts)
        is_log_empty = store.empty_log()
    except StorageError as error:
        print(
            f"serve: tenant {options.tenant} is erased but for files that cannot be removed now ({error}); "
            "a running service goes on trying, and so does this command when it is called again",
            file=sys.stderr,
        )
        return 1
    finally:
        store.close()
    print(f"tenant {options.tenant} is erased, and {num_jobs} jobs with all their files", file=sys.stderr)
    if not is_log_empty:
        print(
            "serve: what it asked for is still spelt in the database's log (the file that ends in -wal), because "
            "somebody was reading all the while; call this command again",
            file=sys.stderr,
        )
        return 1
    return 0


def remove_erased(store: JobStore, artifacts: ArtifactStore) -> int:
    """Remove the jobs of erased tenants, the files of each before its row; returns how many.

    Raises:
        StorageError: files cannot be removed; call it again.
    """
    num_jobs = 0
    while job_ids := store.erased_jobs(_PAGE):
        for job_id in job_ids:
            artifacts.delete(job_prefix(job_id))
            store.forget(job_id)
            num_jobs += 1
    return num_jobs


def _limit(number: Callable[[str], float]) -> Callable[[str], float | str]:
    def parse(text: str) -> float | str:
        if text == "none":
            return text
        value = number(text)
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is no limit; give a number from 0, or 'none'")
        return value

    return parse


def _listing(tenants: list[Tenant]) -> str:
    limits = [limit.name for limit in fields(Quota)]
    rows: list[tuple[Any, ...]] = [
        (one.name, f"{one.weight:g}", *(getattr(one.quota, limit) for limit in limits), f"{one.virtual_time:.1f}")
        for one in tenants
    ]
    return table(("tenant", "weight", *(_LIMITS[limit][0] for limit in limits), "virtual_time"), rows)
