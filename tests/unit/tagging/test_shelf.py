"""What the store keeps of a tagging, from plan to table, and what another tagging takes over from it."""

from __future__ import annotations

import uuid
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.tagging import plan, reuse
from services.tagging.shelf import Figures, PartResult, Shelf
from shared.errors import DataLoss, NotFound
from shared.llm import Usage
from shared.names import Name
from shared.schema import UNKNOWN, Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import INSTANCES, Artifacts, Provenance
from shared.store.store import Store

TAGS = tuple("abcdefgh")
LOOKED = [0, 2, 3]
EDGES = tuple(i / 10 for i in range(1, len(TAGS)))
SCHEMA = Schema(
    Task.CLASSIFICATION,
    (),
    (
        Attribute("size", Category.GLOBAL, TAGS, Tagger.VLM),
        Attribute("colour", Category.GLOBAL, ("red", "blue"), Tagger.GIVEN),
        Attribute("light", Category.GLOBAL, TAGS, Tagger.MEASURED, measure=Measure("brightness", EDGES)),
        Attribute("pose", Category.GLOBAL, TAGS, Tagger.VLM),
    ),
)
KEYS = {a.name: f"key of {a.name}" for a in SCHEMA.attributes}
GIVEN = [1 if i % 2 else 0 for i in range(40)]


def instances(count: int, **changed: list) -> pa.Table:
    values = {name: pa.nulls(count, INSTANCES.field(name).type) for name in INSTANCES.names}
    values |= {
        "instance_id": [f"i{i}" for i in range(count)],
        "image_uri": [f"file:///{i}.png" for i in range(count)],
        "label": ["cat"] * count,
        "split": ["validation"] * count,
        "kind": ["object"] * count,
        "given": pa.array(
            [[("colour", SCHEMA.attributes[1].tags[g])] for g in GIVEN[:count]], INSTANCES.field("given").type
        ),
    }
    return pa.table({**values, **changed}).cast(INSTANCES)


def result(made: plan.Plan, part: plan.Part, truth: np.ndarray, dead: set[int]) -> PartResult:
    """What a worker hands back for a part: `truth` where the image can be read."""
    rows = made.rows_of(part)
    codes = truth[np.ix_(rows, made.attributes_of(part))].copy()
    reasons = {i: f"row {row} is broken" for i, row in enumerate(rows.tolist()) if row in dead}
    codes[list(reasons)] = UNKNOWN
    return PartResult(part.number, codes, reasons, Figures(Usage(1, 10, 2), 3, 1, len(reasons)))


def tagged(
    artifacts: Artifacts,
    table: pa.Table,
    truth: np.ndarray,
    *,
    dead: set[int],
    per_part: int,
    id_: str = "t",
    chunk: int = 2,
) -> Name:
    """A whole tagging, done as a service and workers would do it."""
    name = Name("pets", "taggings", id_)
    attributes = [SCHEMA.attributes[j] for j in LOOKED]
    known = reuse.known_codes(artifacts, "pets", table, attributes, [KEYS[a.name] for a in attributes])
    known = known.spread(LOOKED, len(SCHEMA.attributes))
    lacking = ~known.mask
    lacking[:, 1] = False
    made = plan.Plan(table.num_rows, plan.groups_of(lacking), per_part)
    shelf = Shelf(artifacts, name)
    facts = {"dataset": "d", "schema": "s", "prompt_digest": "p", "model": "m", "clip": ""}
    outline = shelf.write_plan(made, table, known, **facts)
    assert shelf.outline() == outline
    again = shelf.plan(outline)
    assert again.parts == made.parts
    assert again.rows.tolist() == made.rows.tolist()
    for i in range(0, len(made.parts), chunk):
        parts = made.parts[i : i + chunk]
        shelf.write_chunk(again, [result(made, part, truth, dead) for part in parts], len(SCHEMA.attributes))
    assert shelf.written().parts == {part.number for part in made.parts}
    provenance = Provenance({"dataset": "d"}, {"schema": SCHEMA.schema_id, "splits": ["validation"]})
    shelf.close(again, outline, table, SCHEMA, {}, provenance, KEYS)
    return name


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.sets(st.integers(0, 39)))
def test_the_table_holds_what_was_found_and_the_dead_are_named(count, per_part, chunk, dead):
    artifacts = Artifacts(Store(f"memory://{uuid.uuid4()}"), "team")
    artifacts.write_schema("pets", SCHEMA, Provenance({}))
    truth = np.random.default_rng(count).integers(0, len(TAGS), (count, 4)).astype(np.uint16)
    dead = {row for row in dead if row < count}
    name = tagged(artifacts, instances(count), truth, dead=dead, per_part=per_part, chunk=chunk)
    expected = truth.copy()
    expected[np.ix_(sorted(dead), LOOKED)] = UNKNOWN
    expected[:, 1] = GIVEN[:count]
    table = artifacts.tag_table(name)
    assert table.codes.tolist() == expected.tolist()
    rows = Shelf(artifacts, name).dead()
    assert [(row.instance_id, row.reason) for row in rows] == [(f"i{r}", f"row {r} is broken") for r in sorted(dead)]
    summary = artifacts.manifest(name).summary
    parts = -(-count // per_part)
    assert (summary["dead_count"], summary["asked_count"]) == (len(dead), 3 * parts)
    assert summary["usage"]["calls"] == parts
    assert artifacts.store.names(artifacts.path(name)) == [
        *("dead.parquet", "manifest.json", "plan.json", "rows.parquet", "tags.parquet")
    ]


@pytest.fixture
def artifacts(tmp_path) -> Artifacts:
    made = Artifacts(Store(tmp_path.as_uri()), "team")
    made.write_schema("pets", SCHEMA, Provenance({}))
    return made


def truth_of(count: int) -> np.ndarray:
    return np.arange(count * 4).reshape(count, 4).astype(np.uint16) % len(TAGS)


def known(artifacts: Artifacts, table: pa.Table, **keys: str) -> reuse.Known:
    attributes = [SCHEMA.attributes[j] for j in LOOKED]
    told = {**KEYS, **keys}
    return reuse.known_codes(artifacts, "pets", table, attributes, [told[a.name] for a in attributes])


def test_what_was_tagged_is_known_but_not_what_was_dead_or_is_shown_otherwise_now(artifacts):
    truth = truth_of(10)
    tagged(artifacts, instances(10), truth, dead={3}, per_part=4)
    changed = instances(12, label=["cat"] * 7 + ["dog"] + ["cat"] * 4)
    changed = changed.set_column(
        INSTANCES.get_field_index("left_px"), "left_px", pa.array([None] * 8 + [1.0] + [None] * 3, pa.float64())
    )
    found = known(artifacts, changed.take(list(reversed(range(12)))))
    is_known = [i not in (3, 7, 8, 10, 11) for i in range(12)]
    assert found.mask[::-1].all(axis=1).tolist() == is_known
    assert found.mask[::-1].any(axis=1).tolist() == is_known
    for row in np.flatnonzero(is_known):
        assert found.codes[::-1][row].tolist() == truth[row, LOOKED].tolist()


def test_only_attributes_that_would_be_tagged_alike_are_known(artifacts):
    tagged(artifacts, instances(6), truth_of(6), dead=set(), per_part=4)
    assert known(artifacts, instances(6), light="another").mask.all(axis=0).tolist() == [True, False, True]


def test_tags_are_put_together_from_several_taggings(artifacts):
    truth = truth_of(12)
    tagged(artifacts, instances(12).slice(0, 5), truth[:5], dead={2}, per_part=2, id_="first")
    assert known(artifacts, instances(12)).mask.all(axis=1).sum() == 4
    tagged(artifacts, instances(12), truth, dead=set(), per_part=2, id_="second")
    found = known(artifacts, instances(12))
    assert found.mask.all()
    assert found.codes.tolist() == truth[:, LOOKED].tolist()
    summary = artifacts.manifest(Name("pets", "taggings", "second")).summary
    assert summary["reused_count"] == 4


@pytest.mark.parametrize("part", ["plan", "chunks"])
def test_a_tagging_that_is_not_complete_is_not_taken_over(part, artifacts):
    name = tagged(artifacts, instances(4), truth_of(4), dead=set(), per_part=2)
    artifacts.store.delete(artifacts.path(name, "manifest.json"))
    assert not known(artifacts, instances(4)).mask.any()


def test_a_table_with_a_part_missing_is_not_written_but_for_parts_that_were_given_up(artifacts):
    shelf = Shelf(artifacts, Name("pets", "taggings", "t"))
    table, truth = instances(6), truth_of(6)
    lacking = np.zeros((6, 4), dtype=bool)
    lacking[:, LOOKED] = True
    made = plan.Plan(6, plan.groups_of(lacking), 2)
    nothing = reuse.Known(np.full((6, 4), UNKNOWN, dtype=np.uint16), ~lacking & False)
    facts = {"dataset": "d", "schema": "s", "prompt_digest": "p", "model": "m", "clip": ""}
    outline = shelf.write_plan(made, table, nothing, **facts)
    shelf.write_chunk(made, [result(made, made.parts[i], truth, set()) for i in (0, 2)], 4)
    provenance = Provenance({"dataset": "d"}, {"schema": SCHEMA.schema_id, "splits": []})
    with pytest.raises(DataLoss, match="lacks 1 of 3 parts"):
        shelf.close(made, outline, table, SCHEMA, {}, provenance, KEYS)
    assert not artifacts.is_complete(shelf.name)
    shelf.close(made, outline, table, SCHEMA, {0: "not this one", 1: "nobody could"}, provenance, KEYS)
    assert [(row.instance_id, row.reason) for row in shelf.dead()] == [("i2", "nobody could"), ("i3", "nobody could")]


def test_nothing_planned_is_said(artifacts):
    shelf = Shelf(artifacts, Name("pets", "taggings", "none"))
    with pytest.raises(NotFound):
        shelf.outline()
    assert shelf.dead() == []
    assert shelf.budget() is None
    shelf.write_budget("runs/r", 2.5)
    assert shelf.budget() == ("runs/r", 2.5)


VLM, MEASURED = SCHEMA.attributes[0], SCHEMA.attributes[2]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "bulk"},
        {"tags": TAGS[::-1]},
        {"description": "how large"},
        {"measure": Measure("contrast", EDGES)},
        {"measure": Measure("brightness", (*EDGES[:-1], 0.9))},
    ],
)
def test_a_key_changes_with_what_a_tagger_goes_by(change):
    attribute = MEASURED if "measure" in change else VLM
    keys = [reuse.attribute_key(a, "p", "m", "c") for a in (attribute, replace(attribute, **change))]
    assert keys[0] != keys[1]


def test_a_key_stays_while_nothing_of_that_changes():
    assert len({reuse.attribute_key(replace(VLM, locked=locked), "p", "m", "c") for locked in (True, False)}) == 1
    assert len({reuse.attribute_key(replace(VLM, sources=s), "p", "m", "c") for s in ((), ("user",))}) == 1
    assert len({reuse.attribute_key(VLM, p, m, "c") for p in "pq" for m in "mn"}) == 4
    assert len({reuse.attribute_key(MEASURED, p, m, "c") for p in "pq" for m in "mn"}) == 1
