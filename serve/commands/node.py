"""``python -m serve node`` and ``python -m serve leave``; see ``serve.node``."""

import argparse

from serve.node import NOTICE_S, leave, run_node


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """All of ``ray start``, after our own."""
    parser.description = (
        "Runs 'ray start --block' on this machine. When the machine is told to go (SIGTERM), its gangs hand over their "
        "jobs before the node stops."
    )
    _add_notice(parser)
    parser.add_argument("ray", nargs=argparse.REMAINDER, help="arguments for ray start, such as --address=head:6379")
    parser.set_defaults(command=_node)


def add_leave_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to wait, and for which node."""
    parser.description = "Has the gangs of one machine hand over their jobs, and prints how many jobs that were."
    _add_notice(parser)
    parser.add_argument("--node-name", help="the node's name, as given to ray start (default: this machine's node)")
    parser.add_argument("--address", default="auto", help="address of the Ray cluster (default: this machine's)")
    parser.set_defaults(command=_leave)


def _add_notice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--notice",
        type=float,
        default=NOTICE_S,
        metavar="SECONDS",
        help="longest time that the hand-over may take (default: %(default)g)",
    )


def _node(options: argparse.Namespace) -> int:
    given = [argument for argument in options.ray if argument != "--"]
    return run_node(given, options.notice)


def _leave(options: argparse.Namespace) -> int:
    print(f"jobs handed over: {leave(options.notice, options.node_name, options.address)}")
    return 0
