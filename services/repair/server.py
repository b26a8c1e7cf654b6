"""The repair service over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from redis.asyncio import Redis

from hibug2.v1 import repair_pb2 as pb
from hibug2.v1 import repair_pb2_grpc as rpc
from services.repair.compare import compare
from services.repair.config import Settings
from services.repair.pick import LOWEST_MEAN, RANDOM, pick_artifact, pool_of
from shared.errors import invalid
from shared.jobs import Jobs, Progress
from shared.names import Name, content_id, dataset_id, parse
from shared.queue.stream import connect
from shared.rpc import context as call
from shared.rpc.paging import page_bounds
from shared.rpc.provenance import provenance_proto
from shared.rpc.server import RunningServer, start
from shared.store.artifacts import Artifacts
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
POOL, TEST = "pool", "test"
REVISION = 1  # raised when the same input would give another selection
_METHODS = {
    pb.SELECTION_METHOD_UNSPECIFIED: LOWEST_MEAN,
    pb.SELECTION_METHOD_LOWEST_MEAN: LOWEST_MEAN,
    pb.SELECTION_METHOD_RANDOM: RANDOM,
}
_PROTO_METHODS = {LOWEST_MEAN: pb.SELECTION_METHOD_LOWEST_MEAN, RANDOM: pb.SELECTION_METHOD_RANDOM}


class RepairServicer(rpc.RepairServiceServicer):
    """proto in, domain in a thread, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._store = store
        self.jobs = Jobs(redis, "repair", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, "selections", "name"))

    async def CreateSelection(self, request: pb.CreateSelectionRequest, context: Context) -> pb.CreateSelectionResponse:
        dataset = dataset_id(request.parent, "parent")
        ranking = parse(request.ranking, "rankings", "ranking", within=dataset)
        if request.method not in _METHODS:
            raise invalid("method", f"{request.method} is no selection method")
        method, split = _METHODS[request.method], request.split or POOL
        if not 1 <= request.budget <= self._settings.max_budget:
            raise invalid("budget", f"is {request.budget}; give 1 to {self._settings.max_budget}")
        artifacts = self._artifacts()
        parameters = (await asyncio.to_thread(artifacts.manifest, ranking)).provenance.parameters
        record = await asyncio.to_thread(artifacts.model, dataset, str(parameters["model"]))
        tagging = parse(str(parameters["tagging"]), "taggings", "ranking")
        await asyncio.to_thread(pool_of, artifacts, tagging, split)
        key = content_id(
            ranking=ranking.id,
            scores=record.digest,
            method=method,
            split=split,
            budget=request.budget,
            seed=request.seed,
            revision=REVISION,
        )
        name = Name(dataset, "selections", key)

        async def work(progress: Progress) -> None:
            progress.step = "picking"
            await asyncio.to_thread(
                pick_artifact,
                artifacts,
                name,
                ranking,
                record,
                method=method,
                split=split,
                budget=request.budget,
                seed=request.seed,
            )

        return pb.CreateSelectionResponse(job=await self.jobs.create(str(name), work))

    async def GetSelection(self, request: pb.GetSelectionRequest, context: Context) -> pb.GetSelectionResponse:
        name = parse(request.name, "selections", "name")
        response = pb.GetSelectionResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            manifest = await asyncio.to_thread(artifacts.manifest, name)
            summary = manifest.summary
            response.method = _PROTO_METHODS[summary["method"]]
            response.pick_count, response.pool_count = summary["pick_count"], summary["pool_count"]
            response.unmatched_slice_count = summary["unmatched_slice_count"]
            response.provenance.CopyFrom(provenance_proto(manifest.provenance))
        return response

    async def CancelSelection(self, request: pb.CancelSelectionRequest, context: Context) -> pb.CancelSelectionResponse:
        parse(request.name, "selections", "name")
        return pb.CancelSelectionResponse(job=await self.jobs.cancel(request.name))

    async def WatchSelection(
        self, request: pb.WatchSelectionRequest, context: Context
    ) -> AsyncIterator[pb.WatchSelectionResponse]:
        parse(request.name, "selections", "name")
        async for job in self.jobs.watch(request.name):
            yield pb.WatchSelectionResponse(job=job)

    async def ListPicks(self, request: pb.ListPicksRequest, context: Context) -> pb.ListPicksResponse:
        name = parse(request.parent, "selections", "parent")
        artifacts = self._artifacts()
        await asyncio.to_thread(artifacts.manifest, name)
        table = await asyncio.to_thread(artifacts.read_part, name, "picks")
        first, end, token = page_bounds(table.num_rows, request.page_size, request.page_token)
        response = pb.ListPicksResponse(next_page_token=token)
        for row in table.slice(first, end - first).to_pylist():
            response.picks.add(
                instance_id=row["instance_id"],
                image_uri=row["image_uri"],
                slice_rank=row["slice_rank"],
                slice_mean=row["slice_mean"],
            )
        return response

    async def CompareRepair(self, request: pb.CompareRepairRequest, context: Context) -> pb.CompareRepairResponse:
        ranking = parse(request.ranking, "rankings", "ranking")
        compared = [
            (
                parse(c.model, "models", f"compared_models[{i}].model", within=ranking.dataset).id,
                parse(c.selection, "selections", f"compared_models[{i}].selection", within=ranking.dataset),
            )
            for i, c in enumerate(request.compared_models)
        ]
        found = await asyncio.to_thread(compare, self._artifacts(), ranking, compared, request.split or TEST)
        response = pb.CompareRepairResponse(instance_count=found.instance_count, failing_count=found.failing_count)
        for o in found.outcomes:
            response.outcomes.add(
                model=f"datasets/{ranking.dataset}/models/{o.model}",
                selection=str(o.selection or ""),
                method=_PROTO_METHODS.get(o.method, pb.SELECTION_METHOD_UNSPECIFIED),
                added_count=o.added,
                overall_mean=o.overall,
                failing_mean=o.failing,
                other_mean=o.other,
            )
        return response


async def start_server(settings: Settings) -> RunningServer:
    """Start the repair service; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    servicer = RepairServicer(settings, redis, Store(settings.store_url))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_RepairServiceServicer_to_server(servicer, server)
        return [pb.DESCRIPTOR.services_by_name["RepairService"].full_name]

    return await start(settings, add, closers=[servicer.jobs.close, redis.aclose])
