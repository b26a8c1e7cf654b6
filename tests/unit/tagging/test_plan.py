from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.tagging import plan
from services.tagging.given import given_codes
from shared.errors import InvalidInput
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import INSTANCES

calm = settings(deadline=None)  # busy machines
SPLITS = ["train", "validation", "pool", "test"]


def instances(splits: list[str], **columns: list) -> pa.Table:
    n = len(splits)
    values = {name: pa.nulls(n, INSTANCES.field(name).type) for name in INSTANCES.names}
    values |= {
        "instance_id": [f"i{i}" for i in range(n)],
        "image_uri": ["x"] * n,
        "split": splits,
        "kind": ["object"] * n,
    }
    return pa.table({**values, **columns}).cast(INSTANCES)


@calm
@given(st.lists(st.integers(0, 2000), max_size=4), st.integers(1, 1000))
def test_the_parts_cover_each_row_once_in_order_and_no_part_spans_groups_or_shards(group_rows, per_part):
    parts = plan.parts_of(group_rows, per_part)
    covered = [row for part in parts for row in range(part.start, part.start + part.count)]
    assert covered == list(range(sum(group_rows)))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert all(1 <= part.count <= per_part for part in parts)
    for group, rows in enumerate(group_rows):
        assert sum(part.count for part in parts if part.group == group) == rows
    for shard in {part.shard for part in parts}:
        inside = [row for part in parts if part.shard == shard for row in range(part.first, part.first + part.count)]
        assert inside == list(range(len(inside)))


lacking = st.integers(1, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=30)
)


@calm
@given(lacking, st.integers(1, 5))
def test_every_tag_that_is_lacking_is_asked_for_once_and_no_other(lacking, per_part):
    lacking = np.array(lacking)
    made = plan.Plan(len(lacking), plan.groups_of(lacking), per_part)
    asked = np.zeros(lacking.shape, dtype=int)
    for part in made.parts:
        rows = made.rows_of(part)
        assert made.shards[part.shard][part.first : part.first + part.count].tolist() == rows.tolist()
        asked[np.ix_(rows, made.attributes_of(part))] += 1
    assert (asked == lacking).all()
    assert len({group.attributes for group in made.groups}) == len(made.groups)
    assert all((np.diff(group.rows) > 0).all() for group in made.groups)


@calm
@given(st.lists(st.sampled_from(SPLITS), min_size=1, max_size=8), st.lists(st.sampled_from(SPLITS), max_size=3))
def test_the_rows_of_the_splits_are_tagged_in_order_and_train_only_when_asked(there, asked):
    table = instances(there)
    wanted = [f"i{i}" for i, split in enumerate(there) if (split in asked if asked else split != "train")]
    if wanted:
        assert plan.rows_to_tag(table, asked).column("instance_id").to_pylist() == wanted
    else:
        with pytest.raises(InvalidInput, match="splits"):
            plan.rows_to_tag(table, asked)


def attribute(tagger: Tagger, name: str = "a", tags=("x", "y")) -> Attribute:
    measure = Measure("brightness", (0.5,)) if tagger is Tagger.MEASURED else None
    return Attribute(name, Category.GLOBAL, tags, tagger, measure=measure)


@pytest.mark.parametrize(
    ("taggers", "looked", "llm"),
    [
        ([Tagger.GIVEN], (), False),
        ([Tagger.GIVEN, Tagger.MEASURED], (1,), False),
        ([Tagger.CLIP, Tagger.GIVEN, Tagger.MEASURED], (0, 2), False),
        ([Tagger.MEASURED, Tagger.VLM], (0, 1), True),
    ],
)
def test_the_schema_says_what_is_needed(taggers, looked, llm):
    schema = Schema(Task.POSE, (), tuple(attribute(tagger, str(i)) for i, tagger in enumerate(taggers)))
    assert (plan.looked_at(schema), plan.needs_llm(schema)) == (looked, llm)


rows = st.lists(
    st.tuples(st.sampled_from([None, "bear", "cat"]), st.sampled_from([None, {}, {"a": "x"}, {"a": "z", "b": "x"}])),
    min_size=1,
)


@calm
@given(rows)
def test_given_tags_are_read_off_label_and_columns(values):
    labels, given_ = [label for label, _ in values], [None if g is None else list(g.items()) for _, g in values]
    table = instances(["pool"] * len(values), label=labels, given=pa.array(given_, INSTANCES.field("given").type))
    asked = [attribute(Tagger.GIVEN, MAIN_OBJECT, ("bear",)), attribute(Tagger.GIVEN), attribute(Tagger.GIVEN, "c")]
    codes = given_codes(table, asked)
    assert codes.dtype == "uint16"
    assert codes.tolist() == [
        [0 if label == "bear" else UNKNOWN, 0 if g and g.get("a") == "x" else UNKNOWN, UNKNOWN] for label, g in values
    ]
