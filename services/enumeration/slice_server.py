"""Readers of stored slices over gRPC: pages, Arrow streams, and the instances of a slice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import lru_cache
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from hibug2.v1 import slice_pb2 as pb
from hibug2.v1 import slice_pb2_grpc as rpc
from services.enumeration.gate import Severity
from services.enumeration.hypothesis import score_hypothesis
from services.enumeration.messages import comparison_proto, confirmation_proto, slice_proto, verdict_proto
from services.enumeration.ranking import SIGNIFICANT
from services.enumeration.read import choose, doubtful_counts
from services.enumeration.side_by_side import (
    Shared,
    check_gate,
    compare_models,
    confirm_slices,
    open_shared,
    tag_position,
)
from services.enumeration.slices import StoredSlices, open_slices, slice_instances
from services.enumeration.statistics import Confirmation
from shared.errors import invalid
from shared.names import Name, parse, parse_any
from shared.rpc import context as call
from shared.rpc.arrow import send_batches
from shared.rpc.paging import LIMIT, page, page_bounds
from shared.schema import Schema
from shared.store.artifacts import Artifacts
from shared.store.store import Store

Context = grpc.aio.ServicerContext[Any, Any]
_COLLECTIONS = ("rankings", "enumerations")
_BATCH_ROWS = 8192
MAX_COMPARED = 16
FALSE_ALARM = 0.05


class SliceServicer(rpc.SliceServiceServicer):
    """Stored slices never change, so the last few opened stay in memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open = lru_cache(maxsize=4)(self._open_now)
        self._confirm = lru_cache(maxsize=4)(self._confirm_now)

    def _open_now(self, team: str, name: str) -> StoredSlices:
        return open_slices(Artifacts(self._store, team), parse_any(name, _COLLECTIONS, "parent"))

    def _confirm_now(self, team: str, name: str, seed: int) -> tuple[Shared, Confirmation]:
        return confirm_slices(Artifacts(self._store, team), parse(name, "rankings", "parent"), seed)

    async def _opened(self, parent: str) -> tuple[StoredSlices, frozenset[str]]:
        """Stored slices, and the attributes that the last check of their tags found doubtful: it may come later."""
        team = call.team.get()
        stored = await asyncio.to_thread(self._open, team, parent)
        return stored, await asyncio.to_thread(Artifacts(self._store, team).doubtful_attributes, stored.tagging)

    async def _doubtful_in(self, ranking: Name) -> frozenset[str]:
        return await asyncio.to_thread(Artifacts(self._store, call.team.get()).doubtful_in, ranking)

    async def ListSlices(self, request: pb.ListSlicesRequest, context: Context) -> pb.ListSlicesResponse:
        stored, doubtful = await self._opened(request.parent)
        positions = await asyncio.to_thread(_chosen, stored, doubtful, request.filter, request.order_by)
        first, end, token = page_bounds(len(positions), request.page_size, request.page_token)
        response = pb.ListSlicesResponse(next_page_token=token, total_count=len(positions))
        response.slices.extend(slice_proto(row) for row in stored.arrow(positions[first:end], doubtful).to_pylist())
        return response

    async def ReadSlices(self, request: pb.ReadSlicesRequest, context: Context) -> AsyncIterator[pb.ReadSlicesResponse]:
        stored, doubtful = await self._opened(request.parent)
        positions = await asyncio.to_thread(_chosen, stored, doubtful, request.filter, "")
        # Rows become batches as the reader takes them: a slow reader holds one batch, not the table.
        batches = (
            batch
            for start in range(0, max(len(positions), 1), _BATCH_ROWS)
            for batch in stored.arrow(positions[start : start + _BATCH_ROWS], doubtful).combine_chunks().to_batches()
        )
        for message in send_batches(stored.arrow(positions[:0], doubtful).schema, batches):
            yield pb.ReadSlicesResponse(arrow=message)

    async def ListSliceInstances(
        self, request: pb.ListSliceInstancesRequest, context: Context
    ) -> pb.ListSliceInstancesResponse:
        team = call.team.get()
        stored = await asyncio.to_thread(self._open, team, request.parent)
        terms = _terms(stored.schema, [(pair.attribute, [pair.tag]) for pair in request.tags], "tags")
        ids = await asyncio.to_thread(slice_instances, Artifacts(self._store, team), stored, terms)
        chosen, token = page(ids, request.page_size, request.page_token)
        return pb.ListSliceInstancesResponse(instance_ids=chosen, next_page_token=token, total_count=len(ids))

    async def ListFamilies(self, request: pb.ListFamiliesRequest, context: Context) -> pb.ListFamiliesResponse:
        name = parse(request.parent, "rankings", "parent")
        stored, doubtful = await self._opened(request.parent)
        families = await asyncio.to_thread(Artifacts(self._store, call.team.get()).read_part, name, "families")
        first, end, token = page_bounds(families.num_rows, request.page_size, request.page_token)
        response = pb.ListFamiliesResponse(next_page_token=token, total_count=families.num_rows)
        chosen = families.slice(first, end - first)
        leaders = stored.arrow(chosen.column("representative").to_numpy() - 1, doubtful).to_pylist()
        for row, leader in zip(chosen.to_pylist(), leaders, strict=True):
            response.families.add(
                representative=slice_proto(leader),
                member_ranks=row["members"],
                cover_rank=row["cover_rank"],
                covered_share=row["covered_share"],
            )
        return response

    async def EvaluateHypothesis(
        self, request: pb.EvaluateHypothesisRequest, context: Context
    ) -> pb.EvaluateHypothesisResponse:
        name = parse(request.parent, "rankings", "parent")
        artifacts = Artifacts(self._store, call.team.get())
        shared = await asyncio.to_thread(open_shared, artifacts, [name], "parent")
        terms = _terms(shared.table.schema, [(t.attribute, list(t.tags)) for t in request.terms], "terms")
        if not terms:
            raise invalid("terms", "there are none; name at least one attribute and its tags")
        found = await asyncio.to_thread(
            score_hypothesis, shared.table.codes, shared.table.tag_counts, shared.scores[:, 0], terms
        )
        response = pb.EvaluateHypothesisResponse(instance_count=found.count)
        if found.scored:
            response.score.CopyFrom(
                pb.SliceScore(
                    scored_count=found.scored,
                    mean=found.mean,
                    drop=found.drop,
                    error_share=found.error_share,
                    interval_low=found.interval_low,
                    interval_high=found.interval_high,
                    p_value=found.p,
                )
            )
        return response

    async def ConfirmSlices(self, request: pb.ConfirmSlicesRequest, context: Context) -> pb.ConfirmSlicesResponse:
        name = parse(request.parent, "rankings", "parent")
        shared, found = await asyncio.to_thread(self._confirm, call.team.get(), str(name), request.seed)
        doubtful = await self._doubtful_in(name)
        first, end, token = page_bounds(len(found.items), request.page_size, request.page_token)
        return pb.ConfirmSlicesResponse(
            slices=confirmation_proto(shared, found, range(first, end), doubtful),
            next_page_token=token,
            total_count=len(found.items),
            confirmed_count=int((found.q <= SIGNIFICANT).sum()),
        )

    async def CompareModels(self, request: pb.CompareModelsRequest, context: Context) -> pb.CompareModelsResponse:
        if not 2 <= len(request.rankings) <= MAX_COMPARED:
            raise invalid("rankings", f"holds {len(request.rankings)}; give 2 to {MAX_COMPARED}")
        names = [parse(r, "rankings", f"rankings[{i}]") for i, r in enumerate(request.rankings)]
        _, limit, _ = page_bounds(LIMIT, request.page_size, "")
        found = await asyncio.to_thread(compare_models, Artifacts(self._store, call.team.get()), names, limit)
        return comparison_proto(found, list(request.rankings), await self._doubtful_in(names[0]))

    async def CheckGate(self, request: pb.CheckGateRequest, context: Context) -> pb.CheckGateResponse:
        baseline = parse(request.baseline, "rankings", "baseline")
        candidate = parse(request.candidate, "rankings", "candidate", within=baseline.dataset)
        shared, verdict = await asyncio.to_thread(
            check_gate,
            Artifacts(self._store, call.team.get()),
            baseline,
            candidate,
            max_drop=request.max_drop,
            max_overall_drop=request.max_overall_drop if request.HasField("max_overall_drop") else None,
            significance=request.significance if request.HasField("significance") else FALSE_ALARM,
            thresholds=[([(p.attribute, p.tag) for p in t.tags], t.max_drop) for t in request.thresholds],
            severities=[Severity(v.severity, v.below, v.max_drop) for v in request.severities],
            every_slice=request.every_slice,
        )
        return verdict_proto(shared, verdict, await self._doubtful_in(baseline))


def _chosen(stored: StoredSlices, doubtful: frozenset[str], filter_text: str, order_by: str) -> npt.NDArray[np.int64]:
    columns = stored.columns
    if stored.is_ranking:
        columns = {"rank": np.arange(1, len(stored.items) + 1), **columns}
    if "doubtful" in filter_text or "doubtful" in order_by:
        columns = {**columns, "doubtful": doubtful_counts(stored.items, stored.words, doubtful)}
    return choose(columns, stored.items, stored.words, filter_text, order_by)


def _terms(schema: Schema, asked: list[tuple[str, list[str]]], field: str) -> dict[int, list[int]]:
    """Attribute position -> tag codes; InvalidInput for what the schema lacks."""
    out: dict[int, list[int]] = {}
    for i, (attribute, tags) in enumerate(asked):
        if not tags:
            raise invalid(f"{field}[{i}].tags", f"no tag of '{attribute[:80]}' is named")
        places = [tag_position(schema, attribute, tag, f"{field}[{i}]") for tag in tags]
        if places[0][0] in out:
            raise invalid(f"{field}[{i}].attribute", f"'{attribute}' is there twice")
        out[places[0][0]] = [code for _, code in places]
    return out
