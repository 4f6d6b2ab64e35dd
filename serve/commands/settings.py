"""``python -m serve config``: every setting with its default, type and meaning, as a file that may be edited."""

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt
from pydantic.fields import FieldInfo

from serve.config import ServeConfig, Settings

_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: there is one list of settings."""
    parser.description = (
        "Prints every setting with its meaning, type and default. The output is YAML: what you keep of it is a file "
        "for --config, or the 'args' of the application in a Serve config file."
    )
    parser.set_defaults(command=_print)


def _print(_options: argparse.Namespace) -> int:
    print("\n".join(lines(ServeConfig())))
    return 0


def lines(settings: Settings, indent: str = "") -> Iterator[str]:
    """YAML of settings, each below a comment that says what it is."""
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        is_part = isinstance(value, Settings)
        meaning = " ".join((field.description or "").replace("``", "'").split())
        about = meaning if is_part else f"{meaning} ({_type(field)})"
        yield from textwrap.wrap(about, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if is_part:
            yield f"{indent}{name}:"
            yield from lines(value, f"{indent}  ")
        else:
            yield f"{indent}{name}: {json.dumps(value)}"


def _type(field: FieldInfo) -> str:
    """What a value has to be, in words."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    bounds = [f", at least {one.ge}" for one in field.metadata if isinstance(one, Ge)]
    bounds += [f", above {one.gt}" for one in field.metadata if isinstance(one, Gt)]
    return f"{kind.__name__ if isinstance(kind, type) else kind}{''.join(bounds)}"
