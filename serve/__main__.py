"""``python -m serve``: the service; or, with a command, something done to its store, running or not."""

import argparse
import sys
from collections.abc import Callable, Sequence

from sqlalchemy.exc import DBAPIError

from pusa_dist.errors import ConfigError
from serve.commands import audit, backup, keys, node, run, tenants
from serve.commands.options import add_store_arguments
from serve.store.artifacts import StorageError

COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "keys": (keys.add_arguments, "create, list and revoke API keys"),
    "tenants": (tenants.add_arguments, "weights and quotas; erase a tenant"),
    "audit": (audit.add_arguments, "who changed keys, tenants and quotas"),
    "backup": (backup.add_backup_arguments, "copy the store while the service runs"),
    "node": (node.add_node_arguments, "ray start --block that hands over its jobs before it goes"),
    "leave": (node.add_leave_arguments, "have the gangs of this machine hand over their jobs: a preStop hook"),
    "restore": (backup.add_restore_arguments, "fill an empty store with a backup"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service or a command; returns the exit code: 2 for a configuration that cannot work."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser(given).parse_args(given)
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except ConfigError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except DBAPIError as error:
        print(f"serve: the database cannot be used: {error.orig}", file=sys.stderr)
        return 1
    except StorageError as error:
        print(f"serve: the artifact store cannot be used: {error}", file=sys.stderr)
        return 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Without a command, the arguments are those of ``run``."""
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Serve video generation over HTTP, until Ctrl-C.",
        epilog="commands beside it: " + "; ".join(f"{name} ({meaning})" for name, (_, meaning) in COMMANDS.items()),
    )
    if arguments and arguments[0] in COMMANDS:
        commands = parser.add_subparsers(required=True, metavar="COMMAND")
        for name, (add_arguments, meaning) in COMMANDS.items():
            add_arguments(commands.add_parser(name, help=meaning))
        return parser
    if arguments and arguments[0] == "run":
        parser.add_argument("run", choices=["run"])
    run.add_arguments(parser)
    add_store_arguments(parser)
    parser.set_defaults(command=run.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
