"""What a gateway tells of itself, whoever listens."""

from typing import Protocol

from serve.policy.priority import Priority


class Measures(Protocol):
    """Where a gateway reports; see ``serve.metrics.GatewayMetrics``."""

    def accepted(self, priority: Priority) -> None: ...  # noqa: D102
    def rejected(self, code: str, status: int) -> None: ...  # noqa: D102
    def moderated(self, subject: str, result: str) -> None: ...  # noqa: D102
    def decoder_failed(self) -> None: ...  # noqa: D102


class Unmeasured:
    """Nobody listens: a gateway outside Ray."""

    def accepted(self, priority: Priority) -> None:
        """A job is on disk."""

    def rejected(self, code: str, status: int) -> None:
        """A request was answered with an error."""

    def moderated(self, subject: str, result: str) -> None:
        """The hook has said something."""

    def decoder_failed(self) -> None:
        """Decoders died, or cannot be started."""
