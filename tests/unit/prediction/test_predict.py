from __future__ import annotations

import itertools

import numpy as np
import pytest

from services.prediction.instruction import Instructed
from services.prediction.predict import (
    confusions_of,
    predict_by_prior,
    predict_by_substitution,
    store_instructed,
)
from services.prediction.ranked import open_ranking
from shared.errors import InvalidInput, NotFound, Precondition
from shared.llm import Usage
from shared.names import Name
from shared.store.artifacts import Manifest, Provenance, items_of
from tests.unit.shared.world import ENUMERATION, RANKING, SCHEMA, TAGGING, N

NAME = Name("pets", "predictions", "p")
INSTRUCTED = Instructed(
    np.array([[1, 4], [0, 3]], np.int32), np.array([1.0, 0.5]), ("bear", ""), {"known already": 3}, 2, Usage(2)
)


def substituted(ranked, encoder, max_origins=100):
    predict_by_substitution(ranked, NAME, encoder, neighbours=2, max_per_class=5, max_origins=max_origins)
    return ranked.artifacts.read_part(NAME, "predicted"), ranked.artifacts.manifest(NAME)


def weighed(ranked, **given):
    limits = {"pair_count": None, "max_per_class": 5, "cancelled": lambda: False, "on_progress": lambda *_: None}
    predict_by_prior(ranked, NAME, **(limits | given))


def test_what_is_predicted_differs_from_its_origin_by_one_tag_and_was_not_enumerated(ranked, encoder):
    table, manifest = substituted(ranked, encoder)
    origins = items_of(ranked.error_slices).tolist()
    known = {tuple(row) for row in ranked.enumerated.tolist()}
    assert manifest.summary["predicted_slice_count"] == table.num_rows > 0
    for row, items in zip(table.to_pylist(), items_of(table).tolist(), strict=True):
        assert tuple(items) not in known
        first = origins[row["origin_ranks"][0] - 1]
        assert set(first) - set(items) == {row["from_item"]}
        assert set(items) - set(first) == {row["to_item"]}
        assert (row["target"], row["expected_mean"]) == (None, None)
    scores = table.column("score").to_pylist()
    assert scores == sorted(scores, reverse=True)


def test_only_the_first_origins_are_varied(ranked, encoder):
    table, _ = substituted(ranked, encoder, max_origins=1)
    assert {tuple(ranks) for ranks in table.column("origin_ranks").to_pylist()} == {(1,)}


def test_without_error_slices_there_is_nothing_to_vary_and_that_is_said(well, encoder):
    with pytest.raises(Precondition, match=r"rankings/r has no error slices to vary; .*lower margin.*prior"):
        substituted(well, encoder)
    assert not well.artifacts.is_complete(NAME)
    weighed(well)  # the other methods need none
    assert well.artifacts.is_complete(NAME)


def test_the_files_of_all_methods_have_the_same_columns_and_say_how_much_was_seen(ranked, encoder):
    tables = [substituted(ranked, encoder)[0]]
    weighed(ranked)
    tables.append(ranked.artifacts.read_part(NAME, "predicted"))
    store_instructed(
        ranked, NAME, INSTRUCTED, pair_count=2, max_per_class=5, prompt_digests={"prediction/x": "d"}, model="m"
    )
    tables.append(ranked.artifacts.read_part(NAME, "predicted"))
    codes = ranked.table.codes
    offsets = np.cumsum([0, *ranked.table.tag_counts])
    for table in tables:
        assert table.schema.equals(tables[0].schema)
        assert items_of(table).shape[1] == ranked.max_depth
        for row, items in zip(table.to_pylist(), items_of(table).tolist(), strict=True):
            pairs = [(np.searchsorted(offsets, i, side="right") - 1, i) for i in items if i >= 0]
            inside = np.all([codes[:, a] == i - offsets[a] for a, i in pairs], axis=0)
            assert row["known_count"] == inside.sum() < ranked.min_count or table is tables[2]
    assert tables[2].column("target").to_pylist() == ["bear", ""]
    manifest = ranked.artifacts.manifest(NAME)
    assert manifest.summary == {"predicted_slice_count": 2, "question_count": 2, "dropped": {"known already": 3}}
    assert manifest.provenance.prompt_digests == {"prediction/x": "d"}
    assert manifest.provenance.parameters["schema"] == SCHEMA.schema_id


def test_the_prior_ranks_what_the_ranked_split_does_not_show(ranked):
    weighed(ranked)
    table = ranked.artifacts.read_part(NAME, "predicted")
    known = {tuple(row) for row in ranked.enumerated.tolist()}
    rows = items_of(table).tolist()
    assert rows
    assert not {tuple(row) for row in rows} & known
    # Every sub-slice was enumerated: black fur in the zoo, which was left out, is among them.
    for row in rows:
        pairs = [i for i in row if i >= 0]
        for some in itertools.combinations(pairs, len(pairs) - 1):
            assert (*some, *[-1] * (3 - len(some))) in known
    assert [4, 7, -1] in rows
    weighed(ranked, pair_count=2)
    assert {tuple(row) for row in items_of(ranked.artifacts.read_part(NAME, "predicted")).tolist()} == {(4, 7, -1)}


def test_a_cancelled_prior_stores_nothing(ranked):
    weighed(ranked, cancelled=lambda: True)
    assert not ranked.artifacts.is_complete(NAME)


def test_confusions_are_those_of_the_ranked_split(ranked):
    assert confusions_of(ranked, 2) == []  # the model of this world is never wrong about the class
    labels, predicted = ranked.classes()
    assert len(labels) == len(predicted) == N
    assert labels == predicted


def test_a_ranking_that_is_not_there_is_said(artifacts):
    with pytest.raises(NotFound, match="rankings/gone"):
        open_ranking(artifacts, Name("pets", "rankings", "gone"))


def test_a_tagging_of_another_schema_is_said_with_the_first_difference(artifacts):
    manifest = artifacts.manifest(RANKING)
    fewer = SCHEMA.__class__(SCHEMA.task, SCHEMA.main_objects, SCHEMA.attributes[:2])
    artifacts.write_schema("pets", fewer, Provenance({}))
    artifacts.complete(TAGGING, Manifest(Provenance({}, {"schema": fewer.schema_id}), {}))
    with pytest.raises(Precondition, match=r"taggings/t was made with schema .*does not know the attribute 'place'"):
        open_ranking(artifacts, RANKING)
    assert manifest.provenance.parameters["enumeration"] == str(ENUMERATION)


def test_a_split_without_tagged_instances_is_said_with_those_that_are_there(artifacts):
    parameters = {**artifacts.manifest(RANKING).provenance.parameters, "split": "test"}
    provenance = Provenance(artifacts.manifest(RANKING).provenance.inputs, parameters)
    artifacts.complete(RANKING, Manifest(provenance, {}))
    with pytest.raises(InvalidInput, match="there are pool, validation"):
        open_ranking(artifacts, RANKING).is_unseen([0])
