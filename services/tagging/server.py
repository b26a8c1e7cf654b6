"""The tagging service over gRPC: plans taggings, follows them, tells how they stand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
from prometheus_client import Gauge
from redis.asyncio import Redis
from redis.exceptions import RedisError

from hibug2.v1 import tagging_pb2 as pb
from hibug2.v1 import tagging_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.tagging import check, dead, plan, reuse
from services.tagging.board import QUEUE, WORKED_ON, Board
from services.tagging.clip import clip_id
from services.tagging.config import Settings
from services.tagging.course import Course, Wanted
from services.tagging.estimate import estimate_tagging, usual_attributes
from services.tagging.messages import quality_proto
from services.tagging.shelf import DeadRow, Shelf
from shared import logs, metrics
from shared.errors import Busy, NotFound, Unavailable, invalid
from shared.jobs import RESTING, Jobs, Progress
from shared.llm import Account, Ledger
from shared.llm.prices import Prices
from shared.names import Name, content_id, dataset_id, parse, parse_any
from shared.prompting import load_prompt, prompts_root
from shared.queue.stream import Backlog, DeadEntry, Priority, WorkQueue, connect
from shared.rpc import context as call
from shared.rpc.costs import estimated_cost
from shared.rpc.paging import page
from shared.rpc.server import RunningServer, start
from shared.schema import Tagger
from shared.store.artifacts import Artifacts
from shared.store.store import Store

log = logs.get("tagging")
Context = grpc.aio.ServicerContext[Any, Any]
BACKLOG = Gauge("hibug2_tagging_backlog", "Work items: lag (in the queue), pending (in hand), waiting", ["kind"])
OLDEST = Gauge("hibug2_tagging_oldest_seconds", "For how long the oldest work item that is not done has been queued")
_MEASURE_S = 5.0
_PRIORITIES = {pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE, pb.PRIORITY_BATCH: Priority.BATCH}


class TaggingServicer(rpc.TaggingServiceServicer):
    """proto in, a course as a job, proto out."""

    def __init__(self, settings: Settings, redis: Redis, store: Store) -> None:
        self._settings = settings
        self._redis = redis
        self._store = store
        self._queue = WorkQueue(redis, QUEUE, int(settings.lease_s * 1000))
        self._ledger = Ledger(redis)
        self.jobs = Jobs(redis, "tagging", self._is_complete)
        self._budgets: set[tuple[str, str]] = set()  # team and account of those that are shown
        self._measurer = asyncio.create_task(self._measure())

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        made = parse_any(name, WORKED_ON, "name")
        return await asyncio.to_thread(_is_made, self._artifacts(), made)

    # Starting

    async def CreateTagging(self, request: pb.CreateTaggingRequest, context: Context) -> pb.CreateTaggingResponse:
        dataset = dataset_id(request.parent, "parent")
        schema = parse(request.schema, "schemas", "schema", within=dataset)
        asked = dead.Request(dataset, schema.id, tuple(request.splits))
        budget = request.budget if request.HasField("budget") else None
        return pb.CreateTaggingResponse(job=await self._create(asked, _PRIORITIES.get(request.priority), budget))

    async def _create(
        self, asked: dead.Request, priority: Priority | None, budget: types_pb2.Budget | None
    ) -> types_pb2.Job:
        artifacts = self._artifacts()
        wanted = await asyncio.to_thread(self._wanted, artifacts, asked, priority)
        name = str(wanted.name)
        if not await self._goes_on(name):
            waiting = (await self._queue.backlog()).total
            if waiting >= self._settings.max_backlog:
                raise Busy(f"{waiting:,} work items wait already, of all teams; try again in a while")
        if budget is not None and not await self._is_complete(name):
            await self._set_budget(artifacts, wanted.name, budget)

        async def work(progress: Progress) -> None:
            await Course(self._settings, self._redis, self._queue, artifacts, wanted).work(progress)

        return await self.jobs.create(name, work)

    def _wanted(self, artifacts: Artifacts, asked: dead.Request, priority: Priority | None) -> Wanted:
        record = artifacts.dataset(asked.dataset)
        schema, _ = artifacts.schema(asked.dataset, asked.schema)
        rows = plan.rows_to_tag(artifacts.instances(record), asked.splits)
        splits = tuple(sorted(set(rows.column("split").to_pylist())))
        asked = dead.Request(asked.dataset, asked.schema, splits)
        by: dict[str, object] = {}
        digest = model = clip = ""
        if plan.needs_llm(schema):
            root = prompts_root(self._settings.prompts_dir)
            digest = load_prompt("tagging", "tag", schema.task.value, root=root).digest
            model = self._settings.llm_model
            by = {"prompt": digest, "model": model}
        if plan.needs_clip(schema):
            clip = by["clip"] = clip_id(self._settings.clip_model, self._settings.clip_weights)
        tries = dead.redrives(artifacts, asked)
        if tries:
            by["redrive"] = tries
        key = content_id(digest=record.digest, schema=asked.schema, splits=splits, **by)
        return Wanted(
            name=Name(asked.dataset, "taggings", key),
            instances=rows,
            schema=schema,
            dataset_digest=record.digest,
            splits=splits,
            prompt_digest=digest,
            model=model,
            clip=clip,
            redrive=tries,
            priority=priority,
        )

    async def _goes_on(self, name: str) -> bool:
        """True for a job that is there and needs nothing new of the queue."""
        try:
            job = await self.jobs.get(name)
        except NotFound:
            return False
        return job.state not in RESTING or job.state == types_pb2.JOB_STATE_SUCCEEDED

    async def _set_budget(self, artifacts: Artifacts, name: Name, budget: types_pb2.Budget) -> None:
        """Written down, so that the cap outlives Redis, and told to calls that are made already."""
        account = Account(artifacts.team, budget.account or str(name))
        await self._ledger.open(account, budget.amount)
        await asyncio.to_thread(Shelf(artifacts, name).write_budget, budget.account, budget.amount)

    async def EstimateTagging(self, request: pb.EstimateTaggingRequest, context: Context) -> pb.EstimateTaggingResponse:
        dataset = dataset_id(request.parent, "parent")
        schema = parse(request.schema, "schemas", "schema", within=dataset).id if request.schema else ""
        return await asyncio.to_thread(self._estimate, dataset, schema, tuple(request.splits))

    def _estimate(self, dataset: str, schema_id: str, splits: tuple[str, ...]) -> pb.EstimateTaggingResponse:
        artifacts, settings = self._artifacts(), self._settings
        record = artifacts.dataset(dataset)
        rows = plan.rows_to_tag(artifacts.instances(record), splits)
        prompt = load_prompt("tagging", "tag", record.task.value, root=prompts_root(settings.prompts_dir))
        if schema_id:
            schema, _ = artifacts.schema(dataset, schema_id)
            attributes = [a for a in schema.attributes if a.tagger is Tagger.VLM]
            keys = [reuse.attribute_key(a, prompt.digest, settings.llm_model, "") for a in attributes]
            lacking = ~reuse.known_codes(artifacts, dataset, rows, attributes, keys).mask
            asked = [(len(g.rows), [attributes[j] for j in g.attributes]) for g in plan.groups_of(lacking)]
            assumption = "every image is answered at once"
        else:
            attributes = usual_attributes() if settings.llm_base_url else []
            asked = [(rows.num_rows, attributes)] if attributes else []
            assumption = (
                f"a schema of {len(attributes)} attributes with {len(attributes[0].tags)} tags" if asked else ""
            )
        if not asked:
            return pb.EstimateTaggingResponse()
        price = Prices.load(settings.llm_prices).known(settings.llm_model)
        found = estimate_tagging(price, prompt, asked, settings.llm_image_detail)
        return pb.EstimateTaggingResponse(cost=estimated_cost(found), assumption=assumption)

    # Reading

    async def GetTagging(self, request: pb.GetTaggingRequest, context: Context) -> pb.GetTaggingResponse:
        name = parse(request.name, "taggings", "name")
        response = pb.GetTaggingResponse(job=await self.jobs.get(request.name))
        artifacts = self._artifacts()
        if not await asyncio.to_thread(artifacts.is_complete, name):
            told = await self._told(artifacts, name)
            response.dead_count, response.invalid_answer_share = told.dead_count, told.invalid_answer_share
            return response
        summary = (await asyncio.to_thread(artifacts.manifest, name)).summary
        response.instance_count, response.dead_count = summary["instance_count"], summary["dead_count"]
        response.reused_count = summary.get("reused_count", 0)
        if summary.get("asked_count"):
            response.invalid_answer_share = summary["invalid_answer_count"] / summary["asked_count"]
        for attribute, unknown in summary["unknown"].items():
            response.coverage.add(
                attribute=attribute, unknown_count=unknown, not_visible_count=summary["not_visible"][attribute]
            )
        return response

    async def _told(self, artifacts: Artifacts, name: Name) -> pb.WatchTaggingResponse:
        try:
            outline = await asyncio.to_thread(Shelf(artifacts, name).outline)
        except NotFound:
            return pb.WatchTaggingResponse()
        return await Board(self._redis, artifacts.team, str(name), outline.id).told()

    async def CancelTagging(self, request: pb.CancelTaggingRequest, context: Context) -> pb.CancelTaggingResponse:
        parse(request.name, "taggings", "name")
        return pb.CancelTaggingResponse(job=await self.jobs.cancel(request.name))

    async def WatchTagging(
        self, request: pb.WatchTaggingRequest, context: Context
    ) -> AsyncIterator[pb.WatchTaggingResponse]:
        name, artifacts = parse(request.name, "taggings", "name"), self._artifacts()
        async for job in self.jobs.watch(request.name):
            if job.state == types_pb2.JOB_STATE_SUCCEEDED:
                found = await self.GetTagging(pb.GetTaggingRequest(name=request.name), context)
                told = pb.WatchTaggingResponse(
                    dead_count=found.dead_count, invalid_answer_share=found.invalid_answer_share
                )
            else:
                told = await self._told(artifacts, name)
            told.job.CopyFrom(job)
            yield told

    async def GetBacklog(self, request: pb.GetBacklogRequest, context: Context) -> pb.GetBacklogResponse:
        found = await self._queue.backlog()
        _show(found)
        return pb.GetBacklogResponse(lag_count=found.lag, pending_count=found.pending, waiting_count=found.waiting)

    async def _measure(self) -> None:
        while True:
            try:
                _show(await self._queue.backlog())
                OLDEST.set(await self._queue.oldest_s())
                await self._measure_budgets()
            except (RedisError, Unavailable) as error:
                log.warning("backlog and budgets not measured", error=str(error))
            await asyncio.sleep(_MEASURE_S)

    async def _measure_budgets(self) -> None:
        """Show how much of each cap is spent, whichever service spends it; forget those that are not in use."""
        shown = {}
        for account, spend in await self._ledger.capped():
            ratio = (spend.amount + spend.reserved) / spend.cap if spend.cap else 1.0  # a cap of 0 is spent
            shown[account.team, account.name] = ratio
        self._show_budgets(shown)

    def _show_budgets(self, shown: Mapping[tuple[str, str], float]) -> None:
        for labels, ratio in shown.items():
            metrics.LLM_BUDGET.labels(*labels).set(ratio)
        for labels in self._budgets - shown.keys():
            metrics.LLM_BUDGET.remove(*labels)
        self._budgets = set(shown)

    async def close(self) -> None:
        self._measurer.cancel()
        await asyncio.gather(self._measurer, return_exceptions=True)
        self._show_budgets({})
        await self.jobs.close()

    # Checks

    async def CreateTagCheck(self, request: pb.CreateTagCheckRequest, context: Context) -> pb.CreateTagCheckResponse:
        artifacts = self._artifacts()
        made = await asyncio.to_thread(self._planned_check, artifacts, request)
        if request.HasField("budget") and not await self._is_complete(str(made.name)):
            await self._set_budget(artifacts, made.name, request.budget)

        async def work(progress: Progress) -> None:
            if made.wanted is not None and not await asyncio.to_thread(artifacts.is_complete, made.name):
                await Course(self._settings, self._redis, self._queue, artifacts, made.wanted).work(progress)
            await asyncio.to_thread(check.conclude, artifacts, made)

        return pb.CreateTagCheckResponse(job=await self.jobs.create(str(made.name), work))

    def _planned_check(self, artifacts: Artifacts, request: pb.CreateTagCheckRequest) -> check.Check:
        settings = self._settings
        tagging = check.tagging_to_check(artifacts, request.parent, request.tagging)
        task, root = artifacts.dataset(tagging.dataset).task, prompts_root(settings.prompts_dir)
        model = settings.llm_model if settings.llm_base_url else ""
        return check.plan_check(
            artifacts,
            tagging,
            request.sample_count,
            request.seed,
            prompt_digest=load_prompt("tagging", "tag", task.value, root=root).digest if model else "",
            model=model,
            min_kappa=settings.min_kappa,
        )

    async def GetTagCheck(self, request: pb.GetTagCheckRequest, context: Context) -> pb.GetTagCheckResponse:
        name = parse(request.name, "checks", "name")
        response = pb.GetTagCheckResponse(job=await self.jobs.get(request.name))
        if response.job.state == types_pb2.JOB_STATE_SUCCEEDED:
            found = await asyncio.to_thread(self._artifacts().quality, name)
            response.quality.CopyFrom(quality_proto(found))
        return response

    async def CancelTagCheck(self, request: pb.CancelTagCheckRequest, context: Context) -> pb.CancelTagCheckResponse:
        parse(request.name, "checks", "name")
        return pb.CancelTagCheckResponse(job=await self.jobs.cancel(request.name))

    async def WatchTagCheck(
        self, request: pb.WatchTagCheckRequest, context: Context
    ) -> AsyncIterator[pb.WatchTagCheckResponse]:
        parse(request.name, "checks", "name")
        async for job in self.jobs.watch(request.name):
            yield pb.WatchTagCheckResponse(job=job)

    async def GetTagQuality(self, request: pb.GetTagQualityRequest, context: Context) -> pb.GetTagQualityResponse:
        found = await asyncio.to_thread(check.quality_of, self._artifacts(), request.parent, request.schema)
        return pb.GetTagQualityResponse(quality=quality_proto(found))

    # The dead

    async def ListDeadItems(self, request: pb.ListDeadItemsRequest, context: Context) -> pb.ListDeadItemsResponse:
        artifacts = self._artifacts()
        buried = await self._queue.dead(artifacts.team)
        rows = [
            pb.DeadItem(tagging=str(name), instance_id=row.instance_id, image_uri=row.image_uri, reason=row.reason)
            for name in await asyncio.to_thread(dead.taggings, artifacts, request.parent)
            for row in await self._dead_of(artifacts, name, buried)
        ]
        chosen, token = page(rows, request.page_size, request.page_token)
        return pb.ListDeadItemsResponse(dead_items=chosen, next_page_token=token)

    async def _dead_of(self, artifacts: Artifacts, name: Name, buried: Sequence[DeadEntry]) -> list[DeadRow]:
        rows = await asyncio.to_thread(dead.dead_rows, artifacts, name)
        told = [(_plan_of(entry), entry.number, entry.reason) for entry in buried if entry.job == str(name)]
        if told and not await asyncio.to_thread(artifacts.is_complete, name):
            rows += await asyncio.to_thread(dead.buried_rows, artifacts, name, told)
        return rows

    async def RedriveDeadItems(
        self, request: pb.RedriveDeadItemsRequest, context: Context
    ) -> pb.RedriveDeadItemsResponse:
        artifacts = self._artifacts()
        response = pb.RedriveDeadItemsResponse()
        named = request.parent.count("/") == 3
        for name in await asyncio.to_thread(dead.taggings, artifacts, request.parent):
            buried = await self._queue.dead(artifacts.team, str(name))
            rows = await self._dead_of(artifacts, name, buried)
            if not rows:
                continue
            if await asyncio.to_thread(artifacts.is_complete, name):
                asked = await asyncio.to_thread(dead.redriven, artifacts, name)
                response.jobs.append(await self._create(asked, None, None))
            elif buried:
                rows = await asyncio.to_thread(
                    dead.buried_rows, artifacts, name, [(_plan_of(e), e.number, e.reason) for e in buried]
                )
                board = Board(self._redis, artifacts.team, str(name), _plan_of(buried[0]))
                await self._queue.drop_dead(artifacts.team, buried, board.exhume(e.number for e in buried))
                response.jobs.append(await self.jobs.get(str(name)))
            elif named:
                raise invalid(
                    "parent", f"{name} is not complete; its images are tried again once it is, or when it is resumed"
                )
            else:
                continue
            response.redriven_count += len(rows)
        return response


def _is_made(artifacts: Artifacts, name: Name) -> bool:
    if name.collection == "taggings":
        return artifacts.is_complete(name)
    try:
        artifacts.quality(name)
    except NotFound:
        return False
    return True


def _plan_of(entry: DeadEntry) -> str:
    return pb.TaggingItem.FromString(entry.payload).plan


def _show(backlog: Backlog) -> None:
    for kind in ("lag", "pending", "waiting"):
        BACKLOG.labels(kind).set(getattr(backlog, kind))


async def start_server(settings: Settings) -> RunningServer:
    """Start the tagging service; stop it by the returned server's `stop`."""
    redis = connect(settings.redis_url)
    servicer = TaggingServicer(settings, redis, Store(settings.store_url))

    def add(server: grpc.aio.Server) -> Sequence[str]:
        rpc.add_TaggingServiceServicer_to_server(servicer, server)
        return [pb.DESCRIPTOR.services_by_name["TaggingService"].full_name]

    return await start(settings, add, closers=[servicer.close, redis.aclose])
