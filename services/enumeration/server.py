"""The enumeration service over gRPC: slices, error slices, and tables that are sent along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc
import pyarrow as pa
from redis.asyncio import Redis

from hibug2.v1 import enumeration_pb2 as pb
from hibug2.v1 import enumeration_pb2_grpc as rpc
from hibug2.v1 import slice_pb2, slice_pb2_grpc
from services.enumeration import kubernetes_jobs, lattice, slices
from services.enumeration.allocator import keep_freed_memory
from services.enumeration.config import Settings
from services.enumeration.kubernetes_jobs import Cluster, Outside
from services.enumeration.order import Order
from services.enumeration.pod_progress import told
from services.enumeration.ranking import rank_artifact
from services.enumeration.slice_server import SliceServicer
from services.enumeration.spill import Spill
from services.enumeration.table import read_table
from shared.errors import invalid
from shared.jobs import Jobs, Progress
from shared.names import Name, content_id, dataset_id, parse
from shared.queue.stream import connect
from shared.rpc import context as call
from shared.rpc.arrow import receive_table, send_batches
from shared.rpc.provenance import provenance_proto
from shared.rpc.server import RunningServer, start
from shared.store.artifacts import Artifacts
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
MIN_COUNT, MAX_DEPTH, MARGIN, SPLIT = 10, 3, 0.2, "validation"
PERMUTATIONS, MAX_PERMUTATIONS = 20, 1000
# Part of every artifact's id: raised when the same input would give another result.
ENUMERATION_REVISION, RANKING_REVISION = 1, 2


class EnumerationServicer(rpc.EnumerationServiceServicer):
    """proto in, arrays through the domain in a thread, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store, cluster: Cluster | None = None) -> None:
        self._settings = settings
        self._store = store
        self._redis = redis
        self._cluster = cluster
        self._turn = asyncio.Semaphore(settings.parallel_jobs)
        self.jobs = Jobs(redis, "enumeration", self._is_complete)
        self.rankings = Jobs(redis, "ranking", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        collection = "rankings" if "/rankings/" in name else "enumerations"
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, collection, "name"))

    async def _in_turn(self, progress: Progress, step: str, work: Callable[[], object]) -> None:
        """Run `work` in a thread when it is its turn; a cancelled job's thread is waited for, so none runs on."""
        progress.step = "waiting"
        async with self._turn:
            progress.step = step
            running = asyncio.ensure_future(asyncio.to_thread(work))
            try:
                await asyncio.shield(running)
            except asyncio.CancelledError:
                progress.cancelled = True
                await asyncio.gather(running, return_exceptions=True)
                raise

    async def _in_cluster(self, artifacts: Artifacts, name: Name, order: Order, progress: Progress) -> bool:
        """Have the cluster do it, where it may and the enumeration is big; False where it is to be done here."""
        if self._cluster is None:
            return False
        progress.step = "estimating"
        tagging = parse(order.tagging, "taggings", "tagging")
        estimate = await asyncio.to_thread(
            slices.estimated, artifacts, tagging, order.split, order.min_count, order.max_depth
        )
        # What would be too large is refused here, and at once.
        if not self._settings.jobs_min_slices <= estimate <= self._settings.max_slices:
            return False
        await kubernetes_jobs.follow(
            self._cluster,
            order,
            progress,
            Outside(lambda: told(self._redis, order), lambda: asyncio.to_thread(artifacts.is_complete, name)),
            self._settings.jobs_start_s,
        )
        return True

    async def CreateEnumeration(
        self, request: pb.CreateEnumerationRequest, context: Context
    ) -> pb.CreateEnumerationResponse:
        dataset = dataset_id(request.parent, "parent")
        tagging = parse(request.tagging, "taggings", "tagging", within=dataset)
        split = request.split or SPLIT
        min_count = request.min_count if request.HasField("min_count") else MIN_COUNT
        max_depth = request.max_depth if request.HasField("max_depth") else MAX_DEPTH
        artifacts = self._artifacts()
        table = await asyncio.to_thread(slices.rows_of_split, artifacts, tagging, split)
        lattice.check_request(len(table.codes), table.codes.shape[1], min_count, max_depth, 0.0)
        key = content_id(
            tagging=tagging.id, split=split, min_count=min_count, max_depth=max_depth, revision=ENUMERATION_REVISION
        )
        name = Name(dataset, "enumerations", key)

        order = Order(call.team.get(), str(name), str(tagging), split, min_count, max_depth)

        async def work(progress: Progress) -> None:
            if await self._in_cluster(artifacts, name, order, progress):
                return
            await self._in_turn(
                progress,
                "enumerating",
                lambda: slices.enumerate_artifact(
                    artifacts,
                    name,
                    tagging,
                    split,
                    min_count,
                    max_depth,
                    self._settings.max_slices,
                    progress.update,
                    lambda: progress.cancelled,
                ),
            )

        return pb.CreateEnumerationResponse(job=await self.jobs.create(str(name), work))

    async def GetEnumeration(self, request: pb.GetEnumerationRequest, context: Context) -> pb.GetEnumerationResponse:
        name = parse(request.name, "enumerations", "name")
        response = pb.GetEnumerationResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            manifest = await asyncio.to_thread(artifacts.manifest, name)
            response.slice_count = manifest.summary["slice_count"]
            response.provenance.CopyFrom(provenance_proto(manifest.provenance))
        return response

    async def CancelEnumeration(
        self, request: pb.CancelEnumerationRequest, context: Context
    ) -> pb.CancelEnumerationResponse:
        parse(request.name, "enumerations", "name")
        return pb.CancelEnumerationResponse(job=await self.jobs.cancel(request.name))

    async def WatchEnumeration(
        self, request: pb.WatchEnumerationRequest, context: Context
    ) -> AsyncIterator[pb.WatchEnumerationResponse]:
        parse(request.name, "enumerations", "name")
        async for job in self.jobs.watch(request.name):
            yield pb.WatchEnumerationResponse(job=job)

    async def CreateRanking(self, request: pb.CreateRankingRequest, context: Context) -> pb.CreateRankingResponse:
        dataset = dataset_id(request.parent, "parent")
        enumeration = parse(request.enumeration, "enumerations", "enumeration", within=dataset)
        model = parse(request.model, "models", "model", within=dataset)
        margin = request.margin if request.HasField("margin") else MARGIN
        if not 0.0 <= margin <= 1.0:
            raise invalid("margin", f"is {margin}; give a number from 0 to 1")
        permutations = request.permutation_count if request.HasField("permutation_count") else PERMUTATIONS
        if not 0 <= permutations <= MAX_PERMUTATIONS:
            raise invalid("permutation_count", f"is {permutations}; give 0 to {MAX_PERMUTATIONS}")
        artifacts = self._artifacts()
        await asyncio.to_thread(artifacts.manifest, enumeration)
        record = await asyncio.to_thread(artifacts.model, model.dataset, model.id)
        key = content_id(
            enumeration=enumeration.id,
            model=model.id,
            scores=record.digest,
            margin=margin,
            permutations=permutations,
            seed=request.seed,
            revision=RANKING_REVISION,
        )
        name = Name(dataset, "rankings", key)

        async def work(progress: Progress) -> None:
            await self._in_turn(
                progress,
                "scoring slices",
                lambda: rank_artifact(
                    artifacts,
                    name,
                    enumeration,
                    record,
                    margin=margin,
                    permutations=permutations,
                    seed=request.seed,
                    on_progress=progress.update,
                    cancelled=lambda: progress.cancelled,
                ),
            )

        return pb.CreateRankingResponse(job=await self.rankings.create(str(name), work))

    async def GetRanking(self, request: pb.GetRankingRequest, context: Context) -> pb.GetRankingResponse:
        name = parse(request.name, "rankings", "name")
        response = pb.GetRankingResponse(job=await self.rankings.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            manifest = await asyncio.to_thread(artifacts.manifest, name)
            response.overall_mean = manifest.summary["overall_mean"]
            response.scored_count = manifest.summary["scored_count"]
            response.slice_count = manifest.summary["slice_count"]
            response.error_slice_count = manifest.summary["error_slice_count"]
            response.tested_count = manifest.summary["tested_count"]
            response.significant_count = manifest.summary["significant_count"]
            response.family_count = manifest.summary["family_count"]
            if manifest.summary["by_chance"] is not None:
                mean, low, high = manifest.summary["by_chance"]
                permutations = int(manifest.provenance.parameters["permutations"])
                response.by_chance.CopyFrom(
                    pb.ChanceCount(permutation_count=permutations, mean=mean, low=low, high=high)
                )
            response.provenance.CopyFrom(provenance_proto(manifest.provenance))
        return response

    async def CancelRanking(self, request: pb.CancelRankingRequest, context: Context) -> pb.CancelRankingResponse:
        parse(request.name, "rankings", "name")
        return pb.CancelRankingResponse(job=await self.rankings.cancel(request.name))

    async def WatchRanking(
        self, request: pb.WatchRankingRequest, context: Context
    ) -> AsyncIterator[pb.WatchRankingResponse]:
        parse(request.name, "rankings", "name")
        async for job in self.rankings.watch(request.name):
            yield pb.WatchRankingResponse(job=job)

    async def EnumerateTable(
        self, request_iterator: AsyncIterator[pb.EnumerateTableRequest], context: Context
    ) -> AsyncIterator[pb.EnumerateTableResponse]:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise invalid("header", "the first message carries the header")
        header = first.header
        arrow = await receive_table(
            (message.arrow async for message in request_iterator), self._settings.max_table_bytes, "table"
        )
        request = await asyncio.to_thread(table_request, arrow, header)
        progress = Progress()
        spilled: list[Spill] = []

        def work() -> None:
            schema, batches = slices.table_batches(request, self._settings.max_slices, lambda: progress.cancelled)
            spilled.append(Spill(send_batches(schema, batches)))

        try:
            await self._in_turn(progress, "enumerating", work)
            for message in spilled[0]:
                yield pb.EnumerateTableResponse(arrow=message)
        finally:
            for spill in spilled:
                spill.close()


def table_request(arrow: pa.Table, header: pb.TableHeader) -> slices.TableRequest:
    """What `header` asks of the table; InvalidInput where it makes no sense for it."""
    table = read_table(arrow, list(header.score_columns))
    min_count = header.min_count if header.HasField("min_count") else MIN_COUNT
    max_depth = header.max_depth if header.HasField("max_depth") else MAX_DEPTH
    rule = header.error_rule
    margin = rule.margin if rule.HasField("margin") else MARGIN
    lattice.check_request(len(table.codes), table.codes.shape[1], min_count, max_depth, margin)
    if header.must_hold and header.must_hold not in table.names:
        raise invalid("must_hold", f"the table has no attribute column '{header.must_hold}'")
    request = slices.TableRequest(
        table,
        tuple(header.score_columns),
        min_count,
        max_depth,
        must_hold=table.names.index(header.must_hold) if header.must_hold else None,
    )
    if not header.HasField("error_rule"):
        return request
    if not header.score_columns:
        raise invalid("score_columns", "names none; error slices are told by a score")
    column = rule.score_column or header.score_columns[0]
    if column not in header.score_columns:
        raise invalid("error_rule.score_column", f"'{column}' is not among the score columns")
    if rule.max_slices < 0:
        raise invalid("error_rule.max_slices", f"is {rule.max_slices}; give 0 for all, or how many")
    return replace(
        request,
        error_column=list(header.score_columns).index(column),
        margin=margin,
        top=rule.max_slices or None,
    )


async def start_server(settings: Settings, cluster: Cluster | None = None) -> RunningServer:
    """Start the enumeration service; stop it by the returned server's `stop`.

    cluster: where big enumerations are done; by default the one that the settings and this pod name.
    """
    keep_freed_memory()
    redis = connect(settings.redis_url)
    store = Store(settings.store_url)
    cluster = kubernetes_jobs.connect(settings) if cluster is None else cluster
    servicer = EnumerationServicer(settings, redis, store, cluster)

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_EnumerationServiceServicer_to_server(servicer, server)
        slice_pb2_grpc.add_SliceServiceServicer_to_server(SliceServicer(store), server)
        return [
            pb.DESCRIPTOR.services_by_name["EnumerationService"].full_name,
            slice_pb2.DESCRIPTOR.services_by_name["SliceService"].full_name,
        ]

    closers = [servicer.jobs.close, servicer.rankings.close, redis.aclose, *([cluster.close] if cluster else [])]
    return await start(settings, add, closers=closers)
