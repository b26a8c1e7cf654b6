# ruff: noqa: N802  (methods are named as the contract names them)
"""A small gateway on a real socket: keeps what it is sent, answers from memory, fails when told to."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
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

PIECE = 1 << 20
RANKING = "datasets/bears/rankings/r1"


def refuse(context, code, message, reason="", violations=()):
    """End the call as the platform does: status details in the trailers."""
    status = status_pb2.Status(code=code.value[0], message=message)
    details = [error_details_pb2.ErrorInfo(reason=reason or code.name, metadata={"limit": "7"})]
    if violations:
        bad = error_details_pb2.BadRequest()
        for field, description in violations:
            bad.field_violations.add(field=field, description=description)
        details.append(bad)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


def job(state, **figures):
    return types_pb2.Job(state=state, create_time=Timestamp(seconds=1_700_000_000), **figures)


def a_slice(rank):
    return slice_pb2.Slice(
        rank=rank,
        tags=[types_pb2.AttributeTag(attribute="[bold]brightness", tag=f"dark{rank}")],
        instance_count=10 + rank,
        score=slice_pb2.SliceScore(scored_count=10 + rank, mean=0.25, drop=0.5, error_share=0.125),
    )


class Gateway(
    dataset_pb2_grpc.DatasetServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    schema_pb2_grpc.SchemaServiceServicer,
    run_pb2_grpc.RunServiceServicer,
    slice_pb2_grpc.SliceServiceServicer,
    prediction_pb2_grpc.PredictionServiceServicer,
    repair_pb2_grpc.RepairServiceServicer,
    enumeration_pb2_grpc.EnumerationServiceServicer,
):
    def __init__(self):
        self.datasets = {}
        self.tables = []
        self.piece_bytes = []
        self.requests = []
        self.metadata = []
        self.schemas = {}
        self.watches = []  # what each WatchRun call does: a list of snapshots, an exception code to end with
        self.runs = {}
        self.slice_count = 3
        self.dictionary_tags = False
        self.faults = []  # gRPC codes with which the next calls fail before they reach a service
        self.watching = threading.Event()

    def _enter(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.faults:
            context.abort(self.faults.pop(0), "told to fail")

    def _receive(self, parts, context):
        first = next(parts)
        self._enter(first.header, context)
        pieces = [part.arrow for part in parts]
        self.piece_bytes += [len(piece) for piece in pieces]
        table = pa.ipc.open_stream(b"".join(pieces)).read_all()
        self.tables.append(table)
        return first.header, table

    def CreateDataset(self, parts, context):
        header, table = self._receive(parts, context)
        if header.dataset_id in self.datasets:
            refuse(context, grpc.StatusCode.ALREADY_EXISTS, f"there is a dataset '{header.dataset_id}'")
        splits = [
            dataset_pb2.SplitCount(split=s["values"], instance_count=s["counts"])
            for s in table["split"].value_counts().to_pylist()
        ]
        dataset = dataset_pb2.Dataset(
            name=f"datasets/{header.dataset_id}", task=header.task, instance_count=table.num_rows, splits=splits
        )
        self.datasets[header.dataset_id] = dataset
        return dataset_pb2.CreateDatasetResponse(dataset=dataset)

    def AddInstances(self, parts, context):
        header, table = self._receive(parts, context)
        dataset = self.datasets[header.parent.removeprefix("datasets/")]
        dataset.instance_count += table.num_rows
        return dataset_pb2.AddInstancesResponse(dataset=dataset)

    def _dataset(self, name, context):
        found = self.datasets.get(name.removeprefix("datasets/"))
        if found is None:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"there is no {name}")
        return found

    def GetDataset(self, request, context):
        self._enter(request, context)
        return dataset_pb2.GetDatasetResponse(dataset=self._dataset(request.name, context))

    def ListDatasets(self, request, context):
        self._enter(request, context)
        # One a page, so that every list is paged.
        names = sorted(self.datasets)
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(names) else ""
        page = [self.datasets[n] for n in names[at : at + 1]]
        return dataset_pb2.ListDatasetsResponse(datasets=page, next_page_token=more)

    def DeleteDataset(self, request, context):
        self._enter(request, context)
        self._dataset(request.name, context)
        del self.datasets[request.name.removeprefix("datasets/")]
        return dataset_pb2.DeleteDatasetResponse()

    def AddScores(self, parts, context):
        header, table = self._receive(parts, context)
        if "score" in table.column_names and pc.max(table["score"]).as_py() > 1:
            text = "must lie in [0, 1]; row 1 has 1.5"
            violations = [("score", text)]
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, f"score: {text}", "INVALID_INPUT", violations)
        model = model_pb2.Model(name=f"{header.parent}/models/{header.model_id}", scored_count=table.num_rows)
        return model_pb2.AddScoresResponse(model=model)

    def ListModels(self, request, context):
        self._enter(request, context)
        model = model_pb2.Model(name=f"{request.parent}/models/v1", scored_count=4, mean_score=0.5)
        return model_pb2.ListModelsResponse(models=[model])

    def CreateSchema(self, request, context):
        self._enter(request, context)
        request.schema.name = f"{request.parent}/schemas/s{len(self.schemas)}"
        self.schemas[request.schema.name] = request.schema
        self.schemas[f"{request.parent}/schemas/current"] = request.schema
        return schema_pb2.CreateSchemaResponse(schema=request.schema)

    def GetSchema(self, request, context):
        self._enter(request, context)
        if request.name not in self.schemas:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"there is no {request.name}")
        return schema_pb2.GetSchemaResponse(schema=self.schemas[request.name])

    def add_run(self, run_id="abc", state=types_pb2.JOB_STATE_SUCCEEDED, **fields):
        run = run_pb2.Run(
            name=f"runs/{run_id}", dataset="datasets/bears", model="datasets/bears/models/v1", job=job(state)
        )
        if state == types_pb2.JOB_STATE_SUCCEEDED:
            run.ranking = RANKING
            run.prediction = "datasets/bears/predictions/p1"
            run.selections.extend(["datasets/bears/selections/s1", "datasets/bears/selections/s2"])
            run.summary.CopyFrom(
                run_pb2.RunSummary(overall_mean=0.75, instance_count=100, slice_count=40, error_slice_count=3)
            )
        for name, value in fields.items():
            setattr(run, name, value)
        self.runs[run.name] = run
        return run

    def step(self, kind, state, **figures):
        return run_pb2.Step(kind=kind, job=job(state, **figures), elapsed=Duration(seconds=2))

    def CreateRun(self, request, context):
        self._enter(request, context)
        run = self.add_run("abc", types_pb2.JOB_STATE_PENDING)
        return run_pb2.CreateRunResponse(run=run)

    def _run(self, name, context):
        if name not in self.runs:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"there is no {name}")
        return self.runs[name]

    def GetRun(self, request, context):
        self._enter(request, context)
        return run_pb2.GetRunResponse(run=self._run(request.name, context))

    def ListRuns(self, request, context):
        self._enter(request, context)
        newest = sorted(self.runs.values(), key=lambda r: r.job.create_time.seconds, reverse=True)
        return run_pb2.ListRunsResponse(runs=newest[: request.page_size])

    def CancelRun(self, request, context):
        self._enter(request, context)
        run = self._run(request.name, context)
        run.job.state = types_pb2.JOB_STATE_CANCELLED
        return run_pb2.CancelRunResponse(run=run)

    def ResumeRun(self, request, context):
        self._enter(request, context)
        return run_pb2.ResumeRunResponse(run=self._run(request.name, context))

    def WatchRun(self, request, context):
        self._enter(request, context)
        self._run(request.name, context)
        for step in self.watches.pop(0):
            if isinstance(step, grpc.StatusCode):
                context.abort(step, "told to fail")
            elif isinstance(step, threading.Event):
                if context.add_callback(step.set):
                    self.watching.set()
                    step.wait(30)
            else:
                self.runs[request.name] = step
                yield run_pb2.WatchRunResponse(run=step)

    def ReadReport(self, request, context):
        self._enter(request, context)
        for part in (b"<html>", b"caf\xc3\xa9", b"</html>"):
            yield run_pb2.ReadReportResponse(html=part)

    def ListSlices(self, request, context):
        self._enter(request, context)
        at = int(request.page_token or 0)
        page = [a_slice(at + i + 1) for i in range(min(request.page_size, 2, self.slice_count - at))]
        more = str(at + len(page)) if at + len(page) < self.slice_count else ""
        return slice_pb2.ListSlicesResponse(slices=page, next_page_token=more, total_count=self.slice_count)

    def ReadSlices(self, request, context):
        self._enter(request, context)
        from hibug2 import messages

        table = pa.Table.from_batches([messages.slices_batch(map(a_slice, range(1, self.slice_count + 1)))])
        for piece in self._stream(table):
            yield slice_pb2.ReadSlicesResponse(arrow=piece)

    def _stream(self, table):
        if self.dictionary_tags:
            coded = pa.dictionary(pa.int32(), pa.string())
            kind = pa.list_(pa.struct([("attribute", coded), ("tag", coded)]))
            table = table.set_column(table.column_names.index("tags"), "tags", table["tags"].cast(kind))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=2):
                writer.write_batch(batch)
        data = sink.getvalue().to_pybytes()
        yield from (data[i : i + 97] for i in range(0, len(data), 97))

    def ListSliceInstances(self, request, context):
        self._enter(request, context)
        at = int(request.page_token or 0)
        return slice_pb2.ListSliceInstancesResponse(
            instance_ids=[f"i{at}"], next_page_token=str(at + 1) if at < 2 else "", total_count=3
        )

    def ListPredictedSlices(self, request, context):
        self._enter(request, context)
        pair = types_pb2.AttributeTag(attribute="colour", tag="crimson")
        predicted = prediction_pb2.PredictedSlice(
            rank=1,
            tags=[pair],
            score=0.5,
            method=prediction_pb2.PREDICTION_METHOD_TAG_SUBSTITUTION,
            origin_ranks=[2, 1],
            replaced=types_pb2.AttributeTag(attribute="colour", tag="red"),
            similarity=0.875,
        )
        return prediction_pb2.ListPredictedSlicesResponse(predicted_slices=[predicted])

    def GetSelection(self, request, context):
        self._enter(request, context)
        random = request.name.endswith("s2")
        return repair_pb2.GetSelectionResponse(method=repair_pb2.SelectionMethod.ValueType(2 if random else 1))

    def ListPicks(self, request, context):
        self._enter(request, context)
        rank = 0 if request.parent.endswith("s2") else 1
        picks = [repair_pb2.Pick(instance_id="p1", image_uri="file:///p1.png", slice_rank=rank, slice_mean=0.25)]
        return repair_pb2.ListPicksResponse(picks=picks)

    def CompareRepair(self, request, context):
        self._enter(request, context)
        outcomes = [repair_pb2.RepairOutcome(model="datasets/bears/models/v1", overall_mean=0.5, failing_mean=0.25)]
        for c in request.compared_models:
            method = repair_pb2.SelectionMethod.ValueType(2 if c.selection.endswith("s2") else 1)
            outcome = repair_pb2.RepairOutcome(model=c.model, selection=c.selection, method=method, added_count=9)
            outcomes.append(outcome)
        return repair_pb2.CompareRepairResponse(outcomes=outcomes)

    def EnumerateTable(self, parts, context):
        """Slices of one pair only: enough to see that tags and scores arrive and results come back."""
        header, table = self._receive(parts, context)
        rows = []
        for name in table.column_names:
            if name in header.score_columns:
                continue
            for tag in pc.unique(table[name]).drop_null().to_pylist():
                extent = table.filter(pc.equal(table[name], tag))
                row = {"tags": [{"attribute": name, "tag": tag}], "count": extent.num_rows}
                for score in header.score_columns:
                    row[f"{score}_count"] = extent.num_rows - extent[score].null_count
                    row[f"{score}_mean"] = pc.mean(extent[score]).as_py()
                if row["count"] >= header.min_count:
                    rows.append(row)
        if len(rows) > 100:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many slices; raise --min-count", "TOO_LARGE")
        fields = [("tags", pa.list_(pa.struct([("attribute", pa.string()), ("tag", pa.string())])))]
        fields.append(("count", pa.int64()))
        for score in header.score_columns:
            fields += [(f"{score}_count", pa.int64()), (f"{score}_mean", pa.float64())]
        for piece in self._stream(pa.Table.from_pylist(rows, pa.schema(fields))):
            yield enumeration_pb2.EnumerateTableResponse(arrow=piece)


@pytest.fixture
def gateway():
    served = Gateway()
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        for module, name in (
            (dataset_pb2_grpc, "Dataset"),
            (model_pb2_grpc, "Model"),
            (schema_pb2_grpc, "Schema"),
            (run_pb2_grpc, "Run"),
            (slice_pb2_grpc, "Slice"),
            (prediction_pb2_grpc, "Prediction"),
            (repair_pb2_grpc, "Repair"),
            (enumeration_pb2_grpc, "Enumeration"),
        ):
            getattr(module, f"add_{name}ServiceServicer_to_server")(served, server)
        served.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield served
        server.stop(None).wait()


@pytest.fixture
def client(gateway):
    from hibug2 import Client

    with Client(gateway.address, timeout_s=10) as connected:
        yield connected
