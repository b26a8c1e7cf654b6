"""The prediction service over gRPC."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from redis.asyncio import Redis

from hibug2.v1 import prediction_pb2 as pb
from hibug2.v1 import prediction_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.prediction.check import Check, check_predictions
from services.prediction.config import Settings
from services.prediction.instruction import Tally, ask_combinations, load_questions
from services.prediction.items import MAX_PER_CLASS
from services.prediction.predict import (
    INSTRUCTION,
    PRIOR,
    TAG_SUBSTITUTION,
    confusions_of,
    predict_by_prior,
    predict_by_substitution,
    store_instructed,
)
from services.prediction.ranked import Ranked, open_ranking
from services.prediction.verification import Drop
from shared.clip import weights_digest
from shared.errors import Precondition, invalid
from shared.jobs import Jobs, Progress
from shared.llm import LLM, Account, llm_from
from shared.names import Name, content_id, dataset_id, parse
from shared.prompting import prompts_root
from shared.queue.stream import connect
from shared.rpc import context as call
from shared.rpc.costs import spent_cost
from shared.rpc.paging import page_bounds
from shared.rpc.provenance import provenance_proto
from shared.rpc.server import RunningServer, start
from shared.schema import Schema
from shared.store.artifacts import Artifacts, items_of
from shared.store.store import Store
from shared.text import ClipEncoder, StaticEncoder, TextEncoder

Context = grpc.aio.ServicerContext[Any, Any]
TEST = "test"
REVISION = 2  # raised when the same input would give another prediction
_METHODS = {
    pb.PREDICTION_METHOD_UNSPECIFIED: TAG_SUBSTITUTION,
    pb.PREDICTION_METHOD_TAG_SUBSTITUTION: TAG_SUBSTITUTION,
    pb.PREDICTION_METHOD_INSTRUCTION: INSTRUCTION,
    pb.PREDICTION_METHOD_PRIOR: PRIOR,
}
_PROTO_METHODS = {method: number for number, method in _METHODS.items() if number}

_Made = tuple[Mapping[str, object], Callable[[Progress, Name], Awaitable[None]]]  # what it depends on, and the work


@dataclass(frozen=True)
class _Order:
    """One prediction to be made."""

    ranked: Ranked
    method: str
    max_per_class: int
    pair_count: int | None


class PredictionServicer(rpc.PredictionServiceServicer):
    """proto in, domain in a thread, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._encoder: TextEncoder | None = None
        self._prompts = prompts_root(settings.prompts_dir)
        self.llm: LLM | None = llm_from(settings, redis)
        self.jobs = Jobs(redis, "prediction", self._is_complete)

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        return await asyncio.to_thread(self._artifacts().is_complete, parse(name, "predictions", "name"))

    def _load_encoder(self) -> TextEncoder:
        if self._encoder is None:
            s = self._settings
            self._encoder = ClipEncoder(s.clip_model, s.clip_weights) if s.clip_model else StaticEncoder()
        return self._encoder

    async def CreatePrediction(
        self, request: pb.CreatePredictionRequest, context: Context
    ) -> pb.CreatePredictionResponse:
        order = await asyncio.to_thread(_order_of, self._artifacts(), request)
        make = {TAG_SUBSTITUTION: self._substitute, INSTRUCTION: self._instruct, PRIOR: self._weigh}[order.method]
        key, work = await asyncio.to_thread(make, order)  # a file of weights is hashed once
        ranking = order.ranked.name
        asked = content_id(
            ranking=ranking.id,
            method=order.method,
            max_per_class=order.max_per_class,
            pair_count=order.pair_count,
            revision=REVISION,
            **key,
        )
        name = Name(ranking.dataset, "predictions", asked)
        return pb.CreatePredictionResponse(job=await self.jobs.create(str(name), lambda progress: work(progress, name)))

    def _substitute(self, order: _Order) -> _Made:
        s = self._settings
        weights = weights_digest(s.clip_weights) if s.clip_model and s.clip_weights else ""

        async def work(progress: Progress, name: Name) -> None:
            progress.step = "embedding tags"
            encoder = await asyncio.to_thread(self._load_encoder)
            progress.step = "substituting tags"
            await asyncio.to_thread(
                predict_by_substitution,
                order.ranked,
                name,
                encoder,
                weights=weights,
                neighbours=s.neighbours,
                max_per_class=order.max_per_class,
                max_origins=s.max_origins,
            )

        return {"encoder": [s.clip_model, weights], "neighbours": s.neighbours, "max_origins": s.max_origins}, work

    def _weigh(self, order: _Order) -> _Made:
        async def work(progress: Progress, name: Name) -> None:
            progress.step = "weighing what is missing"
            await asyncio.to_thread(
                predict_by_prior,
                order.ranked,
                name,
                pair_count=order.pair_count,
                max_per_class=order.max_per_class,
                on_progress=progress.update,
                cancelled=lambda: progress.cancelled,
            )

        return {}, work

    def _instruct(self, order: _Order) -> _Made:
        s, llm, ranked = self._settings, self.llm, order.ranked
        if llm is None:
            raise Precondition(
                "instruction asks a language model, and none is configured: set HIBUG2_LLM_BASE_URL and "
                "HIBUG2_LLM_MODEL of the prediction service, or predict by tag_substitution or prior"
            )
        questions = load_questions(self._prompts, ranked.schema.task.value)
        pair_count = order.pair_count or ranked.max_depth

        async def work(progress: Progress, name: Name) -> None:
            progress.step = "reading what is known"
            confused = await asyncio.to_thread(confusions_of, ranked, s.target_count)
            await asyncio.to_thread(lambda: ranked.extents)
            progress.step = "asking for combinations"

            def tell(tally: Tally) -> None:
                progress.update(tally.done, tally.total)
                progress.cost = spent_cost(tally.usage)

            found = await ask_combinations(
                llm.charging(Account(call.team.get(), str(name))),
                questions,
                ranked.schema,
                pair_count=pair_count,
                is_unseen=ranked.is_unseen,
                known_confusions=confused,
                max_questions=s.question_count,
                max_per_class=order.max_per_class,
                tell=tell,
            )
            await asyncio.to_thread(
                store_instructed,
                ranked,
                name,
                found,
                pair_count=pair_count,
                max_per_class=order.max_per_class,
                prompt_digests=questions.digests,
                model=s.llm_model,
            )

        asked = {"llm": s.llm_model, "prompts": questions.digests}
        return {**asked, "target_count": s.target_count, "question_count": s.question_count}, work

    async def GetPrediction(self, request: pb.GetPredictionRequest, context: Context) -> pb.GetPredictionResponse:
        name = parse(request.name, "predictions", "name")
        response = pb.GetPredictionResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if await asyncio.to_thread(artifacts.is_complete, name):
            manifest = await asyncio.to_thread(artifacts.manifest, name)
            summary = manifest.summary
            response.predicted_slice_count = summary["predicted_slice_count"]
            response.method = _PROTO_METHODS[str(manifest.provenance.parameters["method"])]
            response.question_count = summary.get("question_count", 0)
            for reason, count in sorted(summary.get("dropped", {}).items()):
                response.dropped.add(reason=reason, combination_count=count)
            response.provenance.CopyFrom(provenance_proto(manifest.provenance))
        return response

    async def CancelPrediction(
        self, request: pb.CancelPredictionRequest, context: Context
    ) -> pb.CancelPredictionResponse:
        parse(request.name, "predictions", "name")
        return pb.CancelPredictionResponse(job=await self.jobs.cancel(request.name))

    async def WatchPrediction(
        self, request: pb.WatchPredictionRequest, context: Context
    ) -> AsyncIterator[pb.WatchPredictionResponse]:
        parse(request.name, "predictions", "name")
        async for job in self.jobs.watch(request.name):
            yield pb.WatchPredictionResponse(job=job)

    async def ListPredictedSlices(
        self, request: pb.ListPredictedSlicesRequest, context: Context
    ) -> pb.ListPredictedSlicesResponse:
        return await asyncio.to_thread(_list, self._artifacts(), request)

    async def VerifyPredictions(
        self, request: pb.VerifyPredictionsRequest, context: Context
    ) -> pb.VerifyPredictionsResponse:
        names = [parse(p, "predictions", f"predictions[{i}]") for i, p in enumerate(request.predictions)]
        if not names:
            raise invalid("predictions", "holds none; name what to verify")
        dataset = names[0].dataset
        for i, prediction in enumerate(request.predictions):
            parse(prediction, "predictions", f"predictions[{i}]", within=dataset)
        if request.HasField("min_count") and request.min_count < 1:
            raise invalid("min_count", f"is {request.min_count}; give 1 or more")
        if request.seed < 0:
            raise invalid("seed", f"is {request.seed}; give 0 or more")
        found = await asyncio.to_thread(
            check_predictions,
            self._artifacts(),
            names,
            tagging=parse(request.tagging, "taggings", "tagging", within=dataset) if request.tagging else None,
            model=parse(request.model, "models", "model", within=dataset).id if request.model else None,
            splits=list(request.splits) or [TEST],
            min_count=request.min_count if request.HasField("min_count") else None,
            seed=request.seed,
        )
        return _check_proto(found, dataset)


def _order_of(artifacts: Artifacts, request: pb.CreatePredictionRequest) -> _Order:
    """What `request` asks for, checked."""
    dataset = dataset_id(request.parent, "parent")
    ranking = parse(request.ranking, "rankings", "ranking", within=dataset)
    if request.method not in _METHODS:
        raise invalid("method", f"{request.method} is no method of prediction")
    method = _METHODS[request.method]
    max_per_class = request.max_per_class if request.HasField("max_per_class") else MAX_PER_CLASS
    if max_per_class < 1:
        raise invalid("max_per_class", f"is {max_per_class}; give 1 or more")
    ranked = open_ranking(artifacts, ranking)
    pair_count = request.pair_count if request.HasField("pair_count") else None
    if method != TAG_SUBSTITUTION and ranked.max_depth < 2:
        raise Precondition(f"the slices of {ranking} have one pair, and none is missing; run with a depth of 2 or more")
    if pair_count is not None:
        if method == TAG_SUBSTITUTION:
            raise invalid("pair_count", "tag substitution keeps the number of pairs of its error slices; give none")
        if not 2 <= pair_count <= ranked.max_depth:
            raise invalid("pair_count", f"is {pair_count}; the ranked slices allow 2 to {ranked.max_depth}")
    return _Order(ranked, method, max_per_class, pair_count)


def _list(artifacts: Artifacts, request: pb.ListPredictedSlicesRequest) -> pb.ListPredictedSlicesResponse:
    name = parse(request.parent, "predictions", "parent")
    parameters = artifacts.manifest(name).provenance.parameters
    pairs = _pairs(artifacts.schema(name.dataset, str(parameters["schema"]))[0])
    table = artifacts.read_part(name, "predicted")
    method = _PROTO_METHODS[str(parameters["method"])]
    doubtful = artifacts.doubtful_in(parse(str(parameters["ranking"]), "rankings", "parent"))
    first, end, token = page_bounds(table.num_rows, request.page_size, request.page_token)
    response = pb.ListPredictedSlicesResponse(next_page_token=token)
    chosen = table.slice(first, end - first)
    # Predictions of earlier versions have fewer columns.
    for i, (row, items) in enumerate(zip(chosen.to_pylist(), items_of(chosen), strict=True)):
        response.predicted_slices.add(
            rank=first + i + 1,
            tags=[pairs[item] for item in items if item >= 0],
            score=row["score"],
            method=method,
            origin_ranks=row["origin_ranks"],
            replaced=None if row["from_item"] is None else pairs[row["from_item"]],
            similarity=row["similarity"] or 0.0,
            known_count=row.get("known_count"),
            target=row.get("target") or "",
            expected_mean=row.get("expected_mean"),
            doubtful=[pairs[item].attribute for item in items if item >= 0 and pairs[item].attribute in doubtful],
        )
    return response


def _pairs(schema: Schema) -> list[types_pb2.AttributeTag]:
    return [types_pb2.AttributeTag(attribute=attribute, tag=tag) for attribute, tag in schema.pairs]


def _check_proto(found: Check, dataset: str) -> pb.VerifyPredictionsResponse:
    response = pb.VerifyPredictionsResponse(
        overall_mean=found.overall_mean,
        scored_count=found.scored_count,
        model=f"datasets/{dataset}/models/{found.model}",
        tagging=str(found.tagging),
    )
    for checked in found.predictions:
        slices = checked.verified.slices
        response.predictions.add(
            prediction=str(checked.name),
            method=_PROTO_METHODS[checked.method],
            pair_counts=checked.verified.pair_counts,
            predicted_slice_count=checked.predicted,
            verified=_drop_proto(checked.verified.found),
            base=_drop_proto(checked.verified.base),
            slices=[
                pb.VerifiedSlice(
                    rank=i + 1,
                    scored_count=int(slices.scored[i]),
                    mean=_told(slices.mean[i]),
                    drop=_told(slices.drop[i]),
                    interval_low=_told(slices.low[i]),
                    interval_high=_told(slices.high[i]),
                    is_error_slice=bool(slices.is_error[i]),
                )
                for i in range(checked.predicted)
            ],
        )
    return response


def _drop_proto(drop: Drop) -> pb.VerifiedDrop:
    return pb.VerifiedDrop(
        slice_count=drop.slices,
        mean_drop=_told(drop.mean_drop),
        interval_low=_told(drop.low),
        interval_high=_told(drop.high),
        error_slice_share=_told(drop.error_share),
    )


def _told(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


async def start_server(settings: Settings) -> RunningServer:
    """Start the prediction service; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    servicer = PredictionServicer(settings, redis, Store(settings.store_url))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_PredictionServiceServicer_to_server(servicer, server)
        return [pb.DESCRIPTOR.services_by_name["PredictionService"].full_name]

    closers = [servicer.jobs.close]
    if servicer.llm is not None:
        closers.append(servicer.llm.close)
    return await start(settings, add, closers=[*closers, redis.aclose])
