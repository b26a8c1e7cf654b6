from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from services.gateway.datasets import MAX_GIVEN, check_images, check_instances, record_of
from shared.errors import InvalidInput, Unavailable
from shared.images.reader import ImageReader
from shared.schema import Task
from shared.store.artifacts import INSTANCES

GOOD = {
    "instance_id": pa.array(["a", "b", "c"]),
    "image_uri": pa.array(["file:///i/1.png", "file:///i/1.png", "file:///i/2.png"]),
    "label": pa.array(["bear", None, ""]),
    "split": pa.array(["train", "", None]),
    "left_px": pa.array([1.5, None, 0.0]),
    "top_px": pa.array([1.5, None, -3.0]),
    "width_px": pa.array([10.0, None, 4.0]),
    "height_px": pa.array([10.0, None, 4.0]),
}


def table(**changes) -> pa.Table:
    columns = {**GOOD, **changes}
    return pa.table({name: column for name, column in columns.items() if column is not None})


def refusal(wrong: pa.Table, task: Task = Task.CLASSIFICATION) -> dict[str, str]:
    with pytest.raises(InvalidInput) as refused:
        check_instances(wrong, task)
    return {violation.field: violation.description for violation in refused.value.violations}


def test_a_good_table_is_taken_row_by_row():
    got = check_instances(
        table(weather=pa.array(["wet", None, ""]), year=pa.array([1999, None, 2001])), Task.CLASSIFICATION
    )
    assert got.schema.equals(INSTANCES)
    got.validate(full=True)
    rows = got.to_pylist()
    assert [r["instance_id"] for r in rows] == ["a", "b", "c"]
    assert [r["label"] for r in rows] == ["bear", None, None]
    assert [r["split"] for r in rows] == ["train", "validation", "validation"]
    assert [r["left_px"] for r in rows] == [1.5, None, 0.0]
    assert [dict(r["given"]) for r in rows] == [{"weather": "wet", "year": "1999"}, {}, {"year": "2001"}]
    assert {r["kind"] for r in rows} == {"object"}


def test_two_columns_are_enough():
    got = check_instances(
        table(label=None, split=None, left_px=None, top_px=None, width_px=None, height_px=None), Task.POSE
    )
    assert got.column("given").to_pylist() == [[], [], []]
    assert got.column("label").null_count == 3


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array([1, 2, 3]), ["1", "2", "3"]),
        (pa.array([2**62, 2, 3], pa.uint64()), [str(2**62), "2", "3"]),
        (pa.array([True, False, None]), ["true", "false", None]),
        (pa.array(["x", "y", "x"]).dictionary_encode(), ["x", "y", "x"]),
        (pa.array(["x", "y", None], pa.large_string()), ["x", "y", None]),
        (pa.array(["x", "y", None], pa.string_view()), ["x", "y", None]),
        (pa.nulls(3), [None] * 3),
        (pa.chunked_array([["x"], ["y", "z"]]), ["x", "y", "z"]),
    ],
)
def test_columns_of_other_types_become_text(column, told):
    got = check_instances(table(instance_id=pa.array([1, 2, 3]), thing=column), Task.CLASSIFICATION)
    assert got.column("instance_id").to_pylist() == ["1", "2", "3"]
    assert [dict(given).get("thing") for given in got.column("given").to_pylist()] == told


def test_a_column_called_given_is_given():
    got = check_instances(table(given=pa.array(["x", "y", None])), Task.CLASSIFICATION)
    assert [dict(given) for given in got.column("given").to_pylist()] == [{"given": "x"}, {"given": "y"}, {}]


def test_boxes_may_be_whole_numbers_of_any_size():
    got = check_instances(table(left_px=pa.array([2**60 + 1, None, 0])), Task.CLASSIFICATION)
    assert got.column("left_px").to_pylist() == [2.0**60, None, 0.0]


KEYPOINT = {"keypoint": "nose", "x_px": 1.0, "y_px": 2.0, "visibility": "visible"}


def test_keypoints_are_kept():
    got = check_instances(table(keypoints=pa.array([[KEYPOINT], None, []])), Task.POSE)
    assert got.column("keypoints").to_pylist() == [[KEYPOINT], None, []]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"instance_id": None}, "instances.instance_id"),
        ({"image_uri": None}, "instances.image_uri"),
        ({"instance_id": pa.array(["a", "b", "a"])}, "instances[2].instance_id"),
        ({"instance_id": pa.array(["a", "", "c"])}, "instances[1].instance_id"),
        ({"instance_id": pa.array(["a", None, "c"])}, "instances[1].instance_id"),
        ({"instance_id": pa.array(["a", "x" * 1025, "c"])}, "instances[1].instance_id"),
        ({"instance_id": pa.array([[1], [2], [3]])}, "instances.instance_id"),
        ({"instance_id": pa.array([b"a", b"b", b"c"])}, "instances.instance_id"),
        ({"instance_id": pa.array([b"a", b"b", b"\xff"], pa.large_binary())}, "instances.instance_id"),
        ({"image_uri": pa.array(["x", None, "y"])}, "instances[1].image_uri"),
        ({"label": pa.array(["a=b", None, None])}, "instances[0].label"),
        ({"label": pa.array([None, " bear", None])}, "instances[1].label"),
        ({"label": pa.array([None, "bear\n", None])}, "instances[1].label"),
        ({"label": pa.array([None, ",bear", None])}, "instances[1].label"),
        ({"label": pa.array(["x" * 81, None, None])}, "instances[0].label"),
        ({"split": pa.array(["train", "dev", None])}, "instances[1].split"),
        ({"left_px": pa.array([1.0, 1.0, 0.0])}, "instances[1].box"),
        ({"left_px": pa.array(["1", "2", "3"])}, "instances.left_px"),
        ({"left_px": pa.array([float("nan"), None, 0.0])}, "instances[0].box.left"),
        ({"top_px": pa.array([float("inf"), None, 0.0])}, "instances[0].box.top"),
        ({"width_px": pa.array([0.0, None, 4.0])}, "instances[0].box.width"),
        ({"height_px": pa.array([1.0, None, -4.0])}, "instances[2].box.height"),
        ({"keypoints": pa.array([1, 2, 3])}, "instances.keypoints"),
        ({"keypoints": pa.array([[{"x": 1}], None, None])}, "instances.keypoints"),
        ({"bytes": pa.array([b"a", b"b", None])}, "instances.bytes"),
        ({"parts": pa.array([{"a": 1}, None, None])}, "instances.parts"),
        ({"took": pa.array([(1, 1, 1), None, None], pa.month_day_nano_interval())}, "instances.took"),
        ({f"c{i}": pa.array(["x"] * 3) for i in range(MAX_GIVEN + 1)}, "instances"),
    ],
)
def test_every_fault_is_refused_by_field(changes, field):
    assert field in refusal(table(**changes))


def test_no_rows_and_one_name_twice_are_refused():
    assert "instances" in refusal(table().slice(0, 0))
    twice = table().append_column("label", pa.array(["x"] * 3))
    assert "instances" in refusal(twice)


def test_an_instance_of_a_detection_dataset_has_a_box():
    assert set(refusal(table(), Task.DETECTION)) == {"instances[1].box"}
    no_boxes = table(left_px=None, top_px=None, width_px=None, height_px=None)
    assert len(refusal(no_boxes, Task.DETECTION)) == 3


def test_all_faults_are_told_at_once():
    found = refusal(table(instance_id=pa.array(["a", "a", ""]), split=pa.array(["x", None, None])))
    assert set(found) == {"instances[1].instance_id", "instances[2].instance_id", "instances[0].split"}


kinds = {
    "instance_id": st.text(max_size=3) | st.none(),
    "image_uri": st.sampled_from(["file:///a", "", None]),
    "label": st.sampled_from(["bear", "", "a=b", None]),
    "split": st.sampled_from(["train", "pool", "", "dev", None]),
    "left_px": st.sampled_from([0.0, None, float("nan")]),
    "top_px": st.sampled_from([0.0, None]),
    "width_px": st.sampled_from([1.0, None, 0.0]),
    "height_px": st.sampled_from([1.0, None, -1.0]),
}


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries(kinds), min_size=1, max_size=4), st.sampled_from(list(Task)))
def test_a_table_is_refused_exactly_when_a_row_breaks_a_rule(rows, task):
    def good(row) -> bool:
        box = [row[name] for name in ("left_px", "top_px", "width_px", "height_px")]
        whole = None not in box
        return bool(
            row["instance_id"]
            and sum(r["instance_id"] == row["instance_id"] for r in rows) == 1
            and row["image_uri"]
            and row["label"] != "a=b"
            and row["split"] != "dev"
            and (whole or (box == [None] * 4 and task is not Task.DETECTION))
            and (not whole or (box[0] == 0 and box[2] > 0 and box[3] > 0))
        )

    columns = {name: pa.array([row[name] for row in rows], INSTANCES.field(name).type) for name in kinds}
    if all(map(good, rows)):
        assert check_instances(pa.table(columns), task).num_rows == len(rows)
    else:
        found = refusal(pa.table(columns), task)
        named = {int(field.split("[")[1].split("]")[0]) for field in found}
        assert named
        assert all(not good(rows[i]) for i in named)


def test_the_record_counts_what_is_there():
    got = check_instances(table(), Task.CLASSIFICATION)
    record = record_of("bears", Task.CLASSIFICATION, got, ["p"], "d", ["r", ""])
    assert (record.instance_count, record.splits) == (3, {"train": 1, "validation": 2})
    assert (record.main_objects, record.parts, record.request_ids) == (("bear",), ("p",), ("r",))


@pytest.fixture
def images(tmp_path: Path) -> tuple[ImageReader, str]:
    for i in (1, 2):
        Image.new("RGB", (20, 10)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    return ImageReader((tmp_path.as_uri(),)), tmp_path.as_uri()


def checked(images, uris, **more) -> None:
    reader, base = images
    changed = table(image_uri=pa.array([uri if ":" in uri else f"{base}/{uri}" for uri in uris]), **more)
    check_images(check_instances(changed, Task.CLASSIFICATION), reader, threads=2)


def test_images_that_open_and_hold_their_boxes_pass(images):
    checked(images, ["1.png", "1.png", "2.png"])


@pytest.mark.parametrize(
    ("uris", "fields"),
    [
        (["bad.png", "1.png", "2.png"], {"instances[0].image_uri"}),
        (["1.png", "none.png", "none.png"], {"instances[1].image_uri"}),
        (["1.png", "file:///etc/passwd", "bad.png"], {"instances[1].image_uri", "instances[2].image_uri"}),
    ],
)
def test_rows_whose_image_is_bad_are_named(uris, fields, images):
    with pytest.raises(InvalidInput) as refused:
        checked(images, uris)
    assert {violation.field for violation in refused.value.violations} == fields


def test_a_box_outside_its_image_is_named(images):
    with pytest.raises(InvalidInput) as refused:
        checked(images, ["1.png", "1.png", "1.png"], left_px=pa.array([30.0, None, 0.0]))
    assert [violation.field for violation in refused.value.violations] == ["instances[0].box"]


def test_storage_that_is_away_is_no_fault_of_the_images(images, monkeypatch):
    def away(*_):
        raise Unavailable("away")

    monkeypatch.setattr(ImageReader, "open", away)
    with pytest.raises(Unavailable):
        checked(images, ["1.png", "1.png", "2.png"])
