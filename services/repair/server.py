"""The repair service over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import grpc
from redis.asyncio import Redis

from hibug2.v1 import repair_pb2 as pb
from hibug2.v1 import repair_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.repair.collect import data_needs
from services.repair.compare import Compared, Group, compare
from services.repair.config import Settings
from services.repair.methods import Method, Stopped
from services.repair.pick import Wanted, check_asked, pick_artifact, pool_of, read_picks, scores_digest, tagging_of
from shared.errors import invalid
from shared.images.reader import ImageReader
from shared.jobs import Jobs, Progress
from shared.names import Name, content_id, dataset_id, parse
from shared.queue.stream import connect
from shared.rpc import context as call
from shared.rpc.paging import page_bounds
from shared.rpc.provenance import provenance_proto
from shared.rpc.server import RunningServer, start
from shared.store.artifacts import Artifacts, items_of
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
POOL, TEST = "pool", "test"
REVISION = 2  # raised when the same input would give another selection
MAX_EMBEDDING_BYTES = 512 << 20


def _method(number: int, field: str) -> Method:
    """The method of an enum value; lowest mean when unspecified."""
    if number == pb.SELECTION_METHOD_UNSPECIFIED:
        return Method.LOWEST_MEAN
    found = pb.SelectionMethod.DESCRIPTOR.values_by_number.get(number)
    if found is None:
        raise invalid(field, f"{number} is no selection method")
    return Method(found.name.removeprefix("SELECTION_METHOD_").lower())


def _number(method: str) -> pb.SelectionMethod.ValueType:
    """The enum value of a method; unspecified for none."""
    return pb.SelectionMethod.Value(f"SELECTION_METHOD_{(method or 'unspecified').upper()}")


class RepairServicer(rpc.RepairServiceServicer):
    """proto in, domain in a thread, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._images = ImageReader(settings.image_prefixes)
        self._files = ImageReader(settings.image_prefixes, max_bytes=MAX_EMBEDDING_BYTES)
        self.jobs = Jobs(redis, "repair", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, "selections", "name"))

    async def CreateSelection(self, request: pb.CreateSelectionRequest, context: Context) -> pb.CreateSelectionResponse:
        dataset = dataset_id(request.parent, "parent")
        ranking = parse(request.ranking, "rankings", "ranking", within=dataset)
        wanted = self._wanted(request)
        artifacts = self._artifacts()
        scores = await asyncio.to_thread(scores_digest, artifacts, ranking)
        tagging = await asyncio.to_thread(tagging_of, artifacts, ranking)
        await asyncio.to_thread(pool_of, artifacts, tagging, wanted.split)
        await asyncio.to_thread(check_asked, artifacts, ranking, wanted)
        key = content_id(ranking=ranking.id, scores=scores, wanted=asdict(wanted), revision=REVISION)
        name = Name(dataset, "selections", key)

        async def work(progress: Progress) -> None:
            progress.step = "picking"
            with suppress(Stopped):
                await asyncio.to_thread(
                    pick_artifact,
                    artifacts,
                    name,
                    ranking,
                    wanted,
                    read_file=self._files.read,
                    open_image=self._images.open,
                    cancelled=lambda: progress.cancelled,
                )

        return pb.CreateSelectionResponse(job=await self.jobs.create(str(name), work))

    def _wanted(self, request: pb.CreateSelectionRequest) -> Wanted:
        options = request.options
        if not 1 <= request.budget <= self._settings.max_budget:
            raise invalid("budget", f"is {request.budget}; give 1 to {self._settings.max_budget}")
        if options.class_quota < 0:
            raise invalid("options.class_quota", f"is {options.class_quota}; give 1 or more, or 0 for no limit")
        if options.embeddings_uri:
            self._files.check_uri(options.embeddings_uri)
        return Wanted(
            method=_method(request.method, "method"),
            budget=request.budget,
            split=request.split or POOL,
            seed=request.seed,
            rivals=tuple(dict.fromkeys(_method(m, f"rival_methods[{i}]") for i, m in enumerate(request.rival_methods))),
            class_quota=options.class_quota,
            excluded_ids=tuple(sorted(set(options.excluded_instance_ids))),
            without_near_copies=options.without_near_copies,
            spread=options.spread,
            one_per_family=options.one_per_family,
            embeddings_uri=options.embeddings_uri,
        )

    async def GetSelection(self, request: pb.GetSelectionRequest, context: Context) -> pb.GetSelectionResponse:
        name = parse(request.name, "selections", "name")
        response = pb.GetSelectionResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            manifest = await asyncio.to_thread(artifacts.manifest, name)
            summary = manifest.summary
            response.method = _number(summary["method"])
            response.pick_count, response.pool_count = summary["pick_count"], summary["pool_count"]
            response.unmatched_slice_count = summary["unmatched_slice_count"]
            for told in summary.get("methods", ()):
                response.methods.add(
                    method=_number(told["method"]),
                    pick_count=told["pick_count"],
                    shared_count=told["shared_count"],
                    matching_count=told["matching_count"],
                )
            response.near_copy_count = summary.get("near_copies", 0)
            response.unreadable_count = summary.get("unreadable", 0)
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
        method = _method(request.method, "method") if request.method else None
        table, pairs = await asyncio.to_thread(read_picks, self._artifacts(), name, method)
        first, end, token = page_bounds(table.num_rows, request.page_size, request.page_token)
        response = pb.ListPicksResponse(next_page_token=token)
        page = table.slice(first, end - first)
        for row, items in zip(page.to_pylist(), items_of(page).tolist(), strict=True):
            response.picks.add(
                instance_id=row["instance_id"],
                image_uri=row["image_uri"],
                slice_rank=row["slice_rank"],
                slice_mean=row["slice_mean"],
                tags=[types_pb2.AttributeTag(attribute=pairs[i][0], tag=pairs[i][1]) for i in items if i >= 0],
                pool_index=row.get("pool_index", 0),
                predicted_label=row.get("predicted_label") or "",
                value=row.get("value"),
            )
        return response

    async def ListDataNeeds(self, request: pb.ListDataNeedsRequest, context: Context) -> pb.ListDataNeedsResponse:
        ranking = parse(request.parent, "rankings", "parent")
        found = await asyncio.to_thread(
            data_needs, self._artifacts(), ranking, request.split or POOL, request.wanted_count
        )
        doubtful = await asyncio.to_thread(self._artifacts().doubtful_in, ranking)
        first, end, token = page_bounds(len(found), request.page_size, request.page_token)
        response = pb.ListDataNeedsResponse(next_page_token=token)
        for need in found[first:end]:
            response.needs.add(
                slice_rank=need.slice + 1,
                slice_mean=need.mean,
                tags=[types_pb2.AttributeTag(attribute=attribute, tag=tag) for attribute, tag in need.tags],
                pool_count=need.pool_count,
                missing_count=need.missing_count,
                description=need.description,
                prompt=need.prompt,
                doubtful=[attribute for attribute, _ in need.tags if attribute in doubtful],
            )
        return response

    async def CompareRepair(self, request: pb.CompareRepairRequest, context: Context) -> pb.CompareRepairResponse:
        ranking = parse(request.ranking, "rankings", "ranking")
        compared = [
            Compared(
                parse(c.model, "models", f"compared_models[{i}].model", within=ranking.dataset).id,
                parse(c.selection, "selections", f"compared_models[{i}].selection", within=ranking.dataset),
                _method(c.method, f"compared_models[{i}].method") if c.method else "",
            )
            for i, c in enumerate(request.compared_models)
        ]
        found = await asyncio.to_thread(
            compare, self._artifacts(), ranking, compared, request.split or TEST, tuple(request.repaired_ranks)
        )
        response = pb.CompareRepairResponse(instance_count=found.instance_count, failing_count=found.failing_count)
        for o in found.outcomes:
            failing, other = o.groups.get(Group.FAILING), o.groups.get(Group.OTHER)
            outcome = response.outcomes.add(
                model=f"datasets/{ranking.dataset}/models/{o.model}",
                selection=str(o.selection or ""),
                method=_number(o.method),
                added_count=o.added,
                overall_mean=o.groups[Group.OVERALL].mean,
                failing_mean=failing.mean if failing else None,
                other_mean=other.mean if other else None,
            )
            for group in o.groups.values():
                change = group.change
                outcome.groups.add(
                    group=pb.RepairGroup.Value(f"REPAIR_GROUP_{group.group.upper()}"),
                    scored_count=group.count,
                    mean=group.mean,
                    change=change.mean if change else None,
                    change_low=change.low if change else None,
                    change_high=change.high if change else None,
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
