"""One trace from a client's call to the calls of the language model: over gateway, services, queue and workers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_rpc
from PIL import Image

from deploy.local.stack import Stack
from hibug2 import Client
from shared import traces
from tests.integration.waiting import eventually
from tests.scripted_llm import ScriptedLLM


class Collector(otlp_rpc.TraceServiceServicer):
    """What an OTLP collector is sent: (service, span)."""

    def __init__(self) -> None:
        self.address = ""
        self._spans: list[tuple[str, object]] = []
        self._lock = threading.Lock()

    def Export(self, request, context):  # noqa: N802
        with self._lock:
            for resource in request.resource_spans:
                named = {a.key: a.value.string_value for a in resource.resource.attributes}
                spans = (span for scope in resource.scope_spans for span in scope.spans)
                self._spans += [(named["service.name"], span) for span in spans]
        return otlp.ExportTraceServiceResponse()

    @property
    def spans(self) -> list[tuple[str, object]]:
        with self._lock:
            return list(self._spans)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    otlp_rpc.add_TraceServiceServicer_to_server(collector, server)
    collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / "validation" / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "validation" / label / f"{i}.png")
    ids = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    (folder / "scores.csv").write_text("id,score\n" + "\n".join(f"{id_},{i % 2}" for i, id_ in enumerate(ids)) + "\n")
    return folder


async def test_a_run_is_one_trace_from_the_client_to_the_language_model(collector, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HIBUG2_OTLP_ENDPOINT", collector.address)  # for the client; its spans leave every few seconds
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")

    def debug(address: str) -> None:
        with Client(address) as client:
            client.create_dataset("pets", photos)
            client.add_scores("pets", "v1", photos / "scores.csv")
            client.run("pets", "v1", depth=1, min_count=2)

    with ScriptedLLM() as llm:
        settings = {
            "otlp_endpoint": collector.address,
            "llm_base_url": llm.base_url,
            "llm_model": "scripted",
            "llm_api_key": "secret-key",
        }
        async with Stack(tmp_path / "stack", (photos.as_uri(),), workers=1, settings=settings) as stack:
            await asyncio.to_thread(debug, stack.address)
        calls, used = len(llm.calls), [call.usage for call in llm.calls]
    # the stack has sent its last; the client's exporter sends now and then
    await eventually(lambda: "hibug2 CreateRun" in {span.name for _, span in collector.spans})

    by_id = {span.span_id: (service, span) for service, span in collector.spans}
    chats = [span for _, span in collector.spans if span.name == "chat"]
    assert len(chats) == calls > 12  # an image each, and what the schema took

    def way(span) -> list[tuple[str, str]]:
        """Service and name of the span and of all above it."""
        service, _ = by_id[span.span_id]
        above = by_id.get(span.parent_span_id)
        return [(service, span.name), *(way(above[1]) if above else [])]

    (root,) = {way(chat)[-1] for chat in chats}
    assert root == ("hibug2-client", "hibug2 CreateRun")
    assert len({chat.trace_id for chat in chats}) == 1
    tagged = [way(chat) for chat in chats if way(chat)[0][0] == "hibug2-tagging-worker"]
    assert len(tagged) == 12
    for steps in tagged:
        assert [name for _, name in steps] == [
            "chat",
            "tag part",
            "tagging job",
            "hibug2.v1.TaggingService/CreateTagging",
            "run job",
            "hibug2.v1.RunService/CreateRun",
            "hibug2 CreateRun",
        ]
    counted = [{a.key: a.value.int_value for a in chat.attributes if a.value.HasField("int_value")} for chat in chats]
    for name, told in (("input", "prompt_tokens"), ("output", "completion_tokens")):
        expected = sorted(usage[told] for usage in used)
        assert sorted(found[f"gen_ai.usage.{name}_tokens"] for found in counted) == expected
        assert min(expected) > 0
    said = b"".join(span.SerializeToString() for _, span in collector.spans)
    assert b"secret-key" not in said
    assert traces.traceparent() == ""


async def test_a_call_that_the_gateway_passes_on_stays_in_the_callers_trace(collector, tmp_path):
    """A caller of our own, with nothing but the W3C's header."""
    from hibug2.v1 import enumeration_pb2, enumeration_pb2_grpc

    trace = "0af7651916cd43dd8448eb211c80319c"
    settings = {"otlp_endpoint": collector.address}
    async with (
        Stack(tmp_path / "stack", (), workers=0, settings=settings) as stack,
        grpc.aio.insecure_channel(stack.address) as channel,
    ):
        stub = enumeration_pb2_grpc.EnumerationServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetEnumeration(
                enumeration_pb2.GetEnumerationRequest(name="datasets/d/enumerations/e"),
                metadata=[("traceparent", f"00-{trace}-b7ad6b7169203331-01")],
            )
    spans = [span for _, span in collector.spans if span.trace_id.hex() == trace]
    assert [span.name for span in spans] == ["hibug2.v1.EnumerationService/GetEnumeration"] * 2
    inner, outer = spans
    assert inner.parent_span_id == outer.span_id
    assert outer.parent_span_id.hex() == "b7ad6b7169203331"
    assert {span.status.message for span in spans} == {"NOT_FOUND", "AioRpcError"}


async def test_a_collector_that_is_away_stops_nobody(tmp_path):
    loop = asyncio.get_running_loop()
    async with Stack(tmp_path / "stack", (), workers=0, settings={"otlp_endpoint": "127.0.0.1:1"}) as stack:
        with traces.span("work"):
            assert stack.address
        began = loop.time()
    assert loop.time() - began < 15
