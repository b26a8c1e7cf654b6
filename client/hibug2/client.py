"""The Python client: one call for each thing that the gateway does; tables come back as Arrow tables."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import grpc
import pyarrow as pa
from google.protobuf.message import Message

from hibug2 import messages, streams, tables
from hibug2.errors import HiBug2Error, RunStopped, UserError, from_rpc
from hibug2.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    enumeration_pb2,
    enumeration_pb2_grpc,
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

DEFAULT_ADDRESS = "localhost:50051"
# Uploads and reads of whole tables: as long as they flow they are well; this only ends what hangs.
_STREAM_S = 3600.0
_PAGE = 1000
_REWATCH_S = 0.5

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.enable_retries", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
_ENDED = frozenset({types_pb2.JOB_STATE_SUCCEEDED, types_pb2.JOB_STATE_FAILED, types_pb2.JOB_STATE_CANCELLED})

RunLike = run_pb2.Run | str


def given_address(address: str | None) -> str | None:
    """The address that was named: the argument, else HIBUG2_ADDRESS; None when neither was."""
    return address or os.environ.get("HIBUG2_ADDRESS") or None


class Client:
    """A connection to a gateway; a context manager. Every method raises HiBug2Error, UserError for bad input.

    A dataset is named `bears` or `datasets/bears`; a run is `abc`, `runs/abc`, `latest` or a `Run`.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        team: str | None = None,
        token: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        """`address` defaults to HIBUG2_ADDRESS, then localhost:50051; `token` to HIBUG2_TOKEN.

        `timeout_s` bounds each call, and how long `watch` waits for a gateway that went away.
        """
        self.address = given_address(address) or DEFAULT_ADDRESS
        self._team = team
        self._token = token or os.environ.get("HIBUG2_TOKEN")
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(self.address, options=_OPTIONS)
        self._datasets = dataset_pb2_grpc.DatasetServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._schemas = schema_pb2_grpc.SchemaServiceStub(self._channel)
        self._runs = run_pb2_grpc.RunServiceStub(self._channel)
        self._slices = slice_pb2_grpc.SliceServiceStub(self._channel)
        self._predictions = prediction_pb2_grpc.PredictionServiceStub(self._channel)
        self._repair = repair_pb2_grpc.RepairServiceStub(self._channel)
        self._enumeration = enumeration_pb2_grpc.EnumerationServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight end."""
        self._channel.close()

    # Datasets

    def create_dataset(self, name: str, images: Any, task: str = "classification") -> dataset_pb2.Dataset:
        """Create a dataset from a folder of images or a manifest (CSV or Parquet path, Arrow table, DataFrame).

        `task` is classification, detection or pose. All instances are there afterwards, or nothing is.
        """
        header = dataset_pb2.DatasetHeader(
            dataset_id=name.removeprefix("datasets/"), task=_task(task), request_id=_new_id()
        )
        table = tables.as_instances(images)
        return self._upload(
            self._datasets.CreateDataset,
            dataset_pb2.CreateDatasetRequest(header=header),
            (dataset_pb2.CreateDatasetRequest(arrow=piece) for piece in streams.table_pieces(table)),
            header.request_id,
        ).dataset

    def add_instances(self, dataset: str, images: Any) -> dataset_pb2.Dataset:
        """Add instances, given as for `create_dataset`; all of them are there afterwards, or none is."""
        header = dataset_pb2.InstancesHeader(parent=_dataset_name(dataset), request_id=_new_id())
        table = tables.as_instances(images)
        return self._upload(
            self._datasets.AddInstances,
            dataset_pb2.AddInstancesRequest(header=header),
            (dataset_pb2.AddInstancesRequest(arrow=piece) for piece in streams.table_pieces(table)),
            header.request_id,
        ).dataset

    def datasets(self) -> list[dataset_pb2.Dataset]:
        """All datasets of the team."""
        return self._all(
            lambda token: dataset_pb2.ListDatasetsRequest(page_size=_PAGE, page_token=token),
            self._datasets.ListDatasets,
            lambda response: response.datasets,
        )

    def dataset(self, dataset: str) -> dataset_pb2.Dataset:
        """One dataset."""
        request = dataset_pb2.GetDatasetRequest(name=_dataset_name(dataset))
        return self._call(self._datasets.GetDataset, request).dataset

    def delete_dataset(self, dataset: str) -> None:
        """Delete a dataset and everything that was made from it; the images stay where they are."""
        self._call(self._datasets.DeleteDataset, dataset_pb2.DeleteDatasetRequest(name=_dataset_name(dataset)))

    # Models and scores

    def add_scores(self, dataset: str, model: str, scores: Any, metric: str | None = None) -> model_pb2.Model:
        """Set the scores of a model from a CSV or Parquet path, an Arrow table or a DataFrame.

        Columns: id, and score in [0, 1] or predicted (the label), optionally probabilities (a list, or columns
        prob_…) and confidence. `metric` is accuracy, iou, oks or custom. An earlier set is replaced as a whole.
        """
        kind = messages.number(types_pb2.Metric.DESCRIPTOR, metric, "metric") if metric else 0
        header = model_pb2.ScoresHeader(
            parent=_dataset_name(dataset),
            model_id=model.rpartition("/")[2],
            metric=types_pb2.Metric.ValueType(kind),
            request_id=_new_id(),
        )
        table = tables.as_scores(scores)
        return self._upload(
            self._models.AddScores,
            model_pb2.AddScoresRequest(header=header),
            (model_pb2.AddScoresRequest(arrow=piece) for piece in streams.table_pieces(table)),
            header.request_id,
        ).model

    def models(self, dataset: str) -> list[model_pb2.Model]:
        """The models of a dataset."""
        parent = _dataset_name(dataset)
        return self._all(
            lambda token: model_pb2.ListModelsRequest(parent=parent, page_size=_PAGE, page_token=token),
            self._models.ListModels,
            lambda response: response.models,
        )

    # Schemas

    def import_schema(self, dataset: str, schema: Mapping[str, Any] | str | os.PathLike[str]) -> types_pb2.Schema:
        """Store a schema, a mapping or a JSON file (YAML where PyYAML is installed); runs use it from now on."""
        data = schema if isinstance(schema, Mapping) else _read_document(Path(schema))
        request_id = _new_id()
        request = schema_pb2.CreateSchemaRequest(
            parent=_dataset_name(dataset), schema=messages.schema_from_json(data), request_id=request_id
        )
        return self._call(self._schemas.CreateSchema, request, request_id).schema

    def schema(self, dataset: str, schema: str = "current") -> types_pb2.Schema:
        """A schema of a dataset: the one that runs use, or the one of this id or name."""
        name = schema if "/" in schema else f"{_dataset_name(dataset)}/schemas/{schema}"
        return self._call(self._schemas.GetSchema, schema_pb2.GetSchemaRequest(name=name)).schema

    # Runs

    def run(
        self,
        dataset: str,
        model: str,
        *,
        depth: int = 3,
        min_count: int = 10,
        margin: float = 0.2,
        schema: Mapping[str, Any] | os.PathLike[str] | str | None = None,
        budget: int | None = None,
        seed: int = 0,
        wait: bool = True,
        on_progress: Callable[[run_pb2.Run], object] | None = None,
    ) -> run_pb2.Run:
        """Run the whole pipeline for a model, and wait for its end unless `wait` is False.

        `schema` is an id or name of a stored schema, or a mapping or Path to import first; None takes the
        dataset's own. `on_progress` gets each snapshot. Raises RunStopped when the run fails or is cancelled.
        """
        parent = _dataset_name(dataset)
        if schema is None:
            schema_name = ""
        elif isinstance(schema, str):
            schema_name = schema if "/" in schema else f"{parent}/schemas/{schema}"
        else:
            schema_name = self.import_schema(dataset, schema).name
        request_id = _new_id()
        request = run_pb2.CreateRunRequest(
            dataset=parent,
            model=model if "/" in model else f"{parent}/models/{model}",
            schema=schema_name,
            parameters=run_pb2.RunParameters(
                max_depth=depth, min_count=min_count, margin=margin, budget=budget, seed=seed
            ),
            request_id=request_id,
        )
        started = self._call(self._runs.CreateRun, request, request_id).run
        if not wait:
            return started
        latest = started
        for latest in self.watch(started):
            if on_progress is not None:
                on_progress(latest)
        if latest.job.state != types_pb2.JOB_STATE_SUCCEEDED:
            raise RunStopped(latest)
        return latest

    def runs(self, dataset: str | None = None) -> list[run_pb2.Run]:
        """The runs of a dataset, or of all, the newest first."""
        name = _dataset_name(dataset) if dataset else ""
        return self._all(
            lambda token: run_pb2.ListRunsRequest(page_size=_PAGE, page_token=token, dataset=name),
            self._runs.ListRuns,
            lambda response: response.runs,
        )

    def get_run(self, run: RunLike) -> run_pb2.Run:
        """The run as it is now."""
        return self._call(self._runs.GetRun, run_pb2.GetRunRequest(name=self._run_name(run))).run

    def watch(self, run: RunLike) -> Iterator[run_pb2.Run]:
        """Snapshots of a run until it has ended, the last one included; survives a restart of the gateway."""
        request = run_pb2.WatchRunRequest(name=self._run_name(run))
        reached, lost_at = False, 0.0
        while True:
            request_id = _new_id()
            # No deadline: a run takes as long as it takes; keepalive finds a dead connection.
            call = self._runs.WatchRun(request, metadata=self._metadata(request_id))
            try:
                for response in call:
                    reached, lost_at = True, 0.0
                    yield response.run
                    if response.run.job.state in _ENDED:
                        return
            except grpc.RpcError as failure:
                error = from_rpc(failure, request_id=request_id, address=self.address)
                lost_at = lost_at or time.monotonic()
                if error.code != "UNAVAILABLE" or not reached or time.monotonic() - lost_at > self._timeout_s:
                    raise error from failure
            finally:
                call.cancel()
            time.sleep(_REWATCH_S)

    def cancel(self, run: RunLike) -> run_pb2.Run:
        """Stop a run; steps that are done stay."""
        return self._call(self._runs.CancelRun, run_pb2.CancelRunRequest(name=self._run_name(run))).run

    def resume(self, run: RunLike) -> run_pb2.Run:
        """Go on with a run that failed, was cancelled or lost its gateway. Returns at once; `watch` follows it."""
        return self._call(self._runs.ResumeRun, run_pb2.ResumeRunRequest(name=self._run_name(run))).run

    def report(self, run: RunLike, compared: Mapping[str, str] | None = None) -> bytes:
        """The report of a run, one self-contained HTML file.

        `compared` names models that were trained with the run's picks, each with the method of its picks; they
        are shown beside the run's own model, as in `compare_repair`.
        """
        found = self.get_run(run)
        request = run_pb2.ReadReportRequest(name=found.name, compared_models=self._compared(found, compared or {}))
        return b"".join(response.html for response in self._read(self._runs.ReadReport, request))

    # Results

    def slices(
        self,
        run: RunLike,
        *,
        filter: str | None = None,
        order_by: str | None = None,
        limit: int | None = None,
    ) -> pa.Table:
        """The error slices of a run, or all slices of a ranking or enumeration named `datasets/…`.

        `filter` joins terms by AND over depth, count, mean, drop, parent_drop, error_share (< <= > >= =) and
        attribute, tag (=): 'count >= 20 AND tag = "dark"'. `order_by` is a field, then "desc" for largest first.
        Columns: rank, tags (list of struct attribute, tag), count, scored_count, mean, drop, parent_drop,
        error_share, interval_low, interval_high.
        """
        parent = run if isinstance(run, str) and run.startswith("datasets/") else self._part(run, "ranking")
        if order_by is None and limit is None:
            request = slice_pb2.ReadSlicesRequest(parent=parent, filter=filter or "")
            with self._arrow(self._slices.ReadSlices, request) as reader:
                return _slice_columns(reader.read_all())
        size = _PAGE if limit is None else max(1, min(limit, _PAGE))
        pages = self._pages(
            lambda token: slice_pb2.ListSlicesRequest(
                parent=parent, page_size=size, page_token=token, filter=filter or "", order_by=order_by or ""
            ),
            self._slices.ListSlices,
        )
        return _gather((messages.slices_batch(page.slices) for page in pages), messages.SLICES, limit)

    def slice_instances(self, run: RunLike, tags: Mapping[str, str]) -> list[str]:
        """The ids of the instances that have all of `tags` (attribute to tag)."""
        parent = run if isinstance(run, str) and run.startswith("datasets/") else self._part(run, "ranking")
        pairs = [types_pb2.AttributeTag(attribute=a, tag=t) for a, t in tags.items()]
        return self._all(
            lambda token: slice_pb2.ListSliceInstancesRequest(
                parent=parent, tags=pairs, page_size=_PAGE, page_token=token
            ),
            self._slices.ListSliceInstances,
            lambda response: response.instance_ids,
        )

    def predicted(self, run: RunLike) -> pa.Table:
        """The predicted slices of a run.

        Columns: rank, tags, score, method, origin_ranks (of the error slices), replaced (the pair), similarity.
        Empty when the run left prediction out.
        """
        parent = self._part(run, "prediction", empty_when_skipped=True)
        if not parent:
            return messages.PREDICTED.empty_table()
        pages = self._pages(
            lambda token: prediction_pb2.ListPredictedSlicesRequest(parent=parent, page_size=_PAGE, page_token=token),
            self._predictions.ListPredictedSlices,
        )
        return _gather((messages.predicted_batch(p.predicted_slices) for p in pages), messages.PREDICTED)

    def picks(self, run: RunLike, method: str = "lowest_mean") -> pa.Table:
        """The pool instances that a run picked to train on, or (method="random") the random draw beside them.

        Columns: instance_id, image_uri, slice_rank, slice_mean. Empty when the run left selection out.
        """
        found = self._finished(run, "selections", empty_when_skipped=True)
        selection = self._selection(found, method)
        return self._picks_of(selection) if selection else messages.PICKS.empty_table()

    def compare_repair(self, run: RunLike, models: Mapping[str, str], split: str = "test") -> pa.Table:
        """What training with the picks of a run brought, on the scored instances of `split`.

        `models` maps each model that was trained again to the method of its picks (lowest_mean or random). The
        first row is the run's own model, with the method "original"; the others follow in their order. Columns:
        model, method, added_count, and the means overall_mean, failing_mean (instances in at least one error
        slice), other_mean (the others); null where there is no such instance.
        """
        found = self._finished(run, "ranking")
        request = repair_pb2.CompareRepairRequest(
            ranking=found.ranking, compared_models=self._compared(found, models), split=split
        )
        outcomes = self._call(self._repair.CompareRepair, request).outcomes
        return pa.Table.from_batches([messages.outcomes_batch(outcomes)])

    def _compared(self, run: run_pb2.Run, models: Mapping[str, str]) -> list[repair_pb2.ComparedModel]:
        compared = []
        for model, method in models.items():
            selection = self._selection(run, method)
            if not selection:
                raise UserError("method", f"{run.name} has no {method} picks that '{model}' could be trained with")
            name = model if "/" in model else f"{run.dataset}/models/{model}"
            compared.append(repair_pb2.ComparedModel(model=name, selection=selection))
        return compared

    def _selection(self, run: run_pb2.Run, method: str) -> str | None:
        """The name of the run's selection by `method`; None when it has none."""
        wanted = messages.number(repair_pb2.SelectionMethod.DESCRIPTOR, method, "method")
        for name in run.selections:
            selection = self._call(self._repair.GetSelection, repair_pb2.GetSelectionRequest(name=name))
            if selection.method == wanted:
                return name
        return None

    def _picks_of(self, selection: str) -> pa.Table:
        pages = self._pages(
            lambda token: repair_pb2.ListPicksRequest(parent=selection, page_size=_PAGE, page_token=token),
            self._repair.ListPicks,
        )
        return _gather((messages.picks_batch(p.picks) for p in pages), messages.PICKS)

    # Tables of anyone

    def enumerate(self, table: Any, scores: Sequence[str], depth: int = 3, min_count: int = 10) -> pa.Table:
        """The slices of a table (CSV or Parquet path, Arrow table, DataFrame) that needs no dataset.

        Every column that is not in `scores` is an attribute, every distinct value a tag, empty is unknown.
        Columns: tags, count, and <score>_count, <score>_mean for each score.
        """
        return pa.Table.from_batches(
            self.enumerate_batches(table, scores, depth, min_count), messages.enumeration_schema(scores)
        )

    def enumerate_batches(
        self, table: Any, scores: Sequence[str], depth: int = 3, min_count: int = 10
    ) -> Iterator[pa.RecordBatch]:
        """As `enumerate`, batch by batch, for results that memory should not hold at once."""
        prepared = tables.as_attributes(table, scores)
        header = enumeration_pb2.TableHeader(score_columns=scores, min_count=min_count, max_depth=depth)

        def requests() -> Iterator[enumeration_pb2.EnumerateTableRequest]:
            yield enumeration_pb2.EnumerateTableRequest(header=header)
            for piece in streams.table_pieces(prepared):
                yield enumeration_pb2.EnumerateTableRequest(arrow=piece)

        wanted = messages.enumeration_schema(scores)
        with self._arrow(self._enumeration.EnumerateTable, requests()) as reader:
            for batch in reader:
                yield from pa.Table.from_batches([batch]).select(wanted.names).cast(wanted).to_batches()

    # Calls

    def _metadata(self, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
        found: list[tuple[str, str | bytes]] = [("x-request-id", request_id)]
        if self._team:
            found.append(("x-hibug2-team", self._team))
        if self._token:
            found.append(("authorization", f"Bearer {self._token}"))
        return tuple(found)

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        request_id: str = "",
    ) -> _Response:
        request_id = request_id or _new_id()
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata(request_id))
        except grpc.RpcError as failure:
            raise from_rpc(failure, request_id=request_id, address=self.address) from failure

    def _upload(
        self,
        method: grpc.StreamUnaryMultiCallable[_Request, _Response],
        header: _Request,
        pieces: Iterable[_Request],
        request_id: str,
    ) -> _Response:
        def requests() -> Iterator[_Request]:
            yield header
            yield from pieces

        try:
            return method(requests(), timeout=_STREAM_S, metadata=self._metadata(request_id))
        except grpc.RpcError as failure:
            raise from_rpc(failure, request_id=request_id, address=self.address) from failure

    def _read(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        request_id = _new_id()
        call = method(request, timeout=_STREAM_S, metadata=self._metadata(request_id))
        try:
            yield from call
        except grpc.RpcError as failure:
            raise from_rpc(failure, request_id=request_id, address=self.address) from failure
        finally:
            call.cancel()

    def _arrow(self, method: Callable[..., Any], request: Any) -> pa.RecordBatchReader:
        pieces = (response.arrow for response in self._read(method, request))
        try:
            return streams.open_pieces(pieces)
        except pa.ArrowInvalid as error:
            raise HiBug2Error(f"{self.address} sent no readable table: {error}", code="DATA_LOSS") from error

    def _pages(
        self,
        make: Callable[[str], Any],
        method: Callable[..., Any],
    ) -> Iterator[Any]:
        token, call = "", cast("Callable[..., Any]", self._call)
        while True:
            page = call(method, make(token))
            yield page
            token = page.next_page_token
            if not token:
                return

    def _all(self, make: Callable[[str], Any], method: Callable[..., Any], items: Callable[[Any], Any]) -> list[Any]:
        return [item for page in self._pages(make, method) for item in items(page)]

    # Names

    def _run_name(self, run: RunLike) -> str:
        if isinstance(run, run_pb2.Run):
            return run.name
        if run != "latest":
            return run if run.startswith("runs/") else f"runs/{run}"
        newest = self._call(self._runs.ListRuns, run_pb2.ListRunsRequest(page_size=1)).runs
        if not newest:
            raise UserError("run", "there is no run yet; start one with `hibug2 run DATASET --model MODEL`")
        return newest[0].name

    def _finished(self, run: RunLike, part: str, *, empty_when_skipped: bool = False) -> run_pb2.Run:
        """The run when it has `part`; FAILED_PRECONDITION when that step is still to come."""
        if isinstance(run, run_pb2.Run) and getattr(run, part):
            return run
        found = self.get_run(run)
        ended_well = found.job.state == types_pb2.JOB_STATE_SUCCEEDED
        if not getattr(found, part) and not (empty_when_skipped and ended_well):
            raise HiBug2Error(
                f"{found.name} has no {part} yet: it is {messages.word(types_pb2.JobState.DESCRIPTOR, found.job.state)}"
                f"; `hibug2 watch {found.name}` follows it",
                code="FAILED_PRECONDITION",
                reason="PRECONDITION",
            )
        return found

    def _part(self, run: RunLike, part: str, *, empty_when_skipped: bool = False) -> str:
        return str(getattr(self._finished(run, part, empty_when_skipped=empty_when_skipped), part))


def _new_id() -> str:
    return uuid.uuid4().hex


def _dataset_name(dataset: str) -> str:
    return dataset if dataset.startswith("datasets/") else f"datasets/{dataset}"


def _task(task: str) -> types_pb2.Task.ValueType:
    return types_pb2.Task.ValueType(messages.number(types_pb2.Task.DESCRIPTOR, task, "task"))


def _gather(batches: Iterable[pa.RecordBatch], schema: pa.Schema, limit: int | None = None) -> pa.Table:
    taken: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        taken.append(batch)
        rows += batch.num_rows
        if limit is not None and rows >= limit:
            break
    return pa.Table.from_batches(taken, schema).slice(0, limit)


def _slice_columns(table: pa.Table) -> pa.Table:
    """A slice stream in the columns of SLICES; what a stream does not carry is null."""
    if "scored" in table.column_names:
        table = table.rename_columns({"scored": "scored_count"})
    return pa.table(
        {
            field.name: table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in messages.SLICES
        },
        schema=messages.SLICES,
    )


def _read_document(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from error
    if path.suffix in {".yaml", ".yml"}:
        try:
            import yaml
        except ImportError as error:
            raise UserError(str(path), "needs PyYAML (`pip install pyyaml`); or give JSON") from error
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(str(path), f"is not YAML: {error}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(str(path), f"is not JSON: {error}") from error
