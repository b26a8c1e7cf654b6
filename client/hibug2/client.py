"""The Python client: one call for each thing that the gateway does; tables come back as Arrow tables."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa

from hibug2 import messages, streams, tables
from hibug2.connection import PAGE, RunLike, dataset_name, gather, new_id
from hibug2.errors import RunStopped, UserError, from_rpc
from hibug2.gate import StartRun, Verdict, Wanted, check_limits, comparable_runs
from hibug2.insight import Insight, attribute_tags
from hibug2.v1 import (
    dataset_pb2,
    enumeration_pb2,
    model_pb2,
    prediction_pb2,
    repair_pb2,
    run_pb2,
    schema_pb2,
    slice_pb2,
    types_pb2,
)

_REWATCH_S = 0.5
_ENDED = frozenset({types_pb2.JOB_STATE_SUCCEEDED, types_pb2.JOB_STATE_FAILED, types_pb2.JOB_STATE_CANCELLED})


@dataclass(frozen=True)
class ErrorRule:
    """Which slices of a table are error slices: of the score column `score`, `margin` below its mean; `top` at most."""

    score: str
    margin: float = 0.2
    top: int | None = None


class Client(Insight):
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
        """Store a schema, a mapping or a JSON file (YAML where PyYAML is installed); runs use it from now on."""
        data = schema if isinstance(schema, Mapping) else _read_document(Path(schema))
        request_id = new_id()
        request = schema_pb2.CreateSchemaRequest(
            parent=dataset_name(dataset), schema=messages.schema_from_json(data), request_id=request_id
        )
        return self._call(self._schemas.CreateSchema, request, request_id).schema

    def schema(self, dataset: str, schema: str = "current") -> types_pb2.Schema:
        """A schema of a dataset: the one that runs use, or the one of this id or name."""
        name = schema if "/" in schema else f"{dataset_name(dataset)}/schemas/{schema}"
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
        parent = dataset_name(dataset)
        if schema is None:
            schema_name = ""
        elif isinstance(schema, str):
            schema_name = schema if "/" in schema else f"{parent}/schemas/{schema}"
        else:
            schema_name = self.import_schema(dataset, schema).name
        request_id = new_id()
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

    def predicted(self, run: RunLike) -> pa.Table:
        """The predicted slices of a run.

        Columns: rank, tags, score, method, origin_ranks (of the error slices), replaced (the pair), similarity.
        Empty when the run left prediction out.
        """
        parent = self._part(run, "prediction", empty_when_skipped=True)
        if not parent:
            return messages.PREDICTED.empty_table()
        pages = self._pages(
            lambda token: prediction_pb2.ListPredictedSlicesRequest(parent=parent, page_size=PAGE, page_token=token),
            self._predictions.ListPredictedSlices,
        )
        return gather((messages.predicted_batch(p.predicted_slices) for p in pages), messages.PREDICTED)

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
            lambda token: repair_pb2.ListPicksRequest(parent=selection, page_size=PAGE, page_token=token),
            self._repair.ListPicks,
        )
        return gather((messages.picks_batch(p.picks) for p in pages), messages.PICKS)

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
