"""``python -m serve node`` and ``python -m serve leave``; see ``serve.node``."""

import argparse

from serve.node import NOTICE_S, leave, run_node


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """All of ``ray start``, after our own."""
    _add_notice(parser)
    parser.add_argument("ray", nargs=argparse.REMAINDER, help="arguments of ray start, such as --address=head:6379")
    parser.set_defaults(command=_node)


def add_leave_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to wait, and for which node."""
    _add_notice(parser)
    parser.add_argument("--node-name", help="of ray start (default: the node of this machine)")
    parser.add_argument("--address", default="auto", help="of the Ray cluster (default: that of this machine)")
    parser.set_defaults(command=_leave)


def _add_notice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--notice",
        type=float,
        default=NOTICE_S,
        metavar="SECONDS",
        help="longest time for the hand-over (default: %(default)g)",
    )


def _node(options: argparse.Namespace) -> int:
    given = [argument for argument in options.ray if argument != "--"]
    return run_node(given, options.notice)


def _leave(options: argparse.Namespace) -> int:
    print(f"jobs handed over: {leave(options.notice, options.node_name, options.address)}")
    return 0
