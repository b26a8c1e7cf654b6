"""Readers of stored slices over gRPC: pages, Arrow streams, and the instances of a slice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any

import grpc
from hibug2.v1 import slice_pb2 as pb
from hibug2.v1 import slice_pb2_grpc as rpc

from services.enumeration.read import choose
from services.enumeration.slices import StoredSlices, open_slices, slice_instances
from shared.names import parse_any
from shared.rpc import context as call
from shared.rpc.arrow import send_batches
from shared.rpc.paging import page, page_bounds
from shared.store.artifacts import Artifacts
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
_COLLECTIONS = ("rankings", "enumerations")
_BATCH_ROWS = 8192


class SliceServicer(rpc.SliceServiceServicer):
    """Stored slices never change, so the last few opened stay in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open = lru_cache(maxsize=4)(self._open_now)

    def _open_now(self, team: str, name: str) -> StoredSlices:
        return open_slices(Artifacts(self._store, team), parse_any(name, _COLLECTIONS, "parent"))

    async def ListSlices(self, request: pb.ListSlicesRequest, context: Context) -> pb.ListSlicesResponse:
        stored = await asyncio.to_thread(self._open, call.team.get(), request.parent)
        positions = choose(stored.columns, stored.items, stored.words, request.filter, request.order_by)
        first, end, token = page_bounds(len(positions), request.page_size, request.page_token)
        response = pb.ListSlicesResponse(next_page_token=token, total_count=len(positions))
        for row in stored.arrow(positions[first:end]).to_pylist():
            found = response.slices.add(rank=row.get("rank", 0), instance_count=row["count"])
            for pair in row["tags"]:
                found.tags.add(attribute=pair["attribute"], tag=pair["tag"])
            if stored.is_ranking:
                found.score.CopyFrom(
                    pb.SliceScore(
                        scored_count=row["scored_count"],
                        mean=row["mean"],
                        drop=row["drop"],
                        parent_drop=row["parent_drop"],
                        error_share=row["error_share"],
                        interval_low=row["interval_low"],
                        interval_high=row["interval_high"],
                    )
                )
        return response

    async def ReadSlices(self, request: pb.ReadSlicesRequest, context: Context) -> AsyncIterator[pb.ReadSlicesResponse]:
        stored = await asyncio.to_thread(self._open, call.team.get(), request.parent)
        positions = choose(stored.columns, stored.items, stored.words, request.filter, "")
        # Rows become batches as the reader takes them: a slow reader holds one batch, not the table.
        batches = (
            batch
            for start in range(0, max(len(positions), 1), _BATCH_ROWS)
            for batch in stored.arrow(positions[start : start + _BATCH_ROWS]).combine_chunks().to_batches()
        )
        for message in send_batches(stored.arrow(positions[:0]).schema, batches):
            yield pb.ReadSlicesResponse(arrow=message)

    async def ListSliceInstances(
        self, request: pb.ListSliceInstancesRequest, context: Context
    ) -> pb.ListSliceInstancesResponse:
        team = call.team.get()
        stored = await asyncio.to_thread(self._open, team, request.parent)
        pairs = [(pair.attribute, pair.tag) for pair in request.tags]
        ids = await asyncio.to_thread(slice_instances, Artifacts(self._store, team), stored, pairs)
        chosen, token = page(ids, request.page_size, request.page_token)
        return pb.ListSliceInstancesResponse(instance_ids=chosen, next_page_token=token, total_count=len(ids))
