"""What can go wrong in the engine.

    PusaError
    |-- ConfigError (ValueError)    impossible settings; never retry
    |-- RequestError (ValueError)   an impossible request; carries the field and a stable code
    |-- CheckpointError             weights missing, unexpected or misshapen (lists the keys)
    |-- GangError                   a rank died or missed its deadline; the gang is unusable
    |-- NumericsError               non-finite latents
    |-- DeviceMemoryError           the device has not the memory for what was asked
    `-- Cancelled                   asked to stop; not a failure

All data is passed positionally to ``super().__init__`` and no class has per-instance defaults, so
that every error survives pickling across Ray with its type and its fields.
"""

from collections.abc import Collection
from difflib import get_close_matches


class PusaError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(PusaError, ValueError):
    """A setting that cannot work; the message names the setting, its value and what would work."""


class RequestError(PusaError, ValueError):
    """A request that cannot be served as given.

    Attributes:
        message: what is wrong, with which value, and what to do instead.
        param: the field of the request, in the notation of the public API.
        code: stable machine-readable reason.
    """

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message, param, code)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message


class CheckpointError(PusaError):
    """Weights that do not fit the model exactly; the message lists every key that does not."""


class GangError(PusaError):
    """A rank died, failed or missed its step deadline; every rank of the gang must be replaced."""


class NumericsError(PusaError):
    """A step produced non-finite latents."""


class DeviceMemoryError(PusaError):
    """A generation needs more memory than its device has; the gang goes on as if it had not been asked."""


class Cancelled(PusaError):  # noqa: N818 - not a failure
    """The caller asked for the generation to stop."""


def instead_of(name: str, known: Collection[str]) -> str:
    """What to write for a name that does not exist: the one that was probably meant, or else all there are."""
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]!r}?" if nearest else f"use {', '.join(known)}"
