"""Traces of jobs, from the request that makes one through every stage, if somebody collects them.

The context of a trace (W3C ``traceparent``) is kept with the job, so that a dispatcher that takes it over
goes on with the same trace. Spans carry ids, numbers and kinds of errors; never a message, which may quote
a prompt. Without an endpoint nothing is imported and nothing is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pusa_dist.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

SERVICE_NAME = "pusa"


class Traces:
    """The spans of one process.

    Args:
        provider: of OpenTelemetry; None: nobody collects them.
    """

    def __init__(self, provider: "TracerProvider | None" = None) -> None:
        self._provider = provider
        self._tracer = None if provider is None else provider.get_tracer("pusa")

    @classmethod
    def to(cls, endpoint: str | None, role: str) -> "Traces":
        """Spans that are sent to a collector by OTLP over HTTP.

        Args:
            endpoint: such as ``http://collector:4318``; None: nobody collects them.
            role: of this process.

        Raises:
            ConfigError: the exporter is not installed.
        """
        if endpoint is None:
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(f"otlp_endpoint={endpoint}: {error}; install the extra 'traces'") from error
        # The sampler, and how much is sent at once, are what the OTEL_ environment variables say.
        provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME, "pusa.role": role}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")))
        return cls(provider)

    @contextmanager
    def span(self, name: str, parent: str | None = None, **attributes: str | int) -> Iterator[Any]:
        """What is done inside, and spans in tasks that are started inside; yields the span, if there is one.

        Args:
            name: of which there are few.
            parent: a ``traceparent``; None: the span that this is inside of, if there is one.
            attributes: of the span.
        """
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace import Status, StatusCode

        with self._tracer.start_as_current_span(
            name, _context(parent), attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise

    def past(self, name: str, parent: str | None, began: float, ended: float) -> None:
        """A span of what is over already; times are Unix seconds."""
        if self._tracer is not None and parent is not None:
            span = self._tracer.start_span(name, _context(parent), start_time=int(began * 1e9))
            span.end(int(ended * 1e9))

    def traceparent(self) -> str | None:
        """The span that this is inside of, as it is kept with a job; None: there is none."""
        if self._tracer is None:
            return None
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier)
        return carrier.get("traceparent")

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


NO_TRACES = Traces()


def _context(parent: str | None) -> Any:
    """None: the current one."""
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent})
