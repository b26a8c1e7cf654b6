"""Runs over gRPC: start, watch, cancel, resume, and the report."""

from __future__ import annotations

import asyncio
import contextvars
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import grpc
from redis.asyncio import Redis
from redis.exceptions import RedisError

from hibug2.v1 import attribute_pb2, repair_pb2, tagging_pb2, types_pb2
from hibug2.v1 import run_pb2 as pb
from hibug2.v1 import run_pb2_grpc as rpc
from services.gateway.config import Settings
from services.gateway.datasets import SPLITS
from services.gateway.report.gather import Outcomes, RunRefs, gather
from services.gateway.report.model import Outcome
from services.gateway.report.render import render
from services.gateway.runs import (
    BUDGET,
    MARGIN,
    MAX_DEPTH,
    MIN_COUNT,
    POOL,
    SPLIT,
    Backends,
    Pipeline,
    RunShelf,
    run_id,
    total_cost,
)
from shared import logs
from shared.errors import HiBug2Error, NotFound, Precondition, Violation, invalid, refuse
from shared.images.reader import ImageReader
from shared.jobs import BEAT_S, DONE, RESTING, Jobs, Paused, Progress
from shared.names import Name, check_id, content_id, dataset_id, parse
from shared.rpc import context as call
from shared.rpc import status
from shared.rpc.paging import page
from shared.rpc.provenance import provenance_proto
from shared.store.artifacts import Artifacts, Provenance, teams
from shared.store.store import Store

log = logs.get("gateway.runs")
Context = grpc.aio.ServicerContext[Any, Any]
SWEEP_S = 5.0
_CHUNK = 512 * 1024
MAX_COST = 1_000_000
# How the report calls the ways of picking.
_METHODS = {repair_pb2.SELECTION_METHOD_LOWEST_MEAN: "hibug2", repair_pb2.SELECTION_METHOD_RANDOM: "random"}


class RunServicer(rpc.RunServiceServicer):
    """proto in, the pipeline as a job, proto out. Runs whose gateway died are taken over by whoever sweeps first."""

    def __init__(self, settings: Settings, redis: Redis, store: Store, backends: Backends) -> None:
        self._settings = settings
        self._store = store
        self._backends = backends
        self._shelf = RunShelf(redis, store)
        self.jobs = Jobs(redis, "run", self._is_complete)
        self._sweeper: asyncio.Task[None] | None = None

    def _artifacts(self) -> Artifacts:
        return Artifacts(self._store, call.team.get())

    async def _is_complete(self, name: str) -> bool:
        try:
            run = await self._shelf.read(name.partition("/")[2])
        except NotFound:
            return False
        return run.job.state == types_pb2.JOB_STATE_SUCCEEDED

    # Starting and going on

    async def CreateRun(self, request: pb.CreateRunRequest, context: Context) -> pb.CreateRunResponse:
        dataset = dataset_id(request.dataset, "dataset")
        model = parse(request.model, "models", "model", within=dataset)
        run = pb.Run(dataset=request.dataset, model=request.model, schema=request.schema)
        run.parameters.CopyFrom(filled(request.parameters))
        await asyncio.to_thread(self._check, run, dataset, model)
        key = content_id(request=request.request_id)[:10] if request.request_id else secrets.token_hex(5)
        run.name = f"runs/{key}"
        if await asyncio.to_thread(self._store.exists, self._run_path(key)):
            return pb.CreateRunResponse(run=await self._shelf.live(key))
        run.job.name, run.job.state = run.name, types_pb2.JOB_STATE_PENDING
        run.job.create_time.GetCurrentTime()
        await self._shelf.save(run)
        await self._start(run)
        return pb.CreateRunResponse(run=run)

    def _run_path(self, run: str) -> str:
        return self._artifacts().run_path(run, "run.json")

    def _check(self, run: pb.Run, dataset: str, model: Name) -> None:
        """Refuse at the door what a step would refuse later."""
        artifacts, p = self._artifacts(), run.parameters
        record = artifacts.dataset(dataset)
        scores = artifacts.model(dataset, model.id)
        found = parameter_faults(p)
        schema_id = parse(run.schema, "schemas", "schema", within=dataset).id if run.schema else None
        schema_id = schema_id or artifacts.current_schema_id(dataset)
        if schema_id is not None:
            attributes = len(artifacts.schema(dataset, schema_id)[0].attributes)
            if p.max_depth > attributes:
                text = f"is {p.max_depth} but the schema has {attributes} attributes; give at most that"
                found.append(Violation("parameters.max_depth", text))
        if p.split in SPLITS and not record.splits.get(p.split):
            found.append(Violation("parameters.split", f"the dataset has no '{p.split}' instances"))
        refuse(found)
        run.provenance.CopyFrom(
            provenance_proto(
                Provenance(
                    inputs={"dataset": record.digest, "scores": scores.digest},
                    parameters={
                        "max_depth": p.max_depth,
                        "min_count": p.min_count,
                        "margin": p.margin,
                        "budget": p.budget,
                        "split": p.split,
                        "pool_split": p.pool_split,
                    },
                    seed=p.seed,
                )
            )
        )

    async def _start(self, run: pb.Run) -> None:
        """Take the run through its steps here, unless another gateway is at it."""
        artifacts = self._artifacts()

        async def work(progress: Progress) -> None:
            pipeline = Pipeline(run, self._backends, self._shelf, artifacts, progress, self._write_report)
            try:
                await pipeline.execute()
                run.job.state = types_pb2.JOB_STATE_SUCCEEDED
            except Paused as pause:
                run.job.state, run.job.message = types_pb2.JOB_STATE_PAUSED, str(pause)
                raise
            except HiBug2Error as error:
                run.job.state = types_pb2.JOB_STATE_FAILED
                run.job.problem.CopyFrom(status.problem_of(error))
                raise
            except asyncio.CancelledError:
                if progress.cancelled:
                    run.job.state = types_pb2.JOB_STATE_CANCELLED
                raise
            except Exception:
                run.job.state = types_pb2.JOB_STATE_FAILED
                run.job.problem.CopyFrom(status.problem_of(HiBug2Error("internal error; see the gateway's log")))
                raise
            finally:
                if not progress.taken_over:  # else it is another's to say how it goes
                    run.job.update_time.GetCurrentTime()
                    await asyncio.shield(self._shelf.save(run))

        async def rests() -> types_pb2.Job | None:
            now = await self._shelf.read(run_id(run))  # whoever was at it has had its last word by now
            if now.job.state in RESTING:
                return now.job
            run.CopyFrom(now)
            return None

        await self.jobs.create(run.name, work, rests)

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        run = await self._shelf.read(_run_key(request.name))
        if run.job.state == types_pb2.JOB_STATE_SUCCEEDED:
            return pb.ResumeRunResponse(run=run)
        if request.HasField("max_cost"):
            if run.job.state not in RESTING and request.max_cost != run.parameters.max_cost:
                raise Precondition(
                    f"{run.name} is under way with the max_cost that its steps were given; "
                    f"cancel it ('hibug2 cancel {run_id(run)}') and resume it with another"
                )
            run.parameters.max_cost = request.max_cost
            refuse(parameter_faults(run.parameters))
        if run.job.state in RESTING:
            # Written down before the work begins: who watches now must not see the old end.
            run.job.state = types_pb2.JOB_STATE_PENDING
            run.job.ClearField("problem")
            run.job.message = ""
            await self._shelf.save(run)
        await self._start(run)
        return pb.ResumeRunResponse(run=run)

    async def EstimateRun(self, request: pb.EstimateRunRequest, context: Context) -> pb.EstimateRunResponse:
        dataset = dataset_id(request.dataset, "dataset")
        schema = request.schema
        if schema:
            parse(schema, "schemas", "schema", within=dataset)
        else:
            current = await asyncio.to_thread(self._artifacts().current_schema_id, dataset)
            schema = f"{request.dataset}/schemas/{current}" if current else ""
        steps: list[pb.StepEstimate] = []
        try:
            if not schema:
                generation = attribute_pb2.EstimateGenerationRequest(
                    generation=attribute_pb2.CreateGenerationRequest(parent=request.dataset)
                )
                made = await self._backends.attribute.EstimateGeneration(generation)
                steps.append(pb.StepEstimate(kind=pb.STEP_KIND_SCHEMA, cost=made.cost, assumption=made.assumption))
            tagging = tagging_pb2.EstimateTaggingRequest(parent=request.dataset, schema=schema)
            tagged = await self._backends.tagging.EstimateTagging(tagging)
            steps.append(pb.StepEstimate(kind=pb.STEP_KIND_TAGGING, cost=tagged.cost, assumption=tagged.assumption))
        except grpc.aio.AioRpcError as failure:
            raise status.error_of(failure) from failure
        steps = [step for step in steps if step.cost.call_count]
        return pb.EstimateRunResponse(steps=steps, total=total_cost(step.cost for step in steps))

    def start_sweeping(self) -> None:
        """From now on take over runs that say they run and that nobody works on."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        await self.jobs.close()

    async def _sweep(self) -> None:
        settled: set[tuple[str, str]] = set()
        passed: set[tuple[str, str]] = set()  # of which the log says why
        while True:
            try:
                for team in await asyncio.to_thread(teams, self._store):
                    call.team.set(team)
                    for key in await asyncio.to_thread(self._artifacts().runs):
                        if (team, key) in settled:
                            continue
                        try:
                            if await self._take_up(key) in DONE:
                                settled.add((team, key))
                        except HiBug2Error as error:
                            if (team, key) not in passed:
                                log.warning("run passed over", team=team, run=key, error=str(error))
                            passed.add((team, key))
            except (HiBug2Error, RedisError) as error:
                log.warning("sweep put off", error=str(error))
            await asyncio.sleep(SWEEP_S)

    async def _take_up(self, key: str) -> types_pb2.JobState.ValueType:
        """Go on with the run, unless it rests or somebody is at it; the state that it was found in."""
        run = await self._shelf.read(key)
        found = run.job.state
        if found not in RESTING:
            # A copy of this context, so that the job keeps this team when the sweep goes on.
            await asyncio.create_task(self._start(run), context=contextvars.copy_context())
        return found

    # Reading

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        return pb.GetRunResponse(run=await self._live(_run_key(request.name)))

    async def _live(self, key: str) -> pb.Run:
        """The live snapshot; the manifest has the last word once the run has ended."""
        kept = await self._shelf.read(key)
        return kept if kept.job.state in RESTING else await self._shelf.live(key)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        runs = []
        for key in await asyncio.to_thread(self._artifacts().runs):
            with suppress(NotFound):  # its first write failed, or is under way
                runs.append(await self._shelf.read(key))
        if request.dataset:
            dataset_id(request.dataset, "dataset")
            runs = [r for r in runs if r.dataset == request.dataset]
        runs.sort(key=lambda r: (r.job.create_time.ToNanoseconds(), r.name), reverse=True)
        chosen, token = page(runs, request.page_size, request.page_token)
        return pb.ListRunsResponse(runs=chosen, next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Context) -> pb.CancelRunResponse:
        key = _run_key(request.name)
        run = await self._shelf.read(key)
        if run.job.state not in DONE:
            try:
                await self.jobs.cancel(run.name)
            except NotFound:
                if run.job.state != types_pb2.JOB_STATE_PAUSED:  # of one that waits, Redis may have lost the job
                    raise
            run = await self._shelf.read(key)
            if run.job.state == types_pb2.JOB_STATE_PAUSED:  # nobody is at work who would write it down
                run.job.state, run.job.message = types_pb2.JOB_STATE_CANCELLED, ""
                run.job.update_time.GetCurrentTime()
                await self._shelf.save(run)
        return pb.CancelRunResponse(run=await self._live(key))

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        key = _run_key(request.name)
        last = b""
        while True:
            run = await self._live(key)
            seen = run.SerializeToString(deterministic=True)
            if seen != last:
                last = seen
                yield pb.WatchRunResponse(run=run)
            if run.job.state in RESTING:
                return
            await asyncio.sleep(BEAT_S)

    # The report

    async def _write_report(self, run: pb.Run) -> None:
        html = await asyncio.to_thread(self._render, self._artifacts(), run, Outcomes())
        await asyncio.to_thread(self._store.write, self._artifacts().run_path(run_id(run), "report.html"), html)

    def _render(self, artifacts: Artifacts, run: pb.Run, outcomes: Outcomes) -> bytes:
        refs = RunRefs(
            run=run.name,
            dataset=run.dataset.partition("/")[2],
            model=parse(run.model, "models", "model").id,
            ranking=parse(run.ranking, "rankings", "ranking"),
            prediction=parse(run.prediction, "predictions", "prediction") if run.prediction else None,
            selection=parse(run.selections[0], "selections", "selections") if run.selections else None,
        )
        return render(gather(artifacts, ImageReader(self._settings.image_prefixes), refs, outcomes)).encode()

    async def _outcomes(self, run: pb.Run, compared: Sequence[repair_pb2.ComparedModel]) -> Outcomes:
        request = repair_pb2.CompareRepairRequest(ranking=run.ranking, compared_models=compared)
        answer = await self._backends.repair.CompareRepair(request)
        rows = tuple(
            Outcome(
                method=_method(o) if o.selection else "original",
                added=o.added_count,
                overall=o.overall_mean,
                in_failing_slices=o.failing_mean,
            )
            for o in answer.outcomes
            if o.HasField("failing_mean")
        )
        return Outcomes(rows, answer.instance_count, answer.failing_count)

    async def ReadReport(self, request: pb.ReadReportRequest, context: Context) -> AsyncIterator[pb.ReadReportResponse]:
        run = await self._shelf.read(_run_key(request.name))
        if run.job.state not in DONE:
            raise Precondition(f"{run.name} has no report yet; it is written when the run ends")
        artifacts = self._artifacts()
        path = artifacts.run_path(run_id(run), "report.html")
        if run.job.state != types_pb2.JOB_STATE_SUCCEEDED:
            # Beside other models a report is made anew, of a ranking alone.
            has = bool(run.ranking) if request.compared_models else await asyncio.to_thread(self._store.exists, path)
            if not has:
                raise Precondition(f"{run.name} ended without a report; 'hibug2 resume {run_id(run)}' goes on with it")
        if request.compared_models:
            outcomes = await self._outcomes(run, request.compared_models)
            html = await asyncio.to_thread(self._render, artifacts, run, outcomes)
        else:
            html = await asyncio.to_thread(self._store.read, path)
        for start in range(0, len(html), _CHUNK):
            yield pb.ReadReportResponse(html=html[start : start + _CHUNK])


def _method(outcome: repair_pb2.RepairOutcome) -> str:
    """What the report calls the way by which an outcome's images were picked."""
    word = repair_pb2.SelectionMethod.Name(outcome.method).removeprefix("SELECTION_METHOD_")
    return _METHODS.get(outcome.method, word.lower().replace("_", " "))


def _run_key(name: str) -> str:
    prefix, _, key = name.partition("/")
    if prefix != "runs":
        raise invalid("name", f"'{name[:200]}' is not runs/{{run}}")
    return check_id(key, "name")


def filled(given: pb.RunParameters) -> pb.RunParameters:
    """`given` with every default written out."""
    out = pb.RunParameters(
        max_depth=given.max_depth if given.HasField("max_depth") else MAX_DEPTH,
        min_count=given.min_count if given.HasField("min_count") else MIN_COUNT,
        margin=given.margin if given.HasField("margin") else MARGIN,
        budget=given.budget if given.HasField("budget") else BUDGET,
        seed=given.seed,
        split=given.split or SPLIT,
        pool_split=given.pool_split or POOL,
    )
    if given.HasField("max_cost"):
        out.max_cost = given.max_cost
    return out


def parameter_faults(p: pb.RunParameters) -> list[Violation]:
    """What is wrong with parameters, whatever the dataset."""
    found = []
    if p.max_depth < 1:
        found.append(Violation("parameters.max_depth", f"is {p.max_depth}; a slice needs at least 1 pair"))
    if p.min_count < 1:
        found.append(Violation("parameters.min_count", f"is {p.min_count}; a slice needs at least 1 instance"))
    if not 0.0 <= p.margin <= 1.0:
        found.append(Violation("parameters.margin", f"is {p.margin}; give a number from 0 to 1"))
    if p.budget < 1:
        found.append(Violation("parameters.budget", f"is {p.budget}; give 1 or more"))
    if p.HasField("max_cost") and not 0 < p.max_cost <= MAX_COST:
        found.append(Violation("parameters.max_cost", f"is {p.max_cost:g}; give more than 0 and at most {MAX_COST:,}"))
    for name in ("split", "pool_split"):
        if getattr(p, name) not in SPLITS:
            found.append(Violation(f"parameters.{name}", f"'{getattr(p, name)}' is not one of {', '.join(SPLITS)}"))
    return found
