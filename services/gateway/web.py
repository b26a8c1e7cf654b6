"""HTTP/JSON and the pages: the gateway's gRPC contract for browsers and curl, and a page for each run.

Every call here goes through the gateway's own gRPC port, so that HTTP knows no rule that gRPC does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import grpc
import jinja2
import pyarrow as pa
import uvicorn
from fastapi import Body, FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import AfterValidator, BaseModel, Field, SkipValidation
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

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
from shared.errors import HiBug2Error, InvalidInput, Violation, invalid
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
Row = Annotated[Json, SkipValidation]  # looked at in a thread, where the table is made


def _unicode(text: str) -> str:
    text.encode()  # JSON may hold half of a surrogate pair; a ValueError, of which the caller is told
    return text


Text = Annotated[str, AfterValidator(_unicode)]
_CELL_BYTES = 4  # what a cell takes at least, as gRPC counts a table that is uploaded


class NewDataset(BaseModel):
    """A dataset with its first instances; rows have the columns of the contract's CreateDataset."""

    dataset_id: Text
    task: Literal["classification", "detection", "pose"] = "classification"
    instances: list[Row] = Field(max_length=100_000)
    request_id: Text = ""


class NewScores(BaseModel):
    """Scores of a model: rows with instance_id and score, or predicted_label."""

    scores: list[Row] = Field(max_length=1_000_000)
    request_id: Text = ""


class NewRun(BaseModel):
    dataset: Text = Field(description="datasets/{dataset}")
    model: Text = Field(description="datasets/{dataset}/models/{model}")
    schema_name: Text = Field("", alias="schema", description="datasets/{dataset}/schemas/{schema}")
    parameters: Json = Field(default_factory=dict, description="maxDepth, minCount, margin, budget, seed, …")
    request_id: Text = ""


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


class _Request(Request):
    """Reads JSON in a thread: a large body takes seconds, in which others want to be answered."""

    async def json(self) -> Any:
        # The hook is Python, so that other threads get their turn at each object; the parser alone gives none.
        return await asyncio.to_thread(json.loads, await self.body(), object_hook=lambda found: found)


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handled


class _Bounded:
    """Answers 413 to a body of more than `limit` bytes: unread where its length is told, else once so many came."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        told = Headers(scope=scope).get("content-length", "")
        refusal = _error(413, "RESOURCE_EXHAUSTED", f"body: more than {self._limit} bytes; send it in parts", [])
        if told.isdecimal() and int(told) > self._limit:
            return await refusal(scope, receive, send)
        taken, refused = 0, False

        async def take() -> Event:
            nonlocal taken, refused
            if not refused:
                event = await receive()
                taken += len(event.get("body", b""))
                if taken <= self._limit:
                    return event
                refused = True
                await refusal(scope, receive, send)
            return {"type": "http.disconnect"}  # so that nobody waits for the rest

        async def answer(event: Event) -> None:
            if not refused:
                await send(event)

        return await self._app(scope, take, answer)


def make_app(stubs: Stubs, max_upload_bytes: int) -> FastAPI:
    """The application; /docs is its OpenAPI page, whose scripts it serves itself: a cluster may have no internet.

    A body, and the table that is made of it, may take `max_upload_bytes`.
    """
    app = FastAPIOffline(
        title="HiBug2", version=VERSION, description="Finds, explains and repairs the error slices of a model."
    )
    app.router.route_class = _Route
    app.add_exception_handler(grpc.aio.AioRpcError, _failed)
    app.add_exception_handler(InvalidInput, _refused)
    app.add_exception_handler(json_format.ParseError, _unreadable)
    app.add_exception_handler(RequestValidationError, _misshapen)

    @app.middleware("http")
    async def bind(request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        call.team.set(request.headers.get(call.TEAM_KEY, call.DEFAULT_TEAM))
        call.request_id.set(request.headers.get(call.REQUEST_KEY, "")[:64])
        parent = request.headers.get(traces.KEY, "")
        with traces.span(f"HTTP {request.method}", "server", parent=parent):
            return await handle(request)

    app.add_middleware(_Bounded, limit=max_upload_bytes)
    _add_data(app, stubs, max_upload_bytes)
    _add_runs(app, stubs)
    _add_pages(app, stubs)
    return app


def _add_data(app: FastAPI, stubs: Stubs, max_upload_bytes: int) -> None:
    @app.post("/v1/datasets", status_code=201, tags=["datasets"])
    async def create_dataset(body: NewDataset, team: Team = call.DEFAULT_TEAM) -> Json:
        header = dataset_pb2.DatasetHeader(
            dataset_id=body.dataset_id,
            task=types_pb2.Task.Value(f"TASK_{body.task.upper()}"),
            request_id=body.request_id,
        )
        kind = dataset_pb2.CreateDatasetRequest
        parts = await asyncio.to_thread(_upload, kind, header, body.instances, "instances", max_upload_bytes)
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
        kind = model_pb2.AddScoresRequest
        parts = await asyncio.to_thread(_upload, kind, header, body.scores, "scores", max_upload_bytes)
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


def _table(rows: list[Json], field: str, max_bytes: int) -> pa.Table:
    """`rows` as a table with the columns of all of them, null where a row has none.

    InvalidInput names the row that is no object or the column whose values are not of one kind, or says that the
    table takes over `max_bytes`.
    """
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise invalid(f"{field}[{i}]", "is no object; give one with a member for each column")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if len(rows) * len(names) * _CELL_BYTES > max_bytes:
        text = f"{len(rows):,} rows of {len(names):,} columns take more than {max_bytes:,} bytes; send them in parts"
        raise invalid(field, text)
    columns = {}
    for name in names:
        try:
            name.encode()
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowException, OverflowError, UnicodeError) as error:
            text = f"does not make a column; give numbers of at most 64 bits, or text, in every row: {error}"
            raise invalid(f"{field}.{name}", text) from error
    return pa.table(columns)


def _upload(kind: Any, header: Message, rows: list[Json], field: str, max_bytes: int) -> Iterator[Any]:
    """The messages that send `rows`; raises as `_table`, and for values that are nested too deep."""
    table = _table(rows, field, max_bytes)
    try:
        return iter([kind(header=header), *(kind(arrow=chunk) for chunk in send_table(table))])
    except pa.ArrowException as error:
        raise invalid(field, f"cannot be sent: {error}") from error


class _Ascii(JSONResponse):
    """JSON that holds any text that came as JSON, which may be no Unicode, by its escapes."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def _error(http: int, code: str, message: str, violations: list[Violation]) -> Response:
    shown = [{"field": v.field, "description": v.description} for v in violations]
    return _Ascii({"error": {"code": code, "message": message, "violations": shown}}, status_code=http)


def _told(error: HiBug2Error) -> Response:
    violations = list(error.violations) if isinstance(error, InvalidInput) else []
    return _error(_HTTP.get(error.code, 500), error.code, error.message, violations)


async def _failed(_: Request, failure: Exception) -> Response:
    assert isinstance(failure, grpc.aio.AioRpcError)  # noqa: S101 - registered for nothing else
    return _told(status.error_of(failure))


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidInput)  # noqa: S101 - as above
    return _told(error)


async def _misshapen(_: Request, error: Exception) -> Response:
    """As FastAPI has it, without what came: that may be long, or nothing that JSON can hold."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - as above
    detail = [{key: found[key] for key in ("type", "loc", "msg")} for found in error.errors()]
    return _Ascii({"detail": detail}, status_code=422)


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
            make_app(Stubs(channel), settings.max_upload_bytes),
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
