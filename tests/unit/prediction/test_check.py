from __future__ import annotations

import numpy as np
import pytest

from services.prediction.check import check_predictions
from services.prediction.predict import predict_by_prior, predict_by_substitution
from services.prediction.ranked import open_ranking
from shared.errors import InvalidInput, NotFound, Precondition
from shared.names import Name
from shared.store.artifacts import Manifest, Provenance, items_of
from tests.unit.prediction.conftest import POOL_TAGGING
from tests.unit.shared.world import OFFSETS, POOL, RANKING, SCHEMA, N

PRIOR, SUBSTITUTED = (Name("pets", "predictions", key) for key in ("prior", "substituted"))


@pytest.fixture
def predicted(ranked, encoder):
    predict_by_substitution(ranked, SUBSTITUTED, encoder, neighbours=2, max_per_class=20, max_origins=100)
    predict_by_prior(
        ranked, PRIOR, pair_count=None, max_per_class=20, on_progress=lambda *_: None, cancelled=lambda: False
    )
    return ranked.artifacts


def check(artifacts, *names, **given):
    request = {
        "tagging": POOL_TAGGING,
        "model": "v2",
        "splits": ["pool"],
        "min_count": 1,
        "seed": 0,
    }
    return check_predictions(artifacts, names or (SUBSTITUTED, PRIOR), **(request | given))


def test_predictions_are_held_against_the_scores_of_the_pool(predicted):
    found = check(predicted)
    assert [(p.name, p.method) for p in found.predictions] == [(SUBSTITUTED, "tag_substitution"), (PRIOR, "prior")]
    assert (found.scored_count, found.model, found.tagging) == (POOL, "v2", POOL_TAGGING)
    table = predicted.tag_table(POOL_TAGGING)
    scores = np.array(predicted.scores(predicted.model("pets", "v2")).column("score").to_pylist()[N:], float)
    assert found.overall_mean == pytest.approx(scores.mean())
    for checked in found.predictions:
        rows = items_of(predicted.read_part(checked.name, "predicted"))
        assert checked.predicted == len(rows) > 0
        for i, row in enumerate(rows):
            attributes = np.searchsorted(OFFSETS, row[row >= 0], side="right") - 1
            inside = (table.codes[N:][:, attributes] == row[row >= 0] - OFFSETS[attributes]).all(axis=1)
            assert checked.verified.slices.scored[i] == inside.sum()
            if inside.any():
                assert checked.verified.slices.mean[i] == pytest.approx(scores[inside].mean())
        assert checked.verified.base.slices > 0


def test_the_minimum_count_is_that_of_the_ranking_where_none_is_given(predicted):
    few, many = check(predicted, min_count=None), check(predicted, min_count=5)
    for a, b in zip(few.predictions, many.predictions, strict=True):
        assert a.verified.found.slices == b.verified.found.slices == (a.verified.slices.scored >= 5).sum()


def test_without_scores_on_the_split_that_is_said(predicted):
    with pytest.raises(Precondition, match="'v1' has no score for any of the 60 pool instances"):
        check(predicted, model=None)
    with pytest.raises(NotFound, match="no model 'v9'"):
        check(predicted, model="v9")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"splits": []}, "splits: holds none"),
        ({"splits": ["test"]}, "no tagged instance is in 'test'; there are pool, validation"),
        ({"splits": ["pool", "validation"], "tagging": None}, "what the predictions were made from"),
    ],
)
def test_splits_that_cannot_be_looked_at_are_named(predicted, given, text):
    with pytest.raises(InvalidInput, match=text):
        check(predicted, **given)


def test_another_schema_is_said_with_the_first_difference(predicted):
    renamed = SCHEMA.__class__(
        SCHEMA.task, SCHEMA.main_objects, (*SCHEMA.attributes[:2], SCHEMA.attributes[2].__class__("spot", *rest()))
    )
    predicted.write_schema("pets", renamed, Provenance({}))
    predicted.complete(POOL_TAGGING, Manifest(Provenance({}, {"schema": renamed.schema_id}), {}))
    with pytest.raises(Precondition, match=r"taggings/pool .*predictions/substituted .*does not know .*'place'"):
        check(predicted)


def rest():
    place = SCHEMA.attributes[2]
    return place.category, place.tags, place.tagger


def test_predictions_that_are_not_there_or_of_several_rankings_are_named(predicted):
    with pytest.raises(NotFound, match="predictions/gone"):
        check(predicted, Name("pets", "predictions", "gone"))
    with pytest.raises(InvalidInput, match="holds 17"):
        check(predicted, *[PRIOR] * 17)
    other = Name("pets", "rankings", "other")
    manifest = predicted.manifest(PRIOR)
    parameters = {**manifest.provenance.parameters, "ranking": str(other)}
    predicted.complete(PRIOR, Manifest(Provenance({}, parameters), manifest.summary))
    with pytest.raises(InvalidInput, match="several rankings"):
        check(predicted)
    assert open_ranking(predicted, RANKING).name == RANKING
