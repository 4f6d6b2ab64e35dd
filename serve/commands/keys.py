"""``python -m serve keys``: API keys. A running service follows within seconds."""

import argparse
import sys
from datetime import UTC, datetime

from serve.commands.options import actor, add_store_arguments, open_store, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``create``, ``list`` and ``revoke``."""
    parser.description = "Makes, lists and revokes API keys; a running service follows within seconds."
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    create = commands.add_parser("create", help="make a key and print it, once")
    create.add_argument("tenant", help="tenant whose key it is; it is set up if it is new")
    create.add_argument("--label", default="", help="note of what the key is for")
    create.set_defaults(command=_create)
    listing = commands.add_parser("list", help="list all keys, without the secrets themselves")
    listing.add_argument("tenant", nargs="?", help="list the keys of this tenant only")
    listing.set_defaults(command=_list)
    revoke = commands.add_parser("revoke", help="revoke a key for good")
    revoke.add_argument("key", help="id of the key, as 'list' shows it")
    revoke.set_defaults(command=_revoke)
    for command in (create, listing, revoke):
        add_store_arguments(command)


def _create(options: argparse.Namespace) -> int:
    store = open_store(options, may_be_new=True)
    key_id, secret = store.create_key(options.tenant, options.label, actor=actor())
    store.close()
    print(f"key {key_id} of tenant {options.tenant}; it is shown only now:", file=sys.stderr)
    print(secret)
    return 0


def _list(options: argparse.Namespace) -> int:
    store = open_store(options)
    keys = store.keys(options.tenant)
    store.close()
    rows = [(key.id, key.tenant, key.label, when(key.created_at), when(key.revoked_at)) for key in keys]
    print(table(("key", "tenant", "label", "created", "revoked"), rows))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    store = open_store(options)
    is_revoked = store.revoke_key(options.key, actor=actor())
    store.close()
    if not is_revoked:
        print(f"serve: there is no valid key {options.key}; 'keys list' shows those there are", file=sys.stderr)
        return 1
    print(f"key {options.key} is revoked", file=sys.stderr)
    return 0


def when(seconds: float | None) -> str | None:
    """An instant, as people read it."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
