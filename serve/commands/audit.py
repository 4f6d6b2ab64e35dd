"""``python -m serve audit``: who changed keys, tenants and quotas, when, and to what."""

import argparse
import json

from serve.commands.keys import when
from serve.commands.options import add_store_arguments, open_store, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of whom, and how much."""
    parser.description = "Lists who changed keys, tenants and quotas, when, and to what."
    parser.add_argument("tenant", nargs="?", help="list entries about this tenant only")
    parser.add_argument("--limit", type=int, default=1000, help="list only so many, the newest (default: %(default)s)")
    add_store_arguments(parser)
    parser.set_defaults(command=_audit)


def _audit(options: argparse.Namespace) -> int:
    store = open_store(options)
    entries = store.audit(options.tenant, options.limit)
    store.close()
    rows = [
        (when(one.at), one.actor, one.action, one.tenant, json.dumps(dict(one.detail), sort_keys=True))
        for one in entries
    ]
    print(table(("when (UTC)", "who", "what", "tenant", "detail"), rows))
    return 0
