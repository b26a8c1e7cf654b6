"""Stored slices as their readers get them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hibug2.v1 import slice_pb2 as pb
from services.enumeration.ranking import rank_artifact
from services.enumeration.slice_server import SliceServicer
from services.enumeration.slices import enumerate_artifact
from services.gateway.datasets import check_instances, record_of
from shared.names import Name
from shared.schema import Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import (
    SCORES,
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    item_columns,
    tags_to_arrow,
)
from shared.store.store import Store

NAME, TAGGING = Name("pets", "enumerations", "e"), Name("pets", "taggings", "t")
SCHEMA = Schema(
    Task.CLASSIFICATION,
    (),
    tuple(Attribute(name, Category.GLOBAL, ("x", "y"), Tagger.VLM) for name in ("mood", "light", "pose")),
)
ITEMS = np.array([[0, -1], [1, 2], [2, 5], [3, 4]], np.int32)
ATTRIBUTES = [["mood"], ["mood", "light"], ["light", "pose"], ["light", "pose"]]


@pytest.fixture
def artifacts(tmp_path):
    made = Artifacts(Store(tmp_path.as_uri()), "default")
    made.write_schema("pets", SCHEMA, Provenance({}))
    made.write_part(NAME, "slices", pa.table({**item_columns(ITEMS), "count": pa.array([40, 30, 20, 10])}))
    parameters = {"schema": SCHEMA.schema_id, "tagging": str(TAGGING), "split": "validation"}
    made.complete(NAME, Manifest(Provenance({}, parameters), {"slice_count": len(ITEMS)}))
    return made


async def listed(servicer: SliceServicer, filter_text: str = "") -> list[pb.Slice]:
    request = pb.ListSlicesRequest(parent=str(NAME), filter=filter_text)
    return list((await servicer.ListSlices(request, None)).slices)


async def read(servicer: SliceServicer, filter_text: str = "") -> pa.Table:
    request = pb.ReadSlicesRequest(parent=str(NAME), filter=filter_text)
    pieces = [response.arrow async for response in servicer.ReadSlices(request, None)]
    return pa.ipc.open_stream(b"".join(pieces)).read_all()


async def test_what_a_check_doubts_is_told_of_slices_that_are_open_already(artifacts):
    servicer = SliceServicer(artifacts.store)
    assert [list(s.doubtful) for s in await listed(servicer)] == [[]] * 4
    assert (await read(servicer)).column("doubtful").to_pylist() == [[]] * 4
    assert len(await listed(servicer, "doubtful = 0")) == 4
    for doubted in ({"light"}, {"mood", "pose"}, set()):
        told = [{"attribute": name, "doubt": "so so" if name in doubted else ""} for name in SCHEMA.names()]
        artifacts.write_quality(TAGGING, {"attributes": told})
        expected = [[name for name in names if name in doubted] for names in ATTRIBUTES]
        assert [list(s.doubtful) for s in await listed(servicer)] == expected
        assert (await read(servicer)).column("doubtful").to_pylist() == expected
        clean = [i for i, names in enumerate(expected) if not names]
        assert [s.instance_count for s in await listed(servicer, "doubtful = 0")] == [
            (40, 30, 20, 10)[i] for i in clean
        ]
        assert (await read(servicer, "doubtful = 0 AND count > 5")).num_rows == len(clean)


def ranked(artifacts: Artifacts, count: int = 400) -> list[str]:
    """Rankings of two models; the second fails where the mood is x and the light y."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 2, (count, 3)).astype(np.uint16)
    ids = [f"i{i}" for i in range(count)]
    table = pa.table({"instance_id": ids, "image_uri": ids, "split": ["validation"] * count})
    instances = check_instances(table, SCHEMA.task)
    part = artifacts.write_instances("pets", instances)
    artifacts.write_dataset(record_of("pets", SCHEMA.task, instances, [part], part, []))
    artifacts.write_part(TAGGING, "tags", tags_to_arrow(TagTable(pa.array(ids), codes, SCHEMA)))
    artifacts.complete(TAGGING, Manifest(Provenance({}, {"schema": SCHEMA.schema_id}), {}))
    quiet = {"on_progress": lambda *_: None, "cancelled": lambda: False}
    enumerate_artifact(artifacts, NAME, TAGGING, "validation", 10, 2, 10_000, **quiet)
    bad = (codes[:, 0] == 0) & (codes[:, 1] == 1)
    names = []
    for model, kept in (("v1", 0.9), ("v2", 0.2)):
        score = (rng.random(count) < np.where(bad, kept, 0.9)).astype(float)
        known = {"instance_id": ids, "score": score}
        scores = pa.table({name: known.get(name, [None] * count) for name in SCORES.names}, schema=SCORES)
        record = ModelRecord("pets", model, "accuracy", model, count, float(score.mean()), "")
        artifacts.write_scores(record, scores)
        ranking = Name("pets", "rankings", model)
        rank_artifact(artifacts, ranking, NAME, record, margin=0.1, permutations=20, seed=0, **quiet)
        names.append(str(ranking))
    return names


async def test_what_a_check_doubts_is_told_wherever_slices_are(artifacts):
    first, second = ranked(artifacts)
    servicer = SliceServicer(artifacts.store)

    async def told() -> list[list]:
        confirmed = await servicer.ConfirmSlices(pb.ConfirmSlicesRequest(parent=second), None)
        compared = await servicer.CompareModels(pb.CompareModelsRequest(rankings=[first, second]), None)
        gate = await servicer.CheckGate(pb.CheckGateRequest(baseline=first, candidate=second, max_drop=0.1), None)
        families = await servicer.ListFamilies(pb.ListFamiliesRequest(parent=second), None)
        slices = [family.representative for family in families.families]
        return [list(rows) for rows in (confirmed.slices, compared.worse, compared.versions, gate.violations, slices)]

    for doubted in (set(), {"mood"}):
        told_by = [{"attribute": name, "doubt": "so so" if name in doubted else ""} for name in SCHEMA.names()]
        artifacts.write_quality(TAGGING, {"attributes": told_by})
        for rows in await told():
            assert any(row.tags for row in rows)
            assert any(row.doubtful for row in rows) == bool(doubted)
            for row in rows:
                assert list(row.doubtful) == [tag.attribute for tag in row.tags if tag.attribute in doubted]
