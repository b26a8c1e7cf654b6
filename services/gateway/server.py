"""The gateway: the public door over gRPC; HTTP/JSON and the pages stand beside it in web.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import grpc

from hibug2.v1 import (
    attribute_pb2,
    dataset_pb2,
    dataset_pb2_grpc,
    enumeration_pb2,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2,
    repair_pb2,
    run_pb2,
    run_pb2_grpc,
    schema_pb2,
    schema_pb2_grpc,
    slice_pb2,
    tagging_pb2,
)
from services.gateway.config import Settings
from services.gateway.dataset_server import DatasetServicer, Door, ModelServicer, SchemaServicer
from services.gateway.proxy import add_proxy
from services.gateway.run_server import RunServicer
from services.gateway.runs import Backends
from services.gateway.web import start_web
from shared.queue.stream import connect
from shared.rpc.server import RunningServer, start
from shared.store.store import Store

# Service -> the backend that answers for it; the gateway passes its calls on.
_PROXIED = (
    (attribute_pb2, "AttributeService", "attribute"),
    (tagging_pb2, "TaggingService", "tagging"),
    (enumeration_pb2, "EnumerationService", "enumeration"),
    (slice_pb2, "SliceService", "enumeration"),
    (prediction_pb2, "PredictionService", "prediction"),
    (repair_pb2, "RepairService", "repair"),
)


async def start_server(settings: Settings) -> RunningServer:
    """Start the gateway; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    store = Store(settings.store_url)
    backends = Backends(settings)
    door = Door(store, redis, settings)
    runs = RunServicer(settings, redis, store, backends)

    def add(server: grpc.aio.Server) -> Sequence[str]:
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetServicer(door), server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(door), server)
        schema_pb2_grpc.add_SchemaServiceServicer_to_server(SchemaServicer(door), server)
        run_pb2_grpc.add_RunServiceServicer_to_server(runs, server)
        own = ((dataset_pb2, "Dataset"), (model_pb2, "Model"), (schema_pb2, "Schema"), (run_pb2, "Run"))
        names = [module.DESCRIPTOR.services_by_name[f"{name}Service"].full_name for module, name in own]
        for module, service, backend in _PROXIED:
            names.append(add_proxy(server, module.DESCRIPTOR.services_by_name[service], backends.channels[backend]))
        return names

    running = await start(settings, add, closers=[runs.close, backends.close, redis.aclose])
    stop_web = await start_web(settings, running.inside)
    runs.start_sweeping()
    return replace(running, closers=[stop_web, *running.closers])
