"""Scores before and after, by where the error slices are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from services.repair.compare import Compared, Group, compare, groups_of
from services.repair.methods import Method
from services.repair.pick import Wanted, pick_artifact
from shared.errors import InvalidInput, Precondition
from shared.names import Name
from shared.store.artifacts import SCORES, ModelRecord, TagTable, items_of, table_digest
from tests.unit.shared.world import RANKING, SCHEMA, N, World

SELECTION = Name("pets", "selections", "s")
WORST = Compared("v2", SELECTION)


def scores_of(world: World, score: np.ndarray, ids: list[str]) -> pa.Table:
    columns = {
        "instance_id": ids,
        "score": score,
        "predicted_label": [world.predicted[world.ids.index(i)] for i in ids],
    }
    empty = {"confidence": pa.nulls(len(ids)), "probabilities": pa.nulls(len(ids))}
    return pa.table(columns | empty).cast(SCORES)


def add_model(world: World, model: str, score: np.ndarray, ids: list[str]) -> None:
    table = scores_of(world, score, ids)
    world.artifacts.write_scores(ModelRecord("pets", model, "custom", table_digest(table), len(ids), 0.5, ""), table)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """v1 is ranked; v2 was trained with the picks and is right wherever v1 is, and by turns elsewhere."""
    found = World(tmp_path_factory.mktemp("world"))
    old = found.artifacts.scores(found.model).column("score").to_pylist()[:N]
    found.before = np.array(old, float)
    found.after = np.where(np.arange(N) % 2 == 0, 1.0, found.before)
    everywhere = np.concatenate([found.before, np.ones(len(found.ids) - N)])
    found.artifacts.write_scores(found.model, scores_of(found, everywhere, found.ids))
    add_model(found, "v2", found.after, found.ids[:N])
    add_model(found, "v3", found.before[:10], found.ids[:10])
    wanted = Wanted(Method.LOWEST_MEAN, 9, "pool", rivals=(Method.RANDOM,))
    pick_artifact(found.artifacts, SELECTION, RANKING, wanted, read_file=None, open_image=None)
    return found


def extent(world: World, items: np.ndarray) -> np.ndarray:
    offsets = np.cumsum([0, *(len(a.tags) for a in SCHEMA.attributes)])[:-1]
    wanted = {i for i in items.tolist() if i >= 0}
    return np.array([wanted <= set(row) for row in (world.codes[:N] + offsets).tolist()])


def test_the_groups_are_those_of_the_papers_table(world):
    items = items_of(world.artifacts.read_part(RANKING, "error_slices"))
    assert len(items) > 1
    table = TagTable(pa.array(world.ids[:N]), world.codes[:N], SCHEMA)
    groups = groups_of(table, items, [0])
    extents = [extent(world, row) for row in items]
    repaired = set(items[0][items[0] >= 0].tolist())
    shares = [bool(repaired & set(row[row >= 0].tolist())) for row in items]
    for i in range(N):
        inside = [e[i] for e in extents]
        assert groups[Group.OVERALL][i]
        assert groups[Group.FAILING][i] == any(inside) != groups[Group.OTHER][i]
        assert groups[Group.MATCHING][i] == inside[0]
        overlaps = any(a and b for a, b in zip(inside, shares, strict=True))
        assert groups[Group.OVERLAPPING][i] == (overlaps and not inside[0])
        assert groups[Group.NON_OVERLAPPING][i] == (any(inside) and not overlaps and not inside[0])
    assert set(groups_of(table, items)) == {Group.OVERALL, Group.FAILING, Group.OTHER}


def test_means_and_changes_are_those_of_the_scores(world):
    found = compare(world.artifacts, RANKING, [WORST, replace(WORST, method="random")], "validation", [1])
    assert found.instance_count == N
    first, second, third = found.outcomes
    assert (first.model, first.method, first.selection, first.added) == ("v1", "", None, 0)
    assert (second.model, second.method, second.selection) == ("v2", "lowest_mean", SELECTION)
    assert third.method == "random"
    assert second.added == third.added > 0
    items = items_of(world.artifacts.read_part(RANKING, "error_slices"))
    groups = groups_of(TagTable(pa.array(world.ids[:N]), world.codes[:N], SCHEMA), items, [0])
    assert found.failing_count == groups[Group.FAILING].sum()
    for group, mask in groups.items():
        if not mask.any():
            assert group not in first.groups
            continue
        assert first.groups[group].count == mask.sum()
        assert first.groups[group].mean == pytest.approx(world.before[mask].mean())
        assert first.groups[group].change is None
        change = second.groups[group].change
        assert change.mean == pytest.approx((world.after - world.before)[mask].mean())
        assert change.low <= change.mean <= change.high


def test_the_ranked_model_is_compared_as_it_was_ranked(world):
    before = compare(world.artifacts, RANKING, [WORST], "validation")
    world.score_anew(world.predicted)
    assert compare(world.artifacts, RANKING, [WORST], "validation") == before


def test_a_split_without_tagged_instances_is_nothing_to_compare_on(world):
    with pytest.raises(Precondition, match="nothing to compare on: no tagged instance is in the split 'test'"):
        compare(world.artifacts, RANKING, [WORST], "test")


def test_forgetting_shows(world):
    forgot = np.where(world.before == 1, np.arange(N) % 4 > 0, 1.0)
    add_model(world, "v4", forgot, world.ids[:N])
    other = (
        compare(world.artifacts, RANKING, [replace(WORST, model="v4")], "validation").outcomes[1].groups[Group.OTHER]
    )
    assert other.change.high < 0


def test_a_change_is_over_what_both_models_have_a_score_for(world):
    found = compare(world.artifacts, RANKING, [replace(WORST, model="v3")], "validation").outcomes[1]
    assert found.groups[Group.OVERALL].count == 10
    assert found.groups[Group.OVERALL].change.mean == 0


@pytest.mark.parametrize("rank", [0, -1, 10_000])
def test_a_rank_that_is_not_there_is_refused(world, rank):
    with pytest.raises(InvalidInput, match=r"repaired_ranks\[1\]"):
        compare(world.artifacts, RANKING, [], "validation", [1, rank])


def test_a_method_that_did_not_pick_is_refused(world):
    with pytest.raises(InvalidInput, match="no picks by margin; it has lowest_mean, random"):
        compare(world.artifacts, RANKING, [replace(WORST, method="margin")], "validation")


def test_a_model_without_scores_there_is_a_missing_step(world):
    with pytest.raises(Precondition, match="'v2' has no score for any 'pool'"):
        compare(world.artifacts, RANKING, [WORST], "pool")
