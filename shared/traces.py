"""Traces by OpenTelemetry, off until `sending` is told where to send them; its libraries are imported only then.

The span of the moment is kept in a context variable of our own and handed over by name: generators that are closed in
another context than they began in would trip over OpenTelemetry's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from shared.errors import HiBug2Error, invalid
from shared.version import VERSION

KEY = "traceparent"  # of the W3C's Trace Context, in metadata, HTTP headers and work items
_EXPORT_S = 5.0  # a collector that is away must not hold a process that ends

Kind = Literal["internal", "server", "client", "consumer"]
Attribute = str | int | float | bool

_tracer: Any = None
_now: ContextVar[Any] = ContextVar("span", default=None)


class Span:
    """What is being measured; does nothing while traces are off."""

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        if self._inner is not None:
            self._inner.set_attributes(attributes)

    def fail(self, why: str) -> None:
        """Mark it as failed. `why` is a code or a class: messages may hold what does not belong in a trace."""
        if self._inner is not None:
            from opentelemetry.trace import StatusCode

            self._inner.set_status(StatusCode.ERROR, why)


@contextmanager
def sending(service: str, endpoint: str) -> Iterator[None]:
    """Send the spans of this process to the OTLP collector at `endpoint` (gRPC, host:port or URL; empty: nowhere).

    The last of them are sent at the end. OTEL_TRACES_SAMPLER and its like are heeded. InvalidInput where the extra
    `traces` is not installed.
    """
    if not endpoint:
        yield
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise invalid("HIBUG2_OTLP_ENDPOINT", "traces need the extra `traces`: hibug2-platform[traces]") from error
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    with processing(service, BatchSpanProcessor(OTLPSpanExporter(url, timeout=_EXPORT_S))):
        yield


@contextmanager
def processing(service: str, processor: Any) -> Iterator[None]:
    """As `sending`, to a span processor of OpenTelemetry's SDK."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    global _tracer
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"hibug2-{service}", "service.version": VERSION})
    )
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("hibug2", VERSION)
    try:
        yield
    finally:
        _tracer = None
        provider.shutdown()


@contextmanager
def span(
    name: str,
    kind: Kind = "internal",
    *,
    parent: str | None = None,
    attributes: Mapping[str, Attribute] | None = None,
) -> Iterator[Span]:
    """Measure what is done inside, below the span of the moment; or below `parent`, a traceparent that came from afar
    (empty or unreadable: a trace of its own).
    """
    if _tracer is None:
        yield Span()
        return
    from opentelemetry import trace

    before = _now.get()
    context = trace.set_span_in_context(before) if before is not None and parent is None else _far(parent)
    inner = _tracer.start_span(name, context, trace.SpanKind[kind.upper()], dict(attributes or {}))
    _now.set(inner)
    made = Span(inner)
    try:
        yield made
    except HiBug2Error as error:
        made.fail(error.code)
        raise
    except Exception as error:
        made.fail(type(error).__name__)
        raise
    finally:
        inner.end()
        _now.set(before)  # set, not reset: a generator may end in another context


def _far(parent: str | None) -> Any:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({KEY: parent} if parent else {}, Context())


def traceparent() -> str:
    """The span of the moment, for another process; empty while there is none."""
    inner = _now.get()
    if inner is None:
        return ""
    where = inner.get_span_context()
    return f"00-{where.trace_id:032x}-{where.span_id:016x}-{where.trace_flags:02x}"


def trace_id() -> str:
    """The trace of the moment in hexadecimal; empty while there is none."""
    return traceparent()[3:35]
