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
    """Slices of rank 2 were not tested."""
    tag = types_pb2.AttributeTag(attribute="[bold]brightness", tag=f"dark{rank}")
    score = slice_pb2.SliceScore(scored_count=10 + rank, mean=0.25, drop=0.5, error_share=0.125, family_rank=1)
    score.blame.add(tag=tag, drop=0.5)
    if rank != 2:
        score.p_value, score.q_value = 0.0001, 0.01
    return slice_pb2.Slice(rank=rank, tags=[tag], instance_count=10 + rank, score=score)


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
        self.models = {}  # dataset to model to digest of its scores; where nothing is said there is v1
        self.run_ids = []  # of the runs that CreateRun makes; abc when empty
        self.tagged = "then"  # changes when the tags of a dataset do
        self.slice_count = 3
        self.verdict = slice_pb2.CheckGateResponse(passed=True, summary="passed: nothing fell", compared_slice_count=9)
        self.dictionary_tags = False
        self.streamed = None  # the columns of a slice stream; all when None
        self.faults = []  # gRPC codes with which the next calls fail before they reach a service
        self.watching = threading.Event()
        self.problem = None  # with which a prediction or a selection fails

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
        models = [
            model_pb2.Model(name=f"{request.parent}/models/{model}", scored_count=4, mean_score=0.5, digest=digest)
            for model, digest in self.models.get(request.parent, {"v1": "s1"}).items()
        ]
        return model_pb2.ListModelsResponse(models=models)

    def CreateSchema(self, request, context):
        self._enter(request, context)
        for i, attribute in enumerate(request.schema.attributes):
            if len(set(attribute.tags)) < len(attribute.tags):
                wrong = (f"schema.attributes[{i}].tags", f"'{attribute.attribute}' has a tag twice")
                refuse(context, grpc.StatusCode.INVALID_ARGUMENT, ": ".join(wrong), "INVALID_INPUT", [wrong])
        request.schema.name = f"{request.parent}/schemas/s{len(self.schemas)}"
        self.schemas[request.schema.name] = request.schema
        self.schemas[f"{request.parent}/schemas/current"] = request.schema
        return schema_pb2.CreateSchemaResponse(schema=request.schema)

    def GetSchema(self, request, context):
        self._enter(request, context)
        if request.name not in self.schemas:
            refuse(context, grpc.StatusCode.NOT_FOUND, f"there is no {request.name}")
        return schema_pb2.GetSchemaResponse(schema=self.schemas[request.name])

    def ListSchemas(self, request, context):
        self._enter(request, context)
        kept = [s for name, s in self.schemas.items() if name == s.name and name.startswith(f"{request.parent}/")]
        at = int(request.page_token or 0)
        more = str(at + 1) if at + 1 < len(kept) else ""
        return schema_pb2.ListSchemasResponse(schemas=kept[at : at + 1], next_page_token=more)

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

    def add_ranked_run(self, run_id, model, depth=3, seconds=0, scores="s1", instances="d1"):
        """A run that succeeded, of the instances and scores with these digests; its slices are those of its depth."""
        run = self.add_run(
            run_id,
            model=f"datasets/bears/models/{model}",
            ranking=f"datasets/bears/rankings/{run_id}",
            enumeration=f"datasets/bears/enumerations/s0-{depth}-10-{self.tagged}",
            schema="datasets/bears/schemas/s0",
        )
        run.parameters.CopyFrom(run_pb2.RunParameters(max_depth=depth, min_count=10, margin=0.2, seed=7))
        run.provenance.inputs.add(input="dataset", digest=instances)
        run.provenance.inputs.add(input="scores", digest=scores)
        run.job.create_time.seconds += seconds
        return run

    def add_models(self, **digests):
        """The dataset bears, with models and the digests of their scores."""
        self.datasets["bears"] = dataset_pb2.Dataset(name="datasets/bears", digest="d1")
        self.models["datasets/bears"] = digests

    def step(self, kind, state, **figures):
        return run_pb2.Step(kind=kind, job=job(state, **figures), elapsed=Duration(seconds=2))

    def CreateRun(self, request, context):
        self._enter(request, context)
        run = self.add_run(self.run_ids.pop(0) if self.run_ids else "abc", types_pb2.JOB_STATE_PENDING)
        run.model, run.schema = request.model, request.schema
        run.parameters.CopyFrom(request.parameters)
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
        wanted = [r for r in self.runs.values() if r.dataset == request.dataset or not request.dataset]
        newest = sorted(wanted, key=lambda r: r.job.create_time.seconds, reverse=True)
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
        run = self._run(request.name, context)
        if not self.watches:
            run.job.state = types_pb2.JOB_STATE_SUCCEEDED
            p = run.parameters
            schema = run.schema.rpartition("/")[2] or "current"
            run.ranking = f"{run.dataset}/rankings/{run.name.partition('/')[2]}"
            run.enumeration = f"{run.dataset}/enumerations/{schema}-{p.max_depth}-{p.min_count}-{self.tagged}"
            yield run_pb2.WatchRunResponse(run=run)
            return
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
        for piece in self._stream(table.select(self.streamed or table.column_names)):
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

    def ListFamilies(self, request, context):
        self._enter(request, context)
        at = int(request.page_token or 0)
        places = range(at, min(self.slice_count, at + min(2, request.page_size)))
        families = [
            slice_pb2.Family(
                representative=a_slice(2 * i + 1),
                member_ranks=[2 * i + 1, 2 * i + 2],
                cover_rank=i + 1,
                covered_share=0.5,
            )
            for i in places
        ]
        if at + len(families) == self.slice_count and families:
            families[-1].cover_rank = 0
        more = str(at + len(families)) if at + len(families) < self.slice_count else ""
        return slice_pb2.ListFamiliesResponse(families=families, next_page_token=more, total_count=self.slice_count)

    def EvaluateHypothesis(self, request, context):
        self._enter(request, context)
        if request.terms[0].attribute == "nothing":
            return slice_pb2.EvaluateHypothesisResponse(instance_count=4)
        score = slice_pb2.SliceScore(
            scored_count=20, mean=0.5, drop=0.25, error_share=0.1, interval_low=0.4, interval_high=0.6, p_value=0.015625
        )
        return slice_pb2.EvaluateHypothesisResponse(instance_count=30, score=score)

    def CompareModels(self, request, context):
        self._enter(request, context)
        answer = slice_pb2.CompareModelsResponse(average_overlap=0.5)
        for i, first in enumerate(request.rankings):
            for second in request.rankings[i + 1 :]:
                answer.overlaps.add(first=first, second=second, share=0.5)
        if len(request.rankings) == 2:
            fell = slice_pb2.SliceDifference(
                tags=a_slice(1).tags,
                instance_count=12,
                paired_count=11,
                first_mean=0.75,
                second_mean=0.5,
                difference=-0.25,
            )
            answer.worse.add(q_value=0.01).MergeFrom(fell)
            answer.versions.add(change=slice_pb2.VERSION_CHANGE_REGRESSED).MergeFrom(fell)
            answer.changes.add(change=slice_pb2.VERSION_CHANGE_FIXED, slice_count=1200)
            answer.changes.add(change=slice_pb2.VERSION_CHANGE_REGRESSED, slice_count=1)
        return answer

    def CheckGate(self, request, context):
        self._enter(request, context)
        return self.verdict

    def forbid(self):
        """From now on the gate forbids: the overall mean fell, and one slice's."""
        figures = {"baseline_mean": 0.75, "candidate_mean": 0.5, "max_drop": 0.05, "paired_count": 11}
        self.verdict = slice_pb2.CheckGateResponse(
            summary="failed: the whole dataset; and 1 more",
            compared_slice_count=1234,
            judged_slice_count=7,
            violations=[
                slice_pb2.GateViolation(reason="the whole dataset: fell from 0.750 to 0.500", **figures),
                slice_pb2.GateViolation(tags=a_slice(1).tags, q_value=0.01, reason="[bold]brightness: fell", **figures),
            ],
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
        if request.parent.endswith("prior"):
            predicted = prediction_pb2.PredictedSlice(
                rank=1, tags=[pair], method=prediction_pb2.PREDICTION_METHOD_PRIOR, known_count=3, expected_mean=0.25
            )
        elif request.parent.endswith("instruction"):
            predicted = prediction_pb2.PredictedSlice(
                rank=1, tags=[pair], method=prediction_pb2.PREDICTION_METHOD_INSTRUCTION, target="[bold]kettle"
            )
        return prediction_pb2.ListPredictedSlicesResponse(predicted_slices=[predicted])

    def CreatePrediction(self, request, context):
        self._enter(request, context)
        method = prediction_pb2.PredictionMethod.Name(request.method).removeprefix("PREDICTION_METHOD_").lower()
        name = f"datasets/bears/predictions/{method}"
        return prediction_pb2.CreatePredictionResponse(job=job(types_pb2.JOB_STATE_RUNNING, name=name))

    def WatchPrediction(self, request, context):
        self._enter(request, context)
        yield prediction_pb2.WatchPredictionResponse(job=job(types_pb2.JOB_STATE_RUNNING, name=request.name))
        ended = job(types_pb2.JOB_STATE_SUCCEEDED, name=request.name)
        if self.problem is not None:
            ended.state = types_pb2.JOB_STATE_FAILED
            ended.problem.CopyFrom(self.problem)
        yield prediction_pb2.WatchPredictionResponse(job=ended)

    def VerifyPredictions(self, request, context):
        self._enter(request, context)
        response = prediction_pb2.VerifyPredictionsResponse(overall_mean=0.75, scored_count=1200)
        for i, name in enumerate(request.predictions):
            verified = response.predictions.add(
                prediction=name,
                method=prediction_pb2.PREDICTION_METHOD_PRIOR if name.endswith("prior") else 1,
                pair_counts=[2, 3],
                predicted_slice_count=1,
            )
            one = verified.slices.add(rank=1, scored_count=0 if i else 12)
            if not i:
                one.mean, one.drop, one.interval_low, one.interval_high, one.is_error_slice = 0.25, 0.5, 0.1, 0.6, True
                verified.verified.CopyFrom(
                    prediction_pb2.VerifiedDrop(
                        slice_count=1, mean_drop=0.5, interval_low=0.25, interval_high=0.625, error_slice_share=1
                    )
                )
                verified.base.CopyFrom(
                    prediction_pb2.VerifiedDrop(slice_count=40, mean_drop=0.0625, error_slice_share=0.125)
                )
        return response

    def CreateSelection(self, request, context):
        self._enter(request, context)
        method = repair_pb2.SelectionMethod.Name(request.method).removeprefix("SELECTION_METHOD_").lower()
        name = f"datasets/bears/selections/{method}"
        return repair_pb2.CreateSelectionResponse(job=job(types_pb2.JOB_STATE_RUNNING, name=name))

    def WatchSelection(self, request, context):
        self._enter(request, context)
        ended = job(types_pb2.JOB_STATE_SUCCEEDED, name=request.name)
        if self.problem is not None:
            ended.state = types_pb2.JOB_STATE_FAILED
            ended.problem.CopyFrom(self.problem)
        yield repair_pb2.WatchSelectionResponse(job=ended)

    def GetSelection(self, request, context):
        self._enter(request, context)
        method = repair_pb2.SelectionMethod.ValueType(2 if request.name.endswith("s2") else 1)
        found = repair_pb2.GetSelectionResponse(method=method, pick_count=1, pool_count=9, near_copy_count=3)
        found.methods.add(method=method, pick_count=1, shared_count=1, matching_count=1)
        found.methods.add(method=repair_pb2.SELECTION_METHOD_MARGIN, pick_count=1)
        return found

    def ListPicks(self, request, context):
        self._enter(request, context)
        pick = repair_pb2.Pick(instance_id="p1", image_uri="file:///p1.png", slice_mean=0.25, pool_index=5)
        if request.parent.endswith("s2"):
            return repair_pb2.ListPicksResponse(picks=[pick])
        pick.slice_rank, pick.value, pick.predicted_label = 1, 0.25, "bear"
        pick.tags.add(attribute="[bold]colour", tag="dark, red")
        other = repair_pb2.Pick()
        other.CopyFrom(pick)
        other.instance_id, other.image_uri, other.pool_index = "p2", "file:///p2.png", 2
        return repair_pb2.ListPicksResponse(picks=[pick, other])

    def ListDataNeeds(self, request, context):
        self._enter(request, context)
        tags = [types_pb2.AttributeTag(attribute="colour", tag="red")]
        need = repair_pb2.DataNeed(
            slice_rank=1,
            slice_mean=0.25,
            tags=tags,
            pool_count=2,
            missing_count=8,
            description="Collect 8 images with [bold]colour red; the pool has 2.",
            prompt="A realistic photo of bear.",
        )
        return repair_pb2.ListDataNeedsResponse(needs=[need])

    def CompareRepair(self, request, context):
        self._enter(request, context)
        outcomes = [repair_pb2.RepairOutcome(model="datasets/bears/models/v1", overall_mean=0.5, failing_mean=0.25)]
        outcomes[0].groups.add(group=repair_pb2.REPAIR_GROUP_FAILING, scored_count=4, mean=0.25)
        for c in request.compared_models:
            method = repair_pb2.SelectionMethod.ValueType(2 if c.selection.endswith("s2") else 1)
            outcome = repair_pb2.RepairOutcome(model=c.model, selection=c.selection, method=method, added_count=9)
            outcome.groups.add(
                group=repair_pb2.REPAIR_GROUP_MATCHING,
                scored_count=4,
                mean=0.5,
                change=0.25,
                change_low=0.125,
                change_high=0.375,
            )
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
        if header.HasField("error_rule"):
            names = ("drop", "parent_drop", "error_share", "interval_low", "interval_high")
            fields += [(name, pa.float64()) for name in names]
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
