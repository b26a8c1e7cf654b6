from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tagging import plan
from services.tagging.given import given_codes
from shared.errors import InvalidInput
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import INSTANCES

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


@given(st.integers(0, 5000), st.integers(1, 1000))
def test_the_parts_cover_each_row_once_in_order(rows, per_part):
    parts = plan.parts_of(rows, per_part)
    covered = [row for part in parts for row in range(part.first, part.first + part.count)]
    assert covered == list(range(rows))
    assert [part.number for part in parts] == list(range(len(parts)))
    assert all(1 <= part.count <= per_part for part in parts)


@given(st.integers(0, 50), st.sets(st.integers(0, 60)))
def test_what_is_missing_is_what_no_file_tells(count, done):
    parts = plan.parts_of(count, 1)
    files = [*(plan.part_file(number) for number in done), "other"]
    assert {part.number for part in plan.missing(parts, files)} == set(range(count)) - done


def test_part_files_are_listed_in_the_order_of_their_rows():
    names = [plan.part_file(number) for number in (0, 9, 10, 99_999, 100_000)]
    assert names == sorted(names)


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
    ("taggers", "image", "llm"),
    [
        ([Tagger.GIVEN], False, False),
        ([Tagger.GIVEN, Tagger.MEASURED], True, False),
        ([Tagger.CLIP], True, False),
        ([Tagger.MEASURED, Tagger.VLM], True, True),
    ],
)
def test_the_schema_says_what_is_needed(taggers, image, llm):
    schema = Schema(Task.POSE, (), tuple(attribute(tagger, str(i)) for i, tagger in enumerate(taggers)))
    assert (plan.needs_image(schema), plan.needs_llm(schema)) == (image, llm)


rows = st.lists(
    st.tuples(st.sampled_from([None, "bear", "cat"]), st.sampled_from([None, {}, {"a": "x"}, {"a": "z", "b": "x"}])),
    min_size=1,
)


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
