"""Traces: a call is part of the caller's trace where the program uses OpenTelemetry; else, nothing of it is imported.

A program that has no traces of its own can have them of its calls: HIBUG2_OTLP_ENDPOINT names a collector.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from hibug2.errors import UserError


@contextmanager
def span(name: str) -> Iterator[None]:
    """Measure one call of the client."""
    tracer = _tracer()
    if tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind

    with tracer.start_as_current_span(f"hibug2 {name}", kind=SpanKind.CLIENT, record_exception=False):
        yield


def headers() -> list[tuple[str, str | bytes]]:
    """What tells the gateway which trace a call belongs to."""
    if _tracer() is None:
        return []
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    found: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(found)
    return list(found.items())


def _tracer() -> Any:
    endpoint = os.environ.get("HIBUG2_OTLP_ENDPOINT")
    if endpoint:
        return _own(endpoint)
    api = sys.modules.get("opentelemetry.trace")  # whoever has set traces up has imported it
    return api.get_tracer("hibug2") if api else None


@cache
def _own(endpoint: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UserError("HIBUG2_OTLP_ENDPOINT", "traces need the extra `traces`: hibug2[traces]") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "hibug2-client"}))  # ends with the program
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url, timeout=5)))
    return provider.get_tracer("hibug2")
