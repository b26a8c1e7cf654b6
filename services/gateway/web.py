"""HTTP/JSON and the pages: the gateway's gRPC contract for browsers and curl, and a page for each run.

Every call here goes through the gateway's own gRPC port, so that HTTP knows no rule that gRPC does not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import grpc
import jinja2
import pyarrow as pa
import uvicorn
from fastapi import Body, FastAPI, Header, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline
from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import BaseModel, Field

from hibug2.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    prediction_pb2,
    prediction_pb2_grpc,
    repair_pb2,
    repair_pb2_grpc,
    run_pb2,
    run_pb2_grpc,
    schema_pb2,
    schema_pb2_grpc,
    slice_pb2,
    slice_pb2_grpc,
    types_pb2,
)
from services.gateway.config import Settings
from shared import traces
from shared.errors import InvalidInput, Violation
from shared.rpc import context as call
from shared.rpc import status
from shared.rpc.arrow import send_table
from shared.rpc.channel import connect
from shared.rpc.tls import http_context
from shared.version import VERSION

_HTTP = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNAVAILABLE": 503,
}
Team = Annotated[str, Header(alias="x-hibug2-team", description="the team that asks")]
PageSize = Annotated[int, Query(ge=0, le=1000)]
Json = dict[str, Any]


class NewDataset(BaseModel):
    """A dataset with its first instances; rows have the columns of the contract's CreateDataset."""

    dataset_id: str
    task: Literal["classification", "detection", "pose"] = "classification"
    instances: list[Json] = Field(max_length=100_000)
    request_id: str = ""


class NewScores(BaseModel):
    """Scores of a model: rows with instance_id and score, or predicted_label."""

    scores: list[Json] = Field(max_length=1_000_000)
    request_id: str = ""


class NewRun(BaseModel):
    dataset: str = Field(description="datasets/{dataset}")
    model: str = Field(description="datasets/{dataset}/models/{model}")
    schema_name: str = Field("", alias="schema", description="datasets/{dataset}/schemas/{schema}")
    parameters: Json = Field(default_factory=dict, description="maxDepth, minCount, margin, budget, seed, …")
    request_id: str = ""


class Stubs:
    """The public services, reached over the gateway's own port."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.datasets = dataset_pb2_grpc.DatasetServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self.schemas = schema_pb2_grpc.SchemaServiceStub(channel)
        self.runs = run_pb2_grpc.RunServiceStub(channel)
        self.slices = slice_pb2_grpc.SliceServiceStub(channel)
        self.predictions = prediction_pb2_grpc.PredictionServiceStub(channel)
        self.repair = repair_pb2_grpc.RepairServiceStub(channel)


def make_app(stubs: Stubs) -> FastAPI:
    """The application; /docs is its OpenAPI page, whose scripts it serves itself: a cluster may have no internet."""
    app = FastAPIOffline(
        title="HiBug2", version=VERSION, description="Finds, explains and repairs the error slices of a model."
    )
    app.add_exception_handler(grpc.aio.AioRpcError, _failed)
    app.add_exception_handler(json_format.ParseError, _unreadable)

    @app.middleware("http")
    async def bind(request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        call.team.set(request.headers.get(call.TEAM_KEY, call.DEFAULT_TEAM))
        call.request_id.set(request.headers.get(call.REQUEST_KEY, "")[:64])
        parent = request.headers.get(traces.KEY, "")
        with traces.span(f"HTTP {request.method}", "server", parent=parent):
            return await handle(request)

    _add_data(app, stubs)
    _add_runs(app, stubs)
    _add_pages(app, stubs)
    return app


def _add_data(app: FastAPI, stubs: Stubs) -> None:
    @app.post("/v1/datasets", status_code=201, tags=["datasets"])
    async def create_dataset(body: NewDataset, team: Team = call.DEFAULT_TEAM) -> Json:
        header = dataset_pb2.DatasetHeader(
            dataset_id=body.dataset_id,
            task=types_pb2.Task.Value(f"TASK_{body.task.upper()}"),
            request_id=body.request_id,
        )
        parts = _upload(dataset_pb2.CreateDatasetRequest, header, _table(body.instances, "instances"))
        return _json((await stubs.datasets.CreateDataset(parts, metadata=call.outgoing())).dataset)

    @app.get("/v1/datasets", tags=["datasets"])
    async def list_datasets(page_size: PageSize = 50, page_token: str = "", team: Team = call.DEFAULT_TEAM) -> Json:
        request = dataset_pb2.ListDatasetsRequest(page_size=page_size, page_token=page_token)
        return _json(await stubs.datasets.ListDatasets(request))

    @app.get("/v1/datasets/{dataset}", tags=["datasets"])
    async def get_dataset(dataset: str, team: Team = call.DEFAULT_TEAM) -> Json:
        request = dataset_pb2.GetDatasetRequest(name=f"datasets/{dataset}")
        return _json((await stubs.datasets.GetDataset(request)).dataset)

    @app.delete("/v1/datasets/{dataset}", status_code=204, tags=["datasets"])
    async def delete_dataset(dataset: str, team: Team = call.DEFAULT_TEAM) -> None:
        await stubs.datasets.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=f"datasets/{dataset}"))

    @app.put("/v1/datasets/{dataset}/models/{model}/scores", tags=["models"])
    async def add_scores(dataset: str, model: str, body: NewScores, team: Team = call.DEFAULT_TEAM) -> Json:
        header = model_pb2.ScoresHeader(parent=f"datasets/{dataset}", model_id=model, request_id=body.request_id)
        parts = _upload(model_pb2.AddScoresRequest, header, _table(body.scores, "scores"))
        return _json((await stubs.models.AddScores(parts, metadata=call.outgoing())).model)

    @app.get("/v1/datasets/{dataset}/models", tags=["models"])
    async def list_models(
        dataset: str, page_size: PageSize = 50, page_token: str = "", team: Team = call.DEFAULT_TEAM
    ) -> Json:
        request = model_pb2.ListModelsRequest(parent=f"datasets/{dataset}", page_size=page_size, page_token=page_token)
        return _json(await stubs.models.ListModels(request))

    @app.get("/v1/datasets/{dataset}/schemas/{schema}", tags=["schemas"])
    async def get_schema(dataset: str, schema: str, team: Team = call.DEFAULT_TEAM) -> Json:
        request = schema_pb2.GetSchemaRequest(name=f"datasets/{dataset}/schemas/{schema}")
        return _json(await stubs.schemas.GetSchema(request))

    @app.post("/v1/datasets/{dataset}/schemas", status_code=201, tags=["schemas"])
    async def create_schema(dataset: str, body: Annotated[Json, Body()], team: Team = call.DEFAULT_TEAM) -> Json:
        request = schema_pb2.CreateSchemaRequest(parent=f"datasets/{dataset}")
        json_format.ParseDict(body, request.schema)
        return _json((await stubs.schemas.CreateSchema(request)).schema)


def _add_runs(app: FastAPI, stubs: Stubs) -> None:
    @app.post("/v1/runs", status_code=201, tags=["runs"])
    async def create_run(body: NewRun, team: Team = call.DEFAULT_TEAM) -> Json:
        request = run_pb2.CreateRunRequest(
            dataset=body.dataset, model=body.model, schema=body.schema_name, request_id=body.request_id
        )
        json_format.ParseDict(body.parameters, request.parameters)
        return _json((await stubs.runs.CreateRun(request)).run)

    @app.get("/v1/runs", tags=["runs"])
    async def list_runs(page_size: PageSize = 50, page_token: str = "", team: Team = call.DEFAULT_TEAM) -> Json:
        return _json(await stubs.runs.ListRuns(run_pb2.ListRunsRequest(page_size=page_size, page_token=page_token)))

    @app.get("/v1/runs/{run}", tags=["runs"])
    async def get_run(run: str, team: Team = call.DEFAULT_TEAM) -> Json:
        return _json((await stubs.runs.GetRun(run_pb2.GetRunRequest(name=f"runs/{run}"))).run)

    @app.post("/v1/runs/{run}:cancel", tags=["runs"])
    async def cancel_run(run: str, team: Team = call.DEFAULT_TEAM) -> Json:
        return _json((await stubs.runs.CancelRun(run_pb2.CancelRunRequest(name=f"runs/{run}"))).run)

    @app.post("/v1/runs/{run}:resume", tags=["runs"])
    async def resume_run(run: str, team: Team = call.DEFAULT_TEAM) -> Json:
        return _json((await stubs.runs.ResumeRun(run_pb2.ResumeRunRequest(name=f"runs/{run}"))).run)

    async def artifact(run: str, kind: str) -> str:
        found = (await stubs.runs.GetRun(run_pb2.GetRunRequest(name=f"runs/{run}"))).run
        name = found.selections[0] if kind == "selections" and found.selections else ""
        name = name or (str(getattr(found, kind)) if kind != "selections" else "")
        if not name:
            raise _Missing(f"runs/{run} has no {kind.rstrip('s')} (yet)")
        return name

    @app.get("/v1/runs/{run}/slices", tags=["slices"])
    async def list_slices(
        run: str,
        page_size: PageSize = 50,
        page_token: str = "",
        filter: str = "",
        order_by: str = "",
        team: Team = call.DEFAULT_TEAM,
    ) -> Json:
        request = slice_pb2.ListSlicesRequest(
            parent=await artifact(run, "ranking"),
            page_size=page_size,
            page_token=page_token,
            filter=filter,
            order_by=order_by,
        )
        return _json(await stubs.slices.ListSlices(request))

    @app.get("/v1/runs/{run}/predictions", tags=["slices"])
    async def list_predicted_slices(
        run: str, page_size: PageSize = 50, page_token: str = "", team: Team = call.DEFAULT_TEAM
    ) -> Json:
        request = prediction_pb2.ListPredictedSlicesRequest(
            parent=await artifact(run, "prediction"), page_size=page_size, page_token=page_token
        )
        return _json(await stubs.predictions.ListPredictedSlices(request))

    @app.get("/v1/runs/{run}/picks", tags=["repair"])
    async def list_picks(
        run: str, page_size: PageSize = 50, page_token: str = "", team: Team = call.DEFAULT_TEAM
    ) -> Json:
        request = repair_pb2.ListPicksRequest(
            parent=await artifact(run, "selections"), page_size=page_size, page_token=page_token
        )
        return _json(await stubs.repair.ListPicks(request))

    app.add_exception_handler(_Missing, lambda _, error: _error(404, "NOT_FOUND", str(error), []))


class _Missing(Exception):
    """A run that has not come to what was asked for."""


def _add_pages(app: FastAPI, stubs: Stubs) -> None:
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> Json:
        return {"status": "serving", "version": VERSION}

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def runs_page() -> str:
        answer = await stubs.runs.ListRuns(run_pb2.ListRunsRequest(page_size=200))
        return pages.get_template("runs.html.j2").render(runs=[_shown(r) for r in answer.runs])

    @app.get("/runs/{run}", response_class=HTMLResponse, include_in_schema=False)
    async def run_page(run: str) -> str:
        found = (await stubs.runs.GetRun(run_pb2.GetRunRequest(name=f"runs/{run}"))).run
        return pages.get_template("run.html.j2").render(run=_shown(found))

    @app.get("/runs/{run}/report", response_class=HTMLResponse, include_in_schema=False)
    async def report_page(run: str) -> str:
        chunks = stubs.runs.ReadReport(run_pb2.ReadReportRequest(name=f"runs/{run}"))
        return b"".join([chunk.html async for chunk in chunks]).decode()


def _shown(run: run_pb2.Run) -> Json:
    """What the pages say about a run."""
    state = types_pb2.JobState.Name(run.job.state).removeprefix("JOB_STATE_").lower()
    return {
        "id": run.name.partition("/")[2],
        "dataset": run.dataset.partition("/")[2],
        "model": run.model.rpartition("/")[2],
        "state": state,
        "done": state in ("succeeded", "failed", "cancelled"),
        "problem": run.job.problem.message,
        "violations": [(v.field, v.description) for v in run.job.problem.violations],
        "created": run.job.create_time.ToDatetime().strftime("%Y-%m-%d %H:%M UTC"),
        "steps": [_step(s) for s in run.steps],
        "summary": run.summary,
        "has_summary": run.HasField("summary"),
        "has_chance": run.summary.HasField("expected_by_chance"),
        "parameters": run.parameters,
        "has_report": state == "succeeded",
    }


def _step(step: run_pb2.Step) -> Json:
    state = types_pb2.JobState.Name(step.job.state).removeprefix("JOB_STATE_").lower()
    return {
        "name": run_pb2.StepKind.Name(step.kind).removeprefix("STEP_KIND_").lower(),
        "state": "skipped" if step.skipped else "reused" if step.job.reused else state,
        "why": step.skipped,
        "done": step.job.done_count,
        "total": step.job.total_count,
        "seconds": step.elapsed.ToMilliseconds() / 1000,
    }


def _json(message: Message) -> Json:
    found: Json = json_format.MessageToDict(message, always_print_fields_with_no_presence=True)
    return found


def _table(rows: list[Json], field: str) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise json_format.ParseError(f"{field}: rows do not make a table: {error}") from error


def _upload(kind: Any, header: Message, table: pa.Table) -> Iterator[Any]:
    yield kind(header=header)
    for chunk in send_table(table):
        yield kind(arrow=chunk)


def _error(http: int, code: str, message: str, violations: list[Violation]) -> JSONResponse:
    shown = [{"field": v.field, "description": v.description} for v in violations]
    return JSONResponse({"error": {"code": code, "message": message, "violations": shown}}, status_code=http)


async def _failed(_: Request, failure: Exception) -> Response:
    assert isinstance(failure, grpc.aio.AioRpcError)  # noqa: S101 - registered for nothing else
    error = status.error_of(failure)
    violations = list(error.violations) if isinstance(error, InvalidInput) else []
    return _error(_HTTP.get(error.code, 500), error.code, error.message, violations)


async def _unreadable(_: Request, error: Exception) -> Response:
    return _error(400, "INVALID_ARGUMENT", str(error), [])


class _Server(uvicorn.Server):
    """uvicorn beside a gRPC server, which owns the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def start_web(settings: Settings, address: str) -> Callable[[], Awaitable[None]]:
    """Serve HTTP for the gateway at `address`; returns what stops it. Nothing is served on port 0."""

    async def nothing() -> None: ...

    if settings.http_port == 0:
        return nothing
    tls = http_context(settings)
    channel = connect(address)
    server = _Server(
        uvicorn.Config(
            make_app(Stubs(channel)),
            host=settings.http_host,
            port=settings.http_port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
            ssl_context_factory=None if tls is None else lambda *_: tls,
        )
    )
    task = asyncio.create_task(server.serve())
    while not server.started:
        if task.done():
            await channel.close()
            raise OSError(f"cannot serve HTTP on port {settings.http_port} (HIBUG2_HTTP_PORT)")
        await asyncio.sleep(0.01)

    async def stop() -> None:
        server.should_exit = True
        await task
        await channel.close()

    return stop
