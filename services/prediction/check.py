"""Stored predictions held against tags and scores of other data (paper 5.4, Table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.prediction.ranked import check_schema_of, open_ranking, rows_of_splits, scores_on
from services.prediction.verification import Baseline, Scored, Verified, verify
from shared.errors import invalid
from shared.names import Name, parse
from shared.store.artifacts import Artifacts, items_of

MAX_PREDICTIONS = 16  # of one call


@dataclass(frozen=True)
class CheckedPrediction:
    name: Name
    method: str
    predicted: int
    verified: Verified


@dataclass(frozen=True)
class Check:
    """What the data says of each prediction, in the order in which they were given."""

    overall_mean: float
    scored_count: int
    model: str
    tagging: Name
    predictions: tuple[CheckedPrediction, ...]


def check_predictions(
    artifacts: Artifacts,
    predictions: Sequence[Name],
    *,
    tagging: Name | None,
    model: str | None,
    splits: Sequence[str],
    min_count: int | None,
    seed: int,
) -> Check:
    """Hold `predictions` of one ranking against the scored instances of `splits`.

    `tagging`, `model` and `min_count` are those of the ranking where they are None. Raises NotFound (a prediction, a
    tagging or a model is not there), InvalidInput (none or too many predictions, of several rankings, a split without
    tagged instances or the one that they were made from), Precondition (another schema, no scores there).
    """
    if not 1 <= len(predictions) <= MAX_PREDICTIONS:
        raise invalid("predictions", f"holds {len(predictions)}; give 1 to {MAX_PREDICTIONS}")
    manifests = [artifacts.manifest(name) for name in predictions]
    rankings = {str(m.provenance.parameters["ranking"]) for m in manifests}
    if len(rankings) > 1:
        raise invalid(
            "predictions", f"come from several rankings, {' and '.join(sorted(rankings)[:2])}; give those of one"
        )
    ranked = open_ranking(artifacts, parse(rankings.pop(), "rankings", "predictions"))
    tagging = tagging or ranked.tagging
    check_schema_of(artifacts, tagging, ranked.schema, str(predictions[0]))
    if not splits:
        raise invalid("splits", "holds none; give one or more, for instance test")
    if ranked.split in splits and tagging == ranked.tagging:
        raise invalid("splits", f"'{ranked.split}' is what the predictions were made from; give others")
    table = rows_of_splits(artifacts, tagging, splits)
    record = artifacts.model(ranked.name.dataset, model or ranked.model)
    scores = scores_on(artifacts, record, table, " and ".join(splits))
    data = Scored(ranked.schema, table.codes, scores)
    baseline = Baseline(
        data,
        ranked.is_unseen,
        margin=ranked.margin,
        min_count=ranked.min_count if min_count is None else min_count,
        seed=seed,
    )
    checked = []
    for name, manifest in zip(predictions, manifests, strict=True):
        items = items_of(artifacts.read_part(name, "predicted"))
        method = str(manifest.provenance.parameters["method"])
        checked.append(CheckedPrediction(name, method, len(items), verify(data, items, baseline)))
    return Check(data.overall, int((~np.isnan(scores)).sum()), record.model, tagging, tuple(checked))
