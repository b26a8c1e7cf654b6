"""A gate before a release: which runs of two models may be held against each other, and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from hibug2.connection import dataset_name
from hibug2.errors import UserError
from hibug2.insight import check_same_slices
from hibug2.v1 import model_pb2, run_pb2, slice_pb2, types_pb2

if TYPE_CHECKING:
    from hibug2.client import Client

# As Client.run: dataset, model, then depth, min_count, margin, schema and seed by name; returns a run that succeeded.
StartRun = Callable[..., run_pb2.Run]
_DEFAULTS = run_pb2.RunParameters(max_depth=3, min_count=10, margin=0.2)


@dataclass(frozen=True)
class Verdict:
    """Whether `candidate` may take the place of `baseline`, and why.

    `violations` has a row for each fall beyond its limit: tags (none for the overall mean), baseline_mean,
    candidate_mean, max_drop, paired_count, q_value, reason (in words). `compared_slice_count` slices have enough
    instances that both models scored; `judged_slice_count` of them were held to a limit.
    """

    passed: bool
    summary: str
    violations: pa.Table
    compared_slice_count: int
    judged_slice_count: int
    baseline: run_pb2.Run
    candidate: run_pb2.Run


@dataclass(frozen=True)
class Wanted:
    """What the runs of a gate must be; what is None may be anything."""

    dataset: str | None = None
    depth: int | None = None
    min_count: int | None = None
    margin: float | None = None

    def met_by(self, parameters: run_pb2.RunParameters) -> bool:
        """Whether a run with these parameters serves."""
        pairs = (
            (self.depth, parameters.max_depth),
            (self.min_count, parameters.min_count),
            (self.margin, parameters.margin),
        )
        return all(wanted is None or wanted == found for wanted, found in pairs)


def check_limits(request: slice_pb2.CheckGateRequest) -> None:
    """UserError for a limit that is out of range, before a run is started for it."""
    drops = [("max_drop", request.max_drop), ("max_overall_drop", request.max_overall_drop)]
    drops += [("thresholds", threshold.max_drop) for threshold in request.thresholds]
    drops += [("severities", severity.max_drop) for severity in request.severities]
    for field, drop in drops:
        if not 0.0 <= drop <= 1.0:
            raise UserError(field, f"is {drop}; a drop is from 0 to 1")
    if not 0.0 < request.significance < 1.0:
        raise UserError("significance", f"is {request.significance}; give a chance above 0 and below 1")


def comparable_runs(
    client: Client, baseline: run_pb2.Run | str, candidate: run_pb2.Run | str, wanted: Wanted, start: StartRun
) -> tuple[run_pb2.Run, run_pb2.Run]:
    """A run of the baseline and one of the candidate that ranked the same slices.

    Each is given as a run, taken as it is, or as the name of a model (`v1`, `datasets/…/models/v1`). Of models the
    newest pair of succeeded runs is taken that was made from today's instances and scores; a run that is missing is
    started, like the other one. UserError when a model is not there, or when two given runs cannot be compared.
    """
    sides = {"baseline": baseline, "candidate": candidate}
    usable = {field: [side] for field, side in sides.items() if not isinstance(side, str)}
    named = {field: side for field, side in sides.items() if isinstance(side, str)}
    dataset = _dataset(client, wanted.dataset, named, [run for runs in usable.values() for run in runs])
    models = _models(client, dataset, named)
    usable |= _usable(client, dataset, models, wanted)
    olds, news = usable["baseline"], usable["candidate"]
    for new in news:
        for old in olds:
            if old.enumeration == new.enumeration and old.dataset == new.dataset:
                return old, new

    def started(field: str, like: run_pb2.Run | None) -> run_pb2.Run:
        p = like.parameters if like is not None else _DEFAULTS
        return start(
            dataset,
            models[field].name,
            depth=p.max_depth if wanted.depth is None else wanted.depth,
            min_count=p.min_count if wanted.min_count is None else wanted.min_count,
            margin=p.margin if wanted.margin is None else wanted.margin,
            schema=like.schema if like is not None else None,
            seed=p.seed,
        )

    if "candidate" not in models:
        new = news[0]
        old = started("baseline", new) if "baseline" in models else olds[0]
    else:
        old = olds[0] if olds else started("baseline", news[0] if news else None)
        new = next((run for run in news if run.enumeration == old.enumeration), None) or started("candidate", old)
        if "baseline" in models and old.enumeration != new.enumeration:
            # The tags have changed since the baseline's run.
            old = started("baseline", new)
    check_same_slices(old, new, "candidate")
    return old, new


def _dataset(client: Client, given: str | None, named: dict[str, str], runs: list[run_pb2.Run]) -> str:
    """The one dataset that is meant: named, a run's, a full name's, or the only one that has the models."""
    meant = {run.dataset for run in runs} | ({dataset_name(given)} if given else set())
    meant |= {name.partition("/models/")[0] for name in named.values() if "/models/" in name}
    if not meant:
        ids = set(named.values())
        meant = {
            dataset.name
            for dataset in client.datasets()
            if ids <= {model.name.rpartition("/")[2] for model in client.models(dataset.name)}
        }
        if not meant:
            raise UserError("dataset", f"none has scores of both {' and '.join(named.values())}; add them, or name it")
    if len(meant) > 1:
        raise UserError("dataset", f"more than one is meant: {', '.join(sorted(meant))}; name one that has both models")
    return meant.pop()


def _models(client: Client, dataset: str, named: dict[str, str]) -> dict[str, model_pb2.Model]:
    if not named:
        return {}
    there = {model.name.rpartition("/")[2]: model for model in client.models(dataset)}
    for field, name in named.items():
        if name.rpartition("/")[2] not in there:
            raise UserError(field, f"'{name}' is no model of {dataset}; there are {', '.join(there) or 'none'}")
    return {field: there[name.rpartition("/")[2]] for field, name in named.items()}


def _usable(
    client: Client, dataset: str, models: dict[str, model_pb2.Model], wanted: Wanted
) -> dict[str, list[run_pb2.Run]]:
    """The succeeded runs of each model that tell how it does today, the newest first."""
    if not models:
        return {}
    digest, runs = client.dataset(dataset).digest, client.runs(dataset)
    return {
        field: [
            run
            for run in runs
            if run.model == model.name
            and run.job.state == types_pb2.JOB_STATE_SUCCEEDED
            and wanted.met_by(run.parameters)
            # Scores may have been replaced and instances added since.
            and {("dataset", digest), ("scores", model.digest)} <= {(i.input, i.digest) for i in run.provenance.inputs}
        ]
        for field, model in models.items()
    }
