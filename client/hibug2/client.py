"""The Python client: one call for each thing that the gateway does; tables come back as Arrow tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa

from hibug2 import messages, schema_edit, schema_text, streams, tables
from hibug2.connection import PAGE, STOPPED, RunLike, dataset_name, full_name, new_id
from hibug2.errors import RunStopped, from_rpc
from hibug2.foresight import Foresight
from hibug2.gate import StartRun, Verdict, Wanted, check_limits, comparable_runs
from hibug2.insight import Insight, attribute_tags
from hibug2.repair import Repair
from hibug2.tagging import Tagging
from hibug2.v1 import (
    attribute_pb2,
    dataset_pb2,
    enumeration_pb2,
    model_pb2,
    run_pb2,
    schema_pb2,
    slice_pb2,
    types_pb2,
)

_REWATCH_S = 0.5
_ENDED = frozenset({types_pb2.JOB_STATE_SUCCEEDED, *STOPPED})


@dataclass(frozen=True)
class ErrorRule:
    """Which slices of a table are error slices: of the score column `score`, `margin` below its mean; `top` at most."""

    score: str
    margin: float = 0.2
    top: int | None = None


class Client(Insight, Foresight, Repair, Tagging):
    """A connection to a gateway; a context manager. Every method raises HiBug2Error, UserError for bad input.

    A dataset is named `bears` or `datasets/bears`; a run is `abc`, `runs/abc`, `latest` or a `Run`.
    """

    # Datasets

    def create_dataset(self, name: str, images: Any, task: str = "classification") -> dataset_pb2.Dataset:
        """Create a dataset from a folder of images or a manifest (CSV or Parquet path, Arrow table, DataFrame).

        `task` is classification, detection or pose. All instances are there afterwards, or nothing is.
        """
        header = dataset_pb2.DatasetHeader(
            dataset_id=name.removeprefix("datasets/"), task=_task(task), request_id=new_id()
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
        header = dataset_pb2.InstancesHeader(parent=dataset_name(dataset), request_id=new_id())
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
            lambda token: dataset_pb2.ListDatasetsRequest(page_size=PAGE, page_token=token),
            self._datasets.ListDatasets,
            lambda response: response.datasets,
        )

    def dataset(self, dataset: str) -> dataset_pb2.Dataset:
        """One dataset."""
        request = dataset_pb2.GetDatasetRequest(name=dataset_name(dataset))
        return self._call(self._datasets.GetDataset, request).dataset

    def delete_dataset(self, dataset: str) -> None:
        """Delete a dataset and everything that was made from it; the images stay where they are."""
        self._call(self._datasets.DeleteDataset, dataset_pb2.DeleteDatasetRequest(name=dataset_name(dataset)))

    # Models and scores

    def add_scores(self, dataset: str, model: str, scores: Any, metric: str | None = None) -> model_pb2.Model:
        """Set the scores of a model from a CSV or Parquet path, an Arrow table or a DataFrame.

        Columns: id, and score in [0, 1] or predicted (the label), optionally probabilities (a list, or columns
        prob_…) and confidence. `metric` is accuracy, iou, oks or custom. An earlier set is replaced as a whole.
        """
        kind = messages.number(types_pb2.Metric.DESCRIPTOR, metric, "metric") if metric else 0
        header = model_pb2.ScoresHeader(
            parent=dataset_name(dataset),
            model_id=model.rpartition("/")[2],
            metric=types_pb2.Metric.ValueType(kind),
            request_id=new_id(),
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
        parent = dataset_name(dataset)
        return self._all(
            lambda token: model_pb2.ListModelsRequest(parent=parent, page_size=PAGE, page_token=token),
            self._models.ListModels,
            lambda response: response.models,
        )

    # Schemas

    def import_schema(self, dataset: str, schema: Mapping[str, Any] | str | os.PathLike[str]) -> types_pb2.Schema:
        """Store a schema, a mapping or a YAML or JSON file; runs use it from now on.

        Names and tags are enough: `{"attributes": {"pose": ["sitting", "lying"]}}`. Task and classes that are not said
        are those of the dataset.
        """
        data = schema if isinstance(schema, Mapping) else schema_text.read_file(Path(schema))
        if isinstance(data, Mapping) and not {"task", "main_objects"} <= set(data):
            about = self.dataset(dataset)
            task = messages.word(types_pb2.Task.DESCRIPTOR, about.task)
            data = {"task": task, "main_objects": list(about.main_objects), **data}
        request_id = new_id()
        request = schema_pb2.CreateSchemaRequest(
            parent=dataset_name(dataset), schema=messages.schema_from_json(data), request_id=request_id
        )
        return self._call(self._schemas.CreateSchema, request, request_id).schema

    def generate_schema(
        self,
        dataset: str,
        *,
        model: str = "",
        attributes: Sequence[str] = (),
        main_objects: Sequence[str] = (),
        pair_count: int | None = None,
        image_count: int | None = None,
        max_attributes: int | None = None,
        max_tags: int | None = None,
        seed: int = 0,
        max_cost: float | None = None,
        on_progress: Callable[[types_pb2.Job], object] | None = None,
    ) -> attribute_pb2.GetGenerationResponse:
        """Make a schema for a dataset and wait for it; runs use it from now on. Locked attributes stay as they are.

        `attributes` are names that shall be in it, whose tags are found; `main_objects` says what the images show where
        the dataset names no classes. With `model` the images and classes that it gets wrong are asked about. Without a
        language model the schema holds what can be measured.
        """
        parent = dataset_name(dataset)
        request = attribute_pb2.CreateGenerationRequest(
            parent=parent,
            seed=seed,
            model=model and full_name(parent, "models", model),
            request_id=new_id(),
            pair_count=pair_count,
            image_count=image_count,
            max_attributes=max_attributes,
            max_tags=max_tags,
            attributes=[types_pb2.Attribute(attribute=name) for name in attributes],
            main_objects=main_objects,
            budget=None if max_cost is None else types_pb2.Budget(amount=max_cost),
        )
        job = self._call(self._attributes.CreateGeneration, request, request.request_id).job
        job = self._ended(job, self._attributes.WatchGeneration, attribute_pb2.WatchGenerationRequest, on_progress)
        return self._call(self._attributes.GetGeneration, attribute_pb2.GetGenerationRequest(name=job.name))

    def edit_schema(self, dataset: str, edits: Iterable[tuple[str, str]]) -> types_pb2.Schema:
        """Change the current schema of a dataset and store it, unless nothing has changed; runs use it from now on.

        `edits` are done in their order, as in `[("rename", "color=object color"), ("lock", "object color")]`;
        `hibug2.schema_edit` lists them. All of them are done, or none.
        """
        current = self.schema(dataset)
        before = messages.schema_to_json(current)
        after = schema_edit.edited(before, edits)
        return current if after == before else self.import_schema(dataset, after)

    def schema(self, dataset: str, schema: str = "current") -> types_pb2.Schema:
        """A schema of a dataset: the one that runs use, or the one of this id or name."""
        name = full_name(dataset_name(dataset), "schemas", schema)
        return self._call(self._schemas.GetSchema, schema_pb2.GetSchemaRequest(name=name)).schema

    def schemas(self, dataset: str) -> list[types_pb2.Schema]:
        """Every schema that a dataset has or had."""
        parent = dataset_name(dataset)
        return self._all(
            lambda token: schema_pb2.ListSchemasRequest(parent=parent, page_size=PAGE, page_token=token),
            self._schemas.ListSchemas,
            lambda response: response.schemas,
        )

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
        max_cost: float | None = None,
        wait: bool = True,
        on_progress: Callable[[run_pb2.Run], object] | None = None,
    ) -> run_pb2.Run:
        """Run the whole pipeline for a model, and wait for its end unless `wait` is False.

        `schema` is an id or name of a stored schema, or a mapping or Path to import first; None takes the
        dataset's own. `max_cost` caps what is spent on language models, in the currency of the model's price.
        `on_progress` gets each snapshot. Raises RunStopped when the run fails, pauses at its cap or is cancelled.
        """
        parent = dataset_name(dataset)
        if schema is None:
            schema_name = ""
        elif isinstance(schema, str):
            schema_name = full_name(parent, "schemas", schema)
        else:
            schema_name = self.import_schema(dataset, schema).name
        request_id = new_id()
        request = run_pb2.CreateRunRequest(
            dataset=parent,
            model=full_name(parent, "models", model),
            schema=schema_name,
            parameters=run_pb2.RunParameters(
                max_depth=depth, min_count=min_count, margin=margin, budget=budget, seed=seed, max_cost=max_cost
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
        name = dataset_name(dataset) if dataset else ""
        return self._all(
            lambda token: run_pb2.ListRunsRequest(page_size=PAGE, page_token=token, dataset=name),
            self._runs.ListRuns,
            lambda response: response.runs,
        )

    def watch(self, run: RunLike) -> Iterator[run_pb2.Run]:
        """Snapshots of a run until it has ended, the last one included; survives a restart of the gateway."""
        request = run_pb2.WatchRunRequest(name=self._run_name(run))
        reached, lost_at = False, 0.0
        while True:
            request_id = new_id()
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

    def resume(self, run: RunLike, *, max_cost: float | None = None) -> run_pb2.Run:
        """Go on with a run that failed, paused, was cancelled or lost its gateway; `max_cost` is its new cap.

        Returns at once; `watch` follows it.
        """
        request = run_pb2.ResumeRunRequest(name=self._run_name(run), max_cost=max_cost)
        return self._call(self._runs.ResumeRun, request).run

    def estimate(self, dataset: str, schema: str = "") -> run_pb2.EstimateRunResponse:
        """What a run would ask of language models, step by step; `schema` is an id, else the dataset's own."""
        parent = dataset_name(dataset)
        request = run_pb2.EstimateRunRequest(dataset=parent, schema=schema and full_name(parent, "schemas", schema))
        return self._call(self._runs.EstimateRun, request)

    def report(self, run: RunLike, compared: Mapping[str, str] | None = None) -> bytes:
        """The report of a run, one self-contained HTML file.

        `compared` names models that were trained with the run's picks, each with the method of its picks; they
        are shown beside the run's own model, as in `compare_repair`.
        """
        found = self.get_run(run)
        request = run_pb2.ReadReportRequest(name=found.name, compared_models=self._compared(found, compared or {}))
        return b"".join(response.html for response in self._read(self._runs.ReadReport, request))

    # Gates

    def gate(
        self,
        baseline: RunLike,
        candidate: RunLike,
        *,
        max_drop: float,
        max_overall_drop: float | None = None,
        thresholds: Sequence[tuple[Mapping[str, str], float]] = (),
        severities: Sequence[tuple[str, float, float]] = (),
        every_slice: bool = False,
        significance: float = 0.05,
        dataset: str | None = None,
        depth: int | None = None,
        min_count: int | None = None,
        margin: float | None = None,
        start: StartRun | None = None,
    ) -> Verdict:
        """Whether `candidate` may take the place of `baseline`: on no error slice the mean fell by more than allowed.

        Allowed is `max_drop`; for the slice of exactly the tags of one of `thresholds` (attribute to tag) its own
        limit; for the candidate's slices that lie `below` or more under its overall mean that of one of `severities`
        (name, below, limit); for the overall mean `max_overall_drop`, or `max_drop`. `every_slice` looks at all
        slices. A fall counts when a paired test on the same instances finds it too; `significance` is the chance, above
        0 and below 1, to stop a candidate that is nowhere worse.

        Baseline and candidate are models (`v1`, `datasets/…/models/v1`) or runs (`runs/…`, a `Run`). The dataset may be
        left out when only one has both models. Of models the newest pair of succeeded runs is taken that ranked the
        same slices, with today's scores, and with `depth`, `min_count`, `margin` where they are given; a run that is
        missing is started by `start`, which is called as `run` is, and is `run` when None.
        """
        request = slice_pb2.CheckGateRequest(
            max_drop=max_drop,
            max_overall_drop=max_overall_drop,
            significance=significance,
            thresholds=[
                slice_pb2.GateThreshold(tags=attribute_tags(tags), max_drop=limit) for tags, limit in thresholds
            ],
            severities=[
                slice_pb2.GateSeverity(severity=name, below=below, max_drop=limit) for name, below, limit in severities
            ],
            every_slice=every_slice,
        )
        check_limits(request)
        first, second = (
            self._finished(side, "ranking") if isinstance(side, run_pb2.Run) or side.startswith("runs/") else side
            for side in (baseline, candidate)
        )
        wanted = Wanted(dataset, depth, min_count, margin)
        old, new = comparable_runs(self, first, second, wanted, start or self.run)
        request.baseline, request.candidate = old.ranking, new.ranking
        response = self._call(self._slices.CheckGate, request)
        return Verdict(
            passed=response.passed,
            summary=response.summary,
            violations=pa.Table.from_batches([messages.violations_batch(response.violations)]),
            compared_slice_count=response.compared_slice_count,
            judged_slice_count=response.judged_slice_count,
            baseline=old,
            candidate=new,
        )

    # Tables of anyone

    def enumerate(
        self,
        table: Any,
        scores: Sequence[str],
        depth: int = 3,
        min_count: int = 10,
        *,
        must_hold: str = "",
        errors: ErrorRule | None = None,
    ) -> pa.Table:
        """The slices of a table (CSV or Parquet path, Arrow table, DataFrame) that needs no dataset.

        Every column that is not in `scores` is an attribute, every distinct value a tag, empty is unknown.
        Columns: tags, count, and <score>_count, <score>_mean for each score. With `must_hold` every slice has a pair
        of that column. With `errors` only error slices, the worst first, with drop, parent_drop, error_share,
        interval_low and interval_high beside.
        """
        batches = self.enumerate_batches(table, scores, depth, min_count, must_hold=must_hold, errors=errors)
        return pa.Table.from_batches(batches, messages.enumeration_schema(scores, judged=errors is not None))

    def enumerate_batches(
        self,
        table: Any,
        scores: Sequence[str],
        depth: int = 3,
        min_count: int = 10,
        *,
        must_hold: str = "",
        errors: ErrorRule | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """As `enumerate`, batch by batch, for results that memory should not hold at once."""
        prepared = tables.as_attributes(table, scores)
        header = enumeration_pb2.TableHeader(
            score_columns=scores, min_count=min_count, max_depth=depth, must_hold=must_hold
        )
        if errors is not None:
            header.error_rule.score_column, header.error_rule.margin = errors.score, errors.margin
            header.error_rule.max_slices = errors.top or 0

        def requests() -> Iterator[enumeration_pb2.EnumerateTableRequest]:
            yield enumeration_pb2.EnumerateTableRequest(header=header)
            for piece in streams.table_pieces(prepared):
                yield enumeration_pb2.EnumerateTableRequest(arrow=piece)

        wanted = messages.enumeration_schema(scores, judged=errors is not None)
        with self._arrow(self._enumeration.EnumerateTable, requests()) as reader:
            for batch in reader:
                yield from pa.Table.from_batches([batch]).select(wanted.names).cast(wanted).to_batches()


def _task(task: str) -> types_pb2.Task.ValueType:
    return types_pb2.Task.ValueType(messages.number(types_pb2.Task.DESCRIPTOR, task, "task"))
