from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.datasets import check_instances, record_of
from shared.errors import DataLoss, NotFound
from shared.names import Name
from shared.schema import UNKNOWN, Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import (
    INSTANCES,
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    column_by_id,
    item_columns,
    items_of,
    scores_in_order,
    table_digest,
    tag_table_of,
    tags_to_arrow,
    teams,
)
from shared.store.store import Store
from tests.unit.shared.schemas import schemas

SCHEMA = Schema(Task.CLASSIFICATION, (), (Attribute("color", Category.GLOBAL, ("red", "blue"), Tagger.VLM),))


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(Store(tmp_path.as_uri()), "team-a")


@st.composite
def tag_tables(draw: st.DrawFn) -> TagTable:
    schema = draw(schemas())
    n = draw(st.integers(0, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = np.empty((n, len(schema.attributes)), np.uint16)
    for j, attribute in enumerate(schema.attributes):
        codes[:, j] = rng.choice([*range(len(attribute.tags)), UNKNOWN], n)
    return TagTable(pa.array([f"é{i}" for i in rng.permutation(n)], pa.string()), codes, schema)


@given(tag_tables(), st.data())
def test_a_tag_table_is_read_back_whatever_its_chunks(table, data):
    arrow = tags_to_arrow(table)
    cut = data.draw(st.integers(0, arrow.num_rows))
    for stored in (arrow, pa.concat_tables([arrow.slice(0, cut), arrow.slice(cut)])):
        back = tag_table_of(stored, table.schema)
        assert back.codes.dtype == np.uint16
        assert back.codes.tolist() == table.codes.tolist()
        assert back.instance_ids.equals(table.instance_ids)
        assert back.tag_counts.tolist() == [len(a.tags) for a in table.schema.attributes]


@given(tag_tables(), st.data())
def test_taking_rows_takes_ids_and_codes(table, data):
    n = len(table.codes)
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=5)) if n else [], dtype=np.int64)
    taken = table.take(rows)
    assert taken.instance_ids.to_pylist() == [table.instance_ids[int(i)].as_py() for i in rows]
    assert taken.codes.tolist() == table.codes[rows].tolist()


def test_columns_that_are_not_the_schemas_are_data_loss():
    table = pa.table({"instance_id": ["a"], "pose": pa.array([0], pa.uint16())})
    with pytest.raises(DataLoss, match="columns"):
        tag_table_of(table, SCHEMA)


rows = st.lists(
    st.tuples(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.none() | st.floats()),
    max_size=20,
)


@given(rows, st.data())
def test_the_digest_is_of_the_content_not_of_its_chunks(values, data):
    columns = {
        "text": pa.array([t for t, _ in values], pa.string()),
        "n": pa.array([n for _, n in values], pa.float64()),
    }
    table = pa.table(columns)
    cut = data.draw(st.integers(0, len(values)))
    again = [table.slice(0, cut), table.slice(cut)]
    padded = pa.concat_tables([pa.table({"text": ["x"], "n": [1.0]}), table]).combine_chunks().slice(1)
    assert table_digest(pa.concat_tables(again)) == table_digest(table) == table_digest(padded)


@given(rows, rows)
def test_different_tables_have_different_digests(one, other):
    made = [
        pa.table({"text": pa.array([t for t, _ in r], pa.string()), "n": pa.array([n for _, n in r], pa.float64())})
        for r in (one, other)
    ]
    if repr(one) != repr(other):
        assert table_digest(made[0]) != table_digest(made[1])


def instances(n: int, first: int = 0) -> pa.Table:
    table = pa.table(
        {
            "instance_id": [f"i{first + i}" for i in range(n)],
            "image_uri": [f"file:///images/{i}.png" for i in range(n)],
            "label": ["bear", None] * (n // 2) + ["cat"] * (n % 2),
            "weather": ["wet", None] * (n // 2) + [None] * (n % 2),
        }
    )
    return check_instances(table, Task.CLASSIFICATION)


def add_dataset(artifacts: Artifacts, dataset: str = "bears") -> pa.Table:
    one, two = instances(5), instances(4, first=5)
    parts = [artifacts.write_instances(dataset, part) for part in (one, two)]
    whole = pa.concat_tables([one, two])
    artifacts.write_dataset(record_of(dataset, Task.CLASSIFICATION, whole, parts, "digest", ["r1"]))
    return whole


def test_a_dataset_is_read_back_with_its_parts_in_order(artifacts):
    whole = add_dataset(artifacts)
    record = artifacts.dataset("bears")
    assert (record.instance_count, record.splits, record.main_objects) == (9, {"validation": 9}, ("bear", "cat"))
    assert record.request_ids == ("r1",)
    back = artifacts.instances(record)
    assert back.schema.equals(INSTANCES)
    assert back.equals(whole.combine_chunks())


def test_a_dataset_is_its_teams_own_and_gone_when_deleted(artifacts):
    add_dataset(artifacts)
    other = Artifacts(artifacts.store, "team-b")
    assert (artifacts.datasets(), other.datasets()) == (["bears"], [])
    with pytest.raises(NotFound, match="no dataset 'bears'"):
        other.dataset("bears")
    assert teams(artifacts.store) == ["team-a"]
    artifacts.delete_dataset("bears")
    assert artifacts.datasets() == []
    assert not artifacts.store.exists("teams/team-a/datasets/bears")


def test_instances_without_a_record_are_no_dataset(artifacts):
    artifacts.write_instances("bears", instances(3))
    assert artifacts.datasets() == []


def test_a_part_that_was_lost_is_told(artifacts):
    add_dataset(artifacts)
    record = artifacts.dataset("bears")
    artifacts.store.delete(f"teams/team-a/datasets/bears/instances/{record.parts[0]}.parquet")
    with pytest.raises(NotFound, match=record.parts[0]):
        artifacts.instances(record)


def test_models_are_kept_by_name_and_their_scores_by_content(artifacts):
    scores = pa.table({"instance_id": ["a"], "score": [0.5]})
    for model in ("v1", "v2"):
        record = ModelRecord("bears", model, "custom", "d", 1, 0.5, "2024-01-01T00:00:00Z")
        artifacts.write_scores(record, scores)
        assert artifacts.model("bears", model) == record
    artifacts.delete_model("bears", "v1")
    assert artifacts.models("bears") == ["v2"]
    with pytest.raises(NotFound, match="no model 'v1'"):
        artifacts.model("bears", "v1")
    assert artifacts.scores(artifacts.model("bears", "v2")).equals(scores)


def test_the_last_schema_written_is_current_and_the_first_provenance_stands(artifacts):
    assert artifacts.current_schema_id("bears") is None
    other = Schema(Task.POSE, (), SCHEMA.attributes)
    first = artifacts.write_schema("bears", SCHEMA, Provenance({"dataset": "one"}))
    second = artifacts.write_schema("bears", other, Provenance({"dataset": "one"}))
    assert artifacts.current_schema_id("bears") == second
    assert artifacts.write_schema("bears", SCHEMA, Provenance({"dataset": "two"})) == first
    assert artifacts.current_schema_id("bears") == first
    assert artifacts.schemas("bears") == sorted([first, second])
    schema, provenance = artifacts.schema("bears", first)
    assert schema == SCHEMA
    assert provenance.inputs == {"dataset": "one"}
    with pytest.raises(NotFound, match="no schema 'x'"):
        artifacts.schema("bears", "x")


def test_an_artifact_is_there_once_its_manifest_is(artifacts):
    name = Name("bears", "taggings", "t1")
    table = TagTable(pa.array(["a", "b"]), np.array([[0], [UNKNOWN]], np.uint16), SCHEMA)
    artifacts.write_schema("bears", SCHEMA, Provenance({}))
    artifacts.write_part(name, "tags", tags_to_arrow(table))
    assert not artifacts.is_complete(name)
    with pytest.raises(NotFound, match="not finished"):
        artifacts.tag_table(name)
    manifest = Manifest(
        Provenance({"d": "x"}, {"schema": SCHEMA.schema_id, "n": 3}, {"p": "q"}, "m", 7), {"instance_count": 2}
    )
    artifacts.complete(name, manifest)
    assert artifacts.is_complete(name)
    assert artifacts.manifest(name) == manifest
    assert artifacts.tag_table(name).codes.tolist() == [[0], [UNKNOWN]]


@pytest.mark.parametrize(
    ("splits", "rows"), [(None, [0, 1, 2, 3]), (["pool"], [1, 3]), (["test", "pool"], [1, 2, 3]), (["train"], [])]
)
def test_the_tags_of_a_split_come_with_its_instances(artifacts, splits, rows):
    table = (
        instances(5)
        .drop_columns(["split"])
        .append_column("split", pa.array(["validation", "pool", "test", "pool", "train"]))
    )
    whole = table.select(INSTANCES.names).cast(INSTANCES)
    part = artifacts.write_instances("bears", whole)
    artifacts.write_dataset(record_of("bears", Task.CLASSIFICATION, whole, [part], "digest", []))
    artifacts.write_schema("bears", SCHEMA, Provenance({}))
    name = Name("bears", "taggings", "t1")
    tags = TagTable(pa.array([f"i{i}" for i in range(4)]), np.array([[0], [1], [UNKNOWN], [0]], np.uint16), SCHEMA)
    artifacts.write_part(name, "tags", tags_to_arrow(tags))
    artifacts.complete(name, Manifest(Provenance({}, {"schema": SCHEMA.schema_id}), {}))
    found, there = artifacts.tagged(name, splits)
    assert found.instance_ids.to_pylist() == there.column("instance_id").to_pylist() == [f"i{i}" for i in rows]
    assert found.codes.tolist() == tags.codes[rows].tolist()
    assert there.equals(whole.take(pa.array(rows, pa.int64())).combine_chunks())


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), unique=True), st.lists(st.integers(0, 20), unique=True))
def test_scores_come_in_the_order_of_the_ids(scored, asked):
    table = pa.table(
        {
            "instance_id": pa.array(map(str, scored), pa.string()),
            "score": pa.array([i / 20 for i in scored], pa.float64()),
        }
    )
    ids = pa.array(map(str, asked), pa.string())
    got = scores_in_order(table, ids)
    assert [None if np.isnan(v) else v for v in got] == [i / 20 if i in scored else None for i in asked]
    assert column_by_id(table, ids, "score").to_pylist() == [i / 20 if i in scored else None for i in asked]


@given(st.integers(0, 5), st.integers(1, 4))
def test_items_are_read_back(n, depth):
    items = np.arange(n * depth, dtype=np.int32).reshape(n, depth) - 1
    table = pa.table({**item_columns(items), "count": pa.array(np.zeros(n))})
    assert items_of(table).tolist() == items.tolist()
    assert items_of(table).shape == (n, depth)
