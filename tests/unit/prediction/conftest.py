"""The small dataset in a store, with all that a ranking says of itself, and scores and tags of the pool."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from services.prediction.ranked import Ranked, open_ranking
from shared.names import Name
from shared.store.artifacts import (
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    table_digest,
    tags_to_arrow,
)
from shared.store.store import Store
from shared.text import StaticEncoder
from tests.unit.shared.world import ENUMERATION, POOL, RANKING, SCHEMA, TAGGING, N, World

POOL_TAGGING = Name("pets", "taggings", "pool")  # knows the class of pool instances too
PARAMETERS = {"split": "validation", "min_count": 5, "max_depth": 3, "margin": 0.2, "model": "v1"}


@pytest.fixture(scope="session")
def encoder() -> StaticEncoder:
    return StaticEncoder()


def ranked_world(folder: Path, fails: bool) -> None:
    world = World(folder, fails)
    inputs = {"tagging": str(TAGGING), "schema": SCHEMA.schema_id, "enumeration": str(ENUMERATION)}
    provenance = Provenance({"scores": world.model.digest}, {**inputs, **PARAMETERS})
    for name in (ENUMERATION, RANKING):
        world.artifacts.complete(name, Manifest(provenance, {}))
    codes = world.codes.copy()
    rng = np.random.default_rng(5)
    codes[N:, 0] = rng.integers(0, 2, POOL)
    world.artifacts.write_part(POOL_TAGGING, "tags", tags_to_arrow(TagTable(pa.array(world.ids), codes, SCHEMA)))
    world.artifacts.complete(POOL_TAGGING, Manifest(Provenance({}, {"schema": SCHEMA.schema_id}), {}))
    scores = pa.table(
        {
            "instance_id": world.ids,
            "score": pa.array([None] * N + (rng.random(POOL) < 0.6).astype(float).tolist(), pa.float64()),
            "predicted_label": world.predicted,
        }
    )
    world.artifacts.write_scores(ModelRecord("pets", "v2", "custom", table_digest(scores), POOL, 0.6, ""), scores)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests get copies."""
    folder = tmp_path_factory.mktemp("worlds")
    for name, fails in (("fails", True), ("well", False)):
        ranked_world(folder / name, fails)
    return folder


@pytest.fixture
def artifacts(worlds: Path, tmp_path: Path) -> Artifacts:
    shutil.copytree(worlds / "fails", tmp_path / "store")
    return Artifacts(Store((tmp_path / "store").as_uri()), "default")


@pytest.fixture
def ranked(artifacts: Artifacts) -> Ranked:
    return open_ranking(artifacts, RANKING)


@pytest.fixture
def well(worlds: Path, tmp_path: Path) -> Ranked:
    """A ranking without error slices."""
    shutil.copytree(worlds / "well", tmp_path / "well")
    return open_ranking(Artifacts(Store((tmp_path / "well").as_uri()), "default"), RANKING)
