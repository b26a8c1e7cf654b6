from __future__ import annotations

import pytest

from services.prediction.encoder import StaticEncoder
from services.prediction.predict import predict_artifact
from shared.names import Name
from shared.store.artifacts import items_of
from tests.unit.shared.world import ENUMERATION, RANKING, SCHEMA, World

NAME = Name("pets", "predictions", "p")


@pytest.fixture(scope="module")
def encoder() -> StaticEncoder:
    return StaticEncoder()


def predicted(world: World, encoder: StaticEncoder, max_origins: int = 100):
    predict_artifact(
        world.artifacts, NAME, RANKING, encoder, neighbours=2, max_per_class=5, max_origins=max_origins
    )  # fmt: skip
    return world.artifacts.read_part(NAME, "predicted"), world.artifacts.manifest(NAME)


def test_what_is_predicted_differs_from_its_origin_by_one_tag_and_was_not_enumerated(tmp_path, encoder):
    world = World(tmp_path)
    table, manifest = predicted(world, encoder)
    origins = items_of(world.artifacts.read_part(RANKING, "error_slices")).tolist()
    known = {tuple(row) for row in items_of(world.artifacts.read_part(ENUMERATION, "slices")).tolist()}
    assert manifest.summary["predicted_slice_count"] == table.num_rows > 0
    for row, items in zip(table.to_pylist(), items_of(table).tolist(), strict=True):
        assert tuple(items) not in known
        first = origins[row["origin_ranks"][0] - 1]
        assert set(first) - set(items) == {row["from_item"]}
        assert set(items) - set(first) == {row["to_item"]}
    scores = table.column("score").to_pylist()
    assert scores == sorted(scores, reverse=True)


def test_only_the_first_origins_are_varied(tmp_path, encoder):
    table, _ = predicted(World(tmp_path), encoder, max_origins=1)
    assert {tuple(ranks) for ranks in table.column("origin_ranks").to_pylist()} == {(1,)}


def test_without_error_slices_nothing_is_predicted_and_the_file_has_its_columns(tmp_path, encoder):
    world = World(tmp_path, fails=False)
    table, manifest = predicted(world, encoder)
    assert manifest.summary["predicted_slice_count"] == table.num_rows == 0
    assert manifest.provenance.parameters["schema"] == SCHEMA.schema_id
    assert items_of(table).shape == (0, 3)
    full, _ = predicted(World(tmp_path / "other"), encoder)
    assert table.schema.equals(full.schema)
