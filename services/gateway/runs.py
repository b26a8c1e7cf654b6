"""A run: the steps of the pipeline, each resumable from its artifact, and where a run is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from redis.asyncio import Redis
from redis.exceptions import RedisError

from hibug2.v1 import (
    attribute_pb2,
    attribute_pb2_grpc,
    enumeration_pb2,
    enumeration_pb2_grpc,
    prediction_pb2,
    prediction_pb2_grpc,
    repair_pb2,
    repair_pb2_grpc,
    run_pb2,
    tagging_pb2,
    tagging_pb2_grpc,
    types_pb2,
)
from services.gateway.config import Settings
from shared import logs
from shared.errors import Busy, HiBug2Error, NotFound, Unavailable
from shared.jobs import KEEP_S, RESTING, Paused, Progress
from shared.rpc import context as call
from shared.rpc import status
from shared.rpc.channel import connect
from shared.store.artifacts import Artifacts
from shared.store.store import Store

log = logs.get("gateway.runs")
T = TypeVar("T")

MAX_DEPTH, MIN_COUNT, MARGIN, BUDGET = 3, 10, 0.2, 500
SPLIT, POOL = "validation", "pool"
PATIENCE_S = 300.0  # a step that gets no further for so long, because what it needs is away, fails
_WAIT_S = (0.5, 5.0)  # between two tries


class Backends:
    """Channels and stubs of the services behind the gateway.

    They try once: callers try again themselves, and runs wait in `Pipeline`, so that a service that is in trouble does
    not get the tries of two layers, multiplied.
    """

    def __init__(self, settings: Settings) -> None:
        self.channels = {
            "attribute": connect(settings.attribute_address, settings, retries=False),
            "tagging": connect(settings.tagging_address, settings, retries=False),
            "enumeration": connect(settings.enumeration_address, settings, retries=False),
            "prediction": connect(settings.prediction_address, settings, retries=False),
            "repair": connect(settings.repair_address, settings, retries=False),
        }
        self.attribute = attribute_pb2_grpc.AttributeServiceStub(self.channels["attribute"])
        self.tagging = tagging_pb2_grpc.TaggingServiceStub(self.channels["tagging"])
        self.enumeration = enumeration_pb2_grpc.EnumerationServiceStub(self.channels["enumeration"])
        self.prediction = prediction_pb2_grpc.PredictionServiceStub(self.channels["prediction"])
        self.repair = repair_pb2_grpc.RepairServiceStub(self.channels["repair"])

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()


class RunShelf:
    """Where runs are kept: the manifest in the store, the live snapshot in Redis."""

    def __init__(self, redis: Redis, store: Store) -> None:
        self._redis = redis
        self._store = store

    def _key(self, run: str) -> str:
        return f"hibug2:run:{call.team.get()}:{run}"

    def _path(self, run: str) -> str:
        return Artifacts(self._store, call.team.get()).run_path(run, "run.json")

    async def save(self, run: run_pb2.Run) -> None:
        """Write the manifest, and the snapshot with it."""
        body = json_format.MessageToDict(run)
        await asyncio.to_thread(self._store.write_json, self._path(run_id(run)), body)
        await self.publish(run)

    async def publish(self, run: run_pb2.Run) -> None:
        """Show progress; lost when Redis is away, told again by the next call."""
        try:
            await self._redis.set(self._key(run_id(run)), run.SerializeToString(), ex=KEEP_S)
        except RedisError as error:
            log.warning("progress not published", error=str(error))

    async def read(self, run: str) -> run_pb2.Run:
        """The manifest; NotFound when the team has no such run."""
        try:
            body = await asyncio.to_thread(self._store.read_json, self._path(run))
        except NotFound as error:
            raise NotFound(f"there is no run '{run}'; 'hibug2 runs' shows those that are there") from error
        return json_format.ParseDict(body, run_pb2.Run(), ignore_unknown_fields=True)

    async def live(self, run: str) -> run_pb2.Run:
        """The latest snapshot, or the manifest where there is none."""
        raw = await self._redis.get(self._key(run))
        return run_pb2.Run.FromString(raw) if isinstance(raw, bytes) else await self.read(run)


def run_id(run: run_pb2.Run) -> str:
    return run.name.partition("/")[2]


class _JobAnswer(Protocol):
    @property
    def job(self) -> types_pb2.Job: ...


@dataclass(frozen=True)
class _Call:
    """How a step's job is made, watched and cancelled; the three calls of one service."""

    create: Callable[[], Awaitable[_JobAnswer]]
    watch: Callable[[str], AsyncIterable[_JobAnswer]]
    cancel: Callable[[str], Awaitable[Any]]


class Pipeline:
    """Takes one run through its steps. Work that is there is found again by the services, so steps may be repeated."""

    def __init__(
        self,
        run: run_pb2.Run,
        backends: Backends,
        shelf: RunShelf,
        artifacts: Artifacts,
        progress: Progress,
        make_report: Callable[[run_pb2.Run], Awaitable[None]],
    ) -> None:
        self.run = run
        self._b = backends
        self._shelf = shelf
        self._artifacts = artifacts
        self._progress = progress
        self._make_report = make_report
        # What this run began and does not merely find again: jobs by name, as last seen, and the step of its schema.
        self._own: dict[str, types_pb2.Job] = {}
        self._generation: run_pb2.Step | None = None

    async def execute(self) -> None:
        """Every step in order; raises what the failing step said. The run is saved after each."""
        run = self.run
        before = run_pb2.Run(steps=run.steps)
        for done in before.steps:
            if done.job.name and not done.job.reused:
                self._own[done.job.name] = done.job
                if done.kind == run_pb2.STEP_KIND_SCHEMA:
                    self._generation = done
        del run.steps[:], run.selections[:]
        run.job.state = types_pb2.JOB_STATE_RUNNING
        run.job.ClearField("problem")
        run.job.message = ""
        await self._shelf.save(run)
        for step in (
            self._schema,
            self._tagging,
            self._enumeration,
            self._ranking,
            self._prediction,
            self._selection,
            self._report,
        ):
            await step()
            await self._shelf.save(run)

    def _budget(self) -> types_pb2.Budget | None:
        """What the steps of this run may spend together; None where nothing is said."""
        if not self.run.parameters.HasField("max_cost"):
            return None
        return types_pb2.Budget(account=self.run.name, amount=self.run.parameters.max_cost)

    async def _schema(self) -> None:
        run = self.run
        if run.schema and self._generation is not None:
            run.steps.append(self._generation)
            return
        if not run.schema:
            dataset = run.dataset.partition("/")[2]
            current = await asyncio.to_thread(self._artifacts.current_schema_id, dataset)
            if current is None or self._generation is not None:
                request = attribute_pb2.CreateGenerationRequest(
                    parent=run.dataset, seed=run.parameters.seed, model=run.model, budget=self._budget()
                )
                job = await self._follow(
                    run_pb2.STEP_KIND_SCHEMA,
                    _Call(
                        lambda: self._b.attribute.CreateGeneration(request),
                        lambda name: self._b.attribute.WatchGeneration(attribute_pb2.WatchGenerationRequest(name=name)),
                        lambda name: self._b.attribute.CancelGeneration(
                            attribute_pb2.CancelGenerationRequest(name=name)
                        ),
                    ),
                )
                answer = await self._patiently(
                    lambda: self._b.attribute.GetGeneration(attribute_pb2.GetGenerationRequest(name=job.name))
                )
                run.schema = answer.schema.name
                return
            run.schema = f"{run.dataset}/schemas/{current}"
        self._note(run_pb2.STEP_KIND_SCHEMA, run.schema)

    async def _tagging(self) -> None:
        run = self.run
        request = tagging_pb2.CreateTaggingRequest(parent=run.dataset, schema=run.schema, budget=self._budget())
        job = await self._follow(
            run_pb2.STEP_KIND_TAGGING,
            _Call(
                lambda: self._b.tagging.CreateTagging(request),
                lambda name: self._b.tagging.WatchTagging(tagging_pb2.WatchTaggingRequest(name=name)),
                lambda name: self._b.tagging.CancelTagging(tagging_pb2.CancelTaggingRequest(name=name)),
            ),
        )
        run.tagging = job.name

    async def _enumeration(self) -> None:
        run, p = self.run, self.run.parameters
        request = enumeration_pb2.CreateEnumerationRequest(
            parent=run.dataset, tagging=run.tagging, split=p.split, min_count=p.min_count, max_depth=p.max_depth
        )
        job = await self._follow(
            run_pb2.STEP_KIND_ENUMERATION,
            _Call(
                lambda: self._b.enumeration.CreateEnumeration(request),
                lambda name: self._b.enumeration.WatchEnumeration(enumeration_pb2.WatchEnumerationRequest(name=name)),
                lambda name: self._b.enumeration.CancelEnumeration(enumeration_pb2.CancelEnumerationRequest(name=name)),
            ),
        )
        run.enumeration = job.name

    async def _ranking(self) -> None:
        run = self.run
        request = enumeration_pb2.CreateRankingRequest(
            parent=run.dataset, enumeration=run.enumeration, model=run.model, margin=run.parameters.margin
        )
        job = await self._follow(
            run_pb2.STEP_KIND_RANKING,
            _Call(
                lambda: self._b.enumeration.CreateRanking(request),
                lambda name: self._b.enumeration.WatchRanking(enumeration_pb2.WatchRankingRequest(name=name)),
                lambda name: self._b.enumeration.CancelRanking(enumeration_pb2.CancelRankingRequest(name=name)),
            ),
        )
        run.ranking = job.name
        found = await self._patiently(
            lambda: self._b.enumeration.GetRanking(enumeration_pb2.GetRankingRequest(name=job.name))
        )
        run.summary.overall_mean = found.overall_mean
        run.summary.instance_count = found.scored_count
        run.summary.slice_count = found.slice_count
        run.summary.error_slice_count = found.error_slice_count
        run.summary.significant_slice_count = found.significant_count
        run.summary.family_count = found.family_count
        if found.HasField("by_chance"):
            run.summary.expected_by_chance = found.by_chance.mean

    async def _prediction(self) -> None:
        run = self.run
        if not run.summary.error_slice_count:
            return self._skip(run_pb2.STEP_KIND_PREDICTION, "no error slices")
        request = prediction_pb2.CreatePredictionRequest(parent=run.dataset, ranking=run.ranking)
        job = await self._follow(
            run_pb2.STEP_KIND_PREDICTION,
            _Call(
                lambda: self._b.prediction.CreatePrediction(request),
                lambda name: self._b.prediction.WatchPrediction(prediction_pb2.WatchPredictionRequest(name=name)),
                lambda name: self._b.prediction.CancelPrediction(prediction_pb2.CancelPredictionRequest(name=name)),
            ),
        )
        run.prediction = job.name
        found = await self._patiently(
            lambda: self._b.prediction.GetPrediction(prediction_pb2.GetPredictionRequest(name=job.name))
        )
        run.summary.predicted_slice_count = found.predicted_slice_count
        return None

    async def _selection(self) -> None:
        run, p = self.run, self.run.parameters
        record = await asyncio.to_thread(self._artifacts.dataset, run.dataset.partition("/")[2])
        if not run.summary.error_slice_count:
            return self._skip(run_pb2.STEP_KIND_SELECTION, "no error slices")
        if not record.splits.get(p.pool_split):
            return self._skip(run_pb2.STEP_KIND_SELECTION, f"no instances in the split '{p.pool_split}'")
        budget = min(p.budget, record.splits[p.pool_split])
        for method in (repair_pb2.SELECTION_METHOD_LOWEST_MEAN, repair_pb2.SELECTION_METHOD_RANDOM):
            request = repair_pb2.CreateSelectionRequest(
                parent=run.dataset,
                ranking=run.ranking,
                method=method,
                budget=budget,
                split=p.pool_split,
                seed=p.seed,
            )
            if method == repair_pb2.SELECTION_METHOD_RANDOM:
                # The random draw is a rival of the same size; the slices may have run dry before the budget.
                request.budget = max(1, run.summary.pick_count)
            job = await self._follow(
                run_pb2.STEP_KIND_SELECTION,
                _Call(
                    lambda request=request: self._b.repair.CreateSelection(request),  # type: ignore[misc]
                    lambda name: self._b.repair.WatchSelection(repair_pb2.WatchSelectionRequest(name=name)),
                    lambda name: self._b.repair.CancelSelection(repair_pb2.CancelSelectionRequest(name=name)),
                ),
            )
            run.selections.append(job.name)
            found = await self._patiently(
                lambda: self._b.repair.GetSelection(repair_pb2.GetSelectionRequest(name=job.name))  # noqa: B023
            )
            if method == repair_pb2.SELECTION_METHOD_LOWEST_MEAN:
                run.summary.pick_count = found.pick_count
        return None

    async def _report(self) -> None:
        step = self._note(run_pb2.STEP_KIND_REPORT, self.run.name)
        step.job.reused = False
        started = time.monotonic()
        await self._patiently(lambda: self._make_report(self.run))
        step.elapsed.CopyFrom(_duration(time.monotonic() - started))

    def _note(self, kind: run_pb2.StepKind.ValueType, name: str) -> run_pb2.Step:
        step = self.run.steps.add(kind=kind)
        step.job.name, step.job.state, step.job.reused = name, types_pb2.JOB_STATE_SUCCEEDED, True
        return step

    def _skip(self, kind: run_pb2.StepKind.ValueType, why: str) -> None:
        self.run.steps.add(kind=kind, skipped=why)

    async def _follow(self, kind: run_pb2.StepKind.ValueType, calls: _Call) -> types_pb2.Job:
        """Create the step's job and watch it to its end."""
        step = self.run.steps.add(kind=kind)
        started = time.monotonic()
        try:
            await self._patiently(lambda: self._watch_once(step, calls, started))
        except asyncio.CancelledError:
            if self._progress.cancelled and not self._progress.taken_over and step.job.name:
                try:
                    await calls.cancel(step.job.name)
                except grpc.aio.AioRpcError as failure:
                    log.warning("step not cancelled", job=step.job.name, error=failure.details())
            raise
        step.elapsed.CopyFrom(_duration(time.monotonic() - started))
        return step.job

    async def _patiently(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """`attempt` at the last step, made again while a service, or what it needs, is away or busy.

        Raises what the service said once the step got no further for PATIENCE_S since it first said so.
        """
        step, tried, most, since = self.run.steps[-1], 0, 0, 0.0
        while True:
            try:
                try:
                    found = await attempt()
                except grpc.aio.AioRpcError as failure:
                    raise status.error_of(failure) from failure
                if tried:
                    step.job.message = ""
                return found
            except (Unavailable, Busy) as error:
                now = time.monotonic()
                if not tried or step.job.done_count > most:
                    tried, most, since = 0, step.job.done_count, now
                wait_s = error.retry_s if isinstance(error, Busy) else min(_WAIT_S[0] * 2**tried, _WAIT_S[1])
                if now + wait_s - since > PATIENCE_S:
                    raise
                tried += 1
                log.warning("step waits", run=self.run.name, tried=tried, error=str(error))
                step.job.message = f"waits: {error}"
            await self._shelf.publish(self.run)
            await asyncio.sleep(wait_s)

    async def _watch_once(self, step: run_pb2.Step, calls: _Call, started: float) -> None:
        made = (await calls.create()).job
        # Work that this run began, and that ended while nobody watched, is not another's that it finds.
        own = self._own.get(made.name) if made.reused else None
        step.job.CopyFrom(made if own is None else own)
        if not step.job.reused:
            self._own[made.name] = step.job
            await self._shelf.save(self.run)  # for who may have to take the run over
        if made.state not in RESTING or own is not None:
            async for snapshot in calls.watch(made.name):
                if own is not None and snapshot.job.reused:  # its figures are forgotten, but for those seen here
                    step.job.state = snapshot.job.state
                else:
                    step.job.CopyFrom(snapshot.job)
                step.elapsed.CopyFrom(_duration(time.monotonic() - started))
                self._progress.step = run_pb2.StepKind.Name(step.kind).removeprefix("STEP_KIND_").lower()
                self._progress.update(step.job.done_count, step.job.total_count)
                self._count_cost()
                await self._shelf.publish(self.run)
        self._count_cost()
        if step.job.state == types_pb2.JOB_STATE_FAILED:
            raise status.error_of_problem(step.job.problem)
        if step.job.state == types_pb2.JOB_STATE_PAUSED:
            raise Paused(step.job.message)
        if step.job.state != types_pb2.JOB_STATE_SUCCEEDED:
            raise HiBug2Error(f"{step.job.name} was cancelled by someone else; resume the run to go on")

    def _count_cost(self) -> None:
        """What the steps that did something spent so far."""
        self.run.job.cost.CopyFrom(total_cost(step.job.cost for step in self.run.steps if not step.job.reused))


def total_cost(costs: Iterable[types_pb2.Cost]) -> types_pb2.Cost:
    """The sum of `costs`; an amount only where one has it, in its currency."""
    total = types_pb2.Cost()
    for cost in costs:
        for field in ("call_count", "input_token_count", "output_token_count", "invalid_answer_count"):
            setattr(total, field, getattr(total, field) + getattr(cost, field))
        if cost.HasField("amount"):
            total.amount += cost.amount
            total.currency = cost.currency
    return total


def _duration(seconds: float) -> Duration:
    out = Duration()
    out.FromMilliseconds(int(seconds * 1000))
    return out
