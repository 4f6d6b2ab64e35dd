"""``python -m serve``: the service; or, with a command, something done to its store, running or not."""

import argparse
import sys
from collections.abc import Callable, Sequence

from sqlalchemy.exc import DBAPIError

from pusa_dist.errors import ConfigError, instead_of
from serve.commands import audit, backup, keys, node, run, settings, tenants
from serve.store.artifacts import StorageError

COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "run": (run.add_arguments, "run the service; the same as no command"),
    "config": (settings.add_arguments, "print every setting with its default, type and meaning"),
    "keys": (keys.add_arguments, "create, list and revoke API keys"),
    "tenants": (tenants.add_arguments, "set weights and quotas; erase a tenant"),
    "audit": (audit.add_arguments, "list who changed keys, tenants and quotas"),
    "backup": (backup.add_backup_arguments, "copy the store while the service runs"),
    "restore": (backup.add_restore_arguments, "fill an empty store with a backup"),
    "node": (node.add_node_arguments, "run a Ray node that hands over its jobs before it stops"),
    "leave": (node.add_leave_arguments, "have this machine's gangs hand over their jobs: a preStop hook"),
}
_PROGRAM = "python -m serve"
"""Not ``serve``, which is Ray's command."""


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
        print(f"serve: the database cannot be used: {_reason(error)}", file=sys.stderr)
        return 1
    except StorageError as error:
        print(f"serve: the artifact store cannot be used: {error}", file=sys.stderr)
        return 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Without a command, the arguments are those of ``run``."""
    command = arguments[0] if arguments and not arguments[0].startswith("-") else None
    parser = argparse.ArgumentParser(prog=_PROGRAM, formatter_class=argparse.RawDescriptionHelpFormatter)
    if command not in COMMANDS:
        parser.usage = f"{_PROGRAM} [COMMAND] [options]"
        if command is not None:
            parser.error(f"unknown command {command!r}; {instead_of(command, COMMANDS)}")
        run.add_arguments(parser)
        listed = "\n".join(f"  {name:9}{meaning}" for name, (_, meaning) in COMMANDS.items())
        parser.epilog = f"commands:\n{listed}\n\n'{_PROGRAM} COMMAND --help' says what a command takes."
        return parser
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_arguments, meaning) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=meaning))
    return parser


def _reason(error: DBAPIError) -> str:
    """What the driver says; of a service file that is not found, also what it is looked for in."""
    reason = str(error.orig).strip()
    if "service" in reason and "not found" in reason:
        reason += " (PGSERVICEFILE must name a file with that section; see configs/serve/production.yaml)"
    return reason


if __name__ == "__main__":
    sys.exit(main())
