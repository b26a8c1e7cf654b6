from __future__ import annotations

import pyarrow as pa
import pytest

from services.repair.pick import LOWEST_MEAN, RANDOM, class_codes, pick_artifact, pool_of
from shared.errors import Precondition
from shared.names import Name
from shared.schema import UNKNOWN
from shared.store.artifacts import items_of
from tests.unit.shared.world import OFFSETS, POOL, RANKING, SCHEMA, TAGGING, N, World

NAME = Name("pets", "selections", "s")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def picked(world: World, method: str, budget: int = 1000, seed: int = 0) -> tuple[pa.Table, dict]:
    pick_artifact(world.artifacts, NAME, RANKING, world.model, method=method, split="pool", budget=budget, seed=seed)
    return world.artifacts.read_part(NAME, "picks"), dict(world.artifacts.manifest(NAME).summary)


def test_each_pick_matches_the_slice_that_asked_for_it(world):
    picks, summary = picked(world, LOWEST_MEAN)
    errors = world.artifacts.read_part(RANKING, "error_slices")
    assert errors.num_rows > 0
    assert summary["pick_count"] == picks.num_rows > 0
    assert summary["pool_count"] == POOL
    codes = world.codes.copy()
    codes[:, 0] = [SCHEMA.attributes[0].code(name) for name in world.predicted]
    items = items_of(picks)
    asked = items_of(errors)
    for row, pick in enumerate(picks.to_pylist()):
        instance = world.ids.index(pick["instance_id"])
        assert instance >= N
        assert items[row].tolist() == asked[pick["slice_rank"] - 1].tolist()
        assert pick["slice_mean"] == errors.column("mean")[pick["slice_rank"] - 1].as_py()
        held = (codes[instance] + OFFSETS[:-1]).tolist()
        assert {item for item in items[row].tolist() if item >= 0} <= set(held)
    assert picks.column("slice_rank").to_pylist() == sorted(picks.column("slice_rank").to_pylist())


def test_no_more_than_the_budget_is_picked(world):
    assert picked(world, LOWEST_MEAN, budget=2)[0].num_rows == 2
    picks, summary = picked(world, RANDOM, budget=7)
    assert picks.num_rows == summary["pick_count"] == 7
    assert picks.column("slice_rank").to_pylist() == [0] * 7
    assert len(set(picks.column("instance_id").to_pylist())) == 7


def test_a_seed_fixes_the_random_draw(world):
    one, again, other = (picked(world, RANDOM, 20, seed)[0].column("instance_id").to_pylist() for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("method", [LOWEST_MEAN, RANDOM])
def test_without_error_slices_nothing_is_asked_for_and_the_file_can_be_read(method, tmp_path):
    world = World(tmp_path, fails=False)
    assert world.artifacts.read_part(RANKING, "error_slices").num_rows == 0
    picks, summary = picked(world, method, budget=5)
    expected = 0 if method == LOWEST_MEAN else 5
    assert picks.num_rows == summary["pick_count"] == expected
    assert {"instance_id", "image_uri", "slice_rank", "slice_mean"} <= set(picks.column_names)
    assert summary["unmatched_slice_count"] == 0


def test_tags_and_instances_of_the_pool_are_in_one_order(world):
    tags, rows = pool_of(world.artifacts, TAGGING, "pool")
    assert tags.instance_ids.to_pylist() == rows.column("instance_id").to_pylist() == world.ids[N:]
    with pytest.raises(Precondition, match="'test'"):
        pool_of(world.artifacts, TAGGING, "test")


def test_the_class_is_what_the_model_says_else_the_label(world):
    rows = pa.table({"instance_id": ["a", "b", "c", "d"], "label": ["cat", "cat", None, "cow"]})
    scores = pa.table({"instance_id": ["a", "c", "d"], "predicted_label": ["bear", None, None]})
    assert class_codes(SCHEMA, rows, scores).tolist() == [0, 1, UNKNOWN, UNKNOWN]
