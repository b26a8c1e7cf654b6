from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from shared import logs, traces
from shared.errors import NotFound
from shared.rpc import context
from tests.log_settings import restored_logs


@pytest.fixture
def kept():
    exporter = InMemorySpanExporter()
    with traces.processing("test", SimpleSpanProcessor(exporter)):
        yield exporter


def named(kept: InMemorySpanExporter) -> dict:
    return {span.name: span for span in kept.get_finished_spans()}


def test_nothing_is_imported_or_told_while_traces_are_off():
    code = (
        "import sys\n"
        "from shared import traces, logs\n"
        "from shared.rpc import context\n"
        "with traces.sending('x', ''), traces.span('a') as span:\n"
        "    span.set({'b': 1}); span.fail('c')\n"
        "    assert traces.traceparent() == '' and traces.KEY not in dict(context.outgoing())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_spans_inside_are_children_and_the_outer_one_is_back_after(kept):
    with traces.span("outer"):
        outside = traces.traceparent()
        with traces.span("inner", "client", attributes={"a": 1}) as inner:
            assert traces.traceparent() != outside
            inner.set({"b": "c"})
        assert traces.traceparent() == outside
    assert traces.traceparent() == ""
    outer, inner = named(kept)["outer"], named(kept)["inner"]
    assert outer.parent is None
    assert inner.parent.span_id == outer.context.span_id
    assert dict(inner.attributes) == {"a": 1, "b": "c"}
    assert outer.resource.attributes["service.name"] == "hibug2-test"


def test_a_parent_from_afar_is_taken_and_goes_out_to_the_next(kept):
    far = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with traces.span("here", "server", parent=far):
        assert re.fullmatch("00-0af7651916cd43dd8448eb211c80319c-[0-9a-f]{16}-01", traces.traceparent())
        assert dict(context.outgoing())[traces.KEY] == traces.traceparent()
    span = named(kept)["here"]
    assert f"{span.parent.span_id:x}" == "b7ad6b7169203331"


@pytest.mark.parametrize("parent", ["", "nonsense", "00-0-0-0", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_what_is_no_parent_begins_a_trace_of_its_own(kept, parent):
    with traces.span("outer"), traces.span("here", parent=parent):
        pass
    here, outer = named(kept)["here"], named(kept)["outer"]
    assert here.parent is None
    assert here.context.trace_id != outer.context.trace_id


def test_a_failure_is_marked_without_its_message(kept):
    for name, error in (("known", NotFound("the secret")), ("unknown", KeyError("the secret"))):
        with pytest.raises(type(error)), traces.span(name):
            raise error
    spans = named(kept)
    assert {name: span.status.description for name, span in spans.items()} == {
        "known": "NOT_FOUND",
        "unknown": "KeyError",
    }
    assert all(span.status.status_code is StatusCode.ERROR for span in spans.values())
    assert "secret" not in "".join(span.to_json() for span in spans.values())


async def test_tasks_begin_below_the_span_that_they_were_made_in(kept):
    async def work() -> None:
        await started.wait()
        with traces.span("task"):
            pass

    started = asyncio.Event()
    with traces.span("call"):
        task = asyncio.create_task(work())
    started.set()  # the call has ended before the task does anything, as with a job
    await task
    assert named(kept)["task"].parent.span_id == named(kept)["call"].context.span_id


async def test_a_generator_that_is_closed_elsewhere_ends_its_span(kept):
    async def numbers():
        with traces.span("stream"):
            yield 1
            yield 2

    stream = numbers()
    assert await anext(stream) == 1
    await asyncio.create_task(stream.aclose())
    assert "stream" in named(kept)


def test_log_lines_name_the_trace(kept, capsys):
    with restored_logs():
        logs.configure("info")
        with traces.span("call"):
            trace = traces.trace_id()
            logs.get("test").info("said")
        logs.get("test").info("said outside")
    inside, outside = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert inside["trace_id"] == trace
    assert len(trace) == 32
    assert "trace_id" not in outside
