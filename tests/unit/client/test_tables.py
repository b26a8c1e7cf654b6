"""What users have becomes what the contract asks for, or a message that names the column."""

import math
import string
from urllib.parse import unquote, urlparse

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hibug2 import UserError, tables

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return root


def rows(table, *columns):
    return list(zip(*(table[c].to_pylist() for c in columns), strict=True))


def error(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert caught.value.code == "INVALID_ARGUMENT"
    return caught.value


# Folders


def test_a_folder_per_class(tmp_path):
    root = touch(tmp_path, "dog/b.PNG", "cat/a.jpg", "cat/deep/c.webp", "cat/notes.txt", ".git/x/y.png", "cat/.h.png")
    table = tables.as_instances(root)
    assert rows(table, "instance_id", "label", "split") == [
        ("cat/a.jpg", "cat", "validation"),
        ("cat/deep/c.webp", "cat", "validation"),
        ("dog/b.PNG", "dog", "validation"),
    ]


def test_a_folder_per_split_and_class(tmp_path):
    root = touch(tmp_path, "train/cat/a.png", "val/cat/b.png", "test/dog/c.png", "pool/d.png", "pool/dog/e.png")
    table = tables.read_folder(str(root))
    assert sorted(rows(table, "instance_id", "label", "split")) == [
        ("pool/d.png", None, "pool"),
        ("pool/dog/e.png", "dog", "pool"),
        ("test/dog/c.png", "dog", "test"),
        ("train/cat/a.png", "cat", "train"),
        ("val/cat/b.png", "cat", "validation"),
    ]


def test_a_class_may_be_called_pool(tmp_path):
    table = tables.read_folder(touch(tmp_path, "pool/a.png", "garden/b.png"))
    assert rows(table, "label", "split") == [("garden", "validation"), ("pool", "validation")]


@quick
@given(name=st.text(string.ascii_letters + " #%?&äß", min_size=1, max_size=8))
def test_uris_lead_back_to_the_file(tmp_path, name):
    root = touch(tmp_path / "photos of mine", f"cat/{name}.png")
    uris = tables.read_folder(root)["image_uri"].to_pylist()
    paths = [unquote(uri.removeprefix("file://")) for uri in uris]
    assert str(root / f"cat/{name}.png") in paths
    assert all(urlparse(uri).scheme == "file" and urlparse(uri).fragment == "" for uri in uris)


def test_folders_that_say_nothing_clear(tmp_path):
    assert "holds no images" in str(error(tables.read_folder, touch(tmp_path / "a", "cat/readme.txt")))
    assert "lies in no class folder" in str(error(tables.read_folder, touch(tmp_path / "b", "x.png", "cat/y.png")))
    assert "lies in no class folder" in str(error(tables.read_folder, touch(tmp_path / "c", "train/x.png")))
    mixed = touch(tmp_path / "d", "train/cat/x.png", "cat/y.png")
    assert "beside others (cat)" in str(error(tables.read_folder, mixed))


# Manifests


def test_a_manifest_of_images(tmp_path):
    (tmp_path / "m.csv").write_text("uri,label,split,weather\nimg/a b.png,cat,val,sunny\ns3://x/b.png,dog,,\n")
    table = tables.as_instances(tmp_path / "m.csv")
    assert table.column_names == ["instance_id", "image_uri", "label", "split", "weather"]
    assert table.to_pylist() == [
        {
            "instance_id": "img/a b.png",
            "image_uri": (tmp_path / "img" / "a b.png").as_uri(),
            "label": "cat",
            "split": "validation",
            "weather": "sunny",
        },
        {
            "instance_id": "s3://x/b.png",
            "image_uri": "s3://x/b.png",
            "label": "dog",
            "split": "validation",
            "weather": None,
        },
    ]


@pytest.mark.parametrize("names", ["left,top,width,height", "x,y,w,h", "left_px,top_px,width_px,height_px"])
def test_a_manifest_of_boxes(tmp_path, names):
    (tmp_path / "m.csv").write_text(f"uri,label,{names}\na.png,cat,1,2.5,3,4\na.png,dog,0,0,1,1\nb.png,cat,0,0,1,1\n")
    table = tables.as_instances(tmp_path / "m.csv")
    assert table["instance_id"].to_pylist() == ["a.png", "a.png#2", "b.png"]
    boxes = rows(table, "left_px", "top_px", "width_px", "height_px")
    assert boxes[0] == (1.0, 2.5, 3.0, 4.0)
    assert all(table.schema.field(c).type == pa.float64() for c in ("left_px", "height_px"))


def test_width_and_height_of_the_image_are_no_box():
    table = tables.as_instances(pa.table({"uri": ["a.png"], "width": [640], "height": [480]}))
    assert table.column_names == ["instance_id", "image_uri", "split", "width", "height"]


def test_tables_and_data_frames_are_manifests_too():
    columns = {"image_uri": ["s3://x/a.png", "s3://x/b.png"], "id": [1, 2], "label": ["cat", None]}
    frame = pd.DataFrame(columns, index=[7, 9])
    expected = tables.as_instances(pa.table(columns))
    assert tables.as_instances(frame).equals(expected)
    assert expected["instance_id"].to_pylist() == ["1", "2"]


@given(uris=st.lists(st.sampled_from(["a", "b", "a#2", "a#3", "b#2"]), min_size=1, max_size=12))
def test_made_ids_are_unique_and_single_uris_stay(uris):
    table = {"uri": uris, "x": [0] * len(uris), "y": [0] * len(uris), "w": [1] * len(uris), "h": [1] * len(uris)}
    ids = tables.as_instances(pa.table(table))["instance_id"].to_pylist()
    assert len(set(ids)) == len(ids)
    for uri in set(uris):
        assert ids[uris.index(uri)] == uri


@pytest.mark.parametrize(
    ("columns", "field", "text"),
    [
        ({"file": ["a"]}, "image_uri", "the columns are file"),
        ({"uri": ["a", None]}, "uri", "is empty in row 2"),
        ({"uri": ["a", ""]}, "uri", "is empty in row 2"),
        ({"uri": ["a", "b", "a"]}, "uri", "rows 1 and 3"),
        ({"uri": ["a", "b"], "id": ["1", "1"]}, "id", "rows 1 and 2"),
        ({"uri": ["a"], "id": [None]}, "id", "is empty in row 1"),
        ({"uri": ["a"], "x": [1], "y": [1], "w": [1]}, "height_px", "is missing"),
        ({"uri": ["a"], "x": ["one"], "y": [1], "w": [1], "h": [1]}, "x", "no number"),
        ({"uri": ["a"], "instance_id": ["1"], "image_uri": ["b"], "label": [["x"]]}, "label", "list"),
        ({"uri": pa.array([], pa.string())}, "images", "holds no rows"),
    ],
)
def test_manifests_that_are_wrong(columns, field, text):
    caught = error(tables.as_instances, pa.table(columns))
    assert caught.violations[0].field == field
    assert text in str(caught)


# Files


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in str(error(tables.read_table, tmp_path / "none.csv"))
    (tmp_path / "empty.csv").write_text("")
    assert "cannot be read" in str(error(tables.read_table, tmp_path / "empty.csv"))
    (tmp_path / "head.csv").write_text("id,score\n")
    assert "holds no rows" in str(error(tables.read_table, tmp_path / "head.csv"))
    (tmp_path / "twice.csv").write_text("id,id\n1,2\n")
    assert "'id' more than once" in str(error(tables.read_table, tmp_path / "twice.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    assert "cannot be read" in str(error(tables.read_table, tmp_path / "bad.parquet"))
    (tmp_path / "ragged.csv").write_text("id,score\n1,2\n3\n")
    assert "cannot be read" in str(error(tables.read_table, tmp_path / "ragged.csv"))
    (tmp_path / "latin.csv").write_bytes("id,score\nM\xfcll,1\n".encode("latin-1"))
    assert "cannot be read" in str(error(tables.read_table, tmp_path / "latin.csv"))
    (tmp_path / "t.xlsx").write_bytes(b"x")
    assert "neither .csv nor .parquet" in str(error(tables.read_table, tmp_path / "t.xlsx"))
    assert "no path, Arrow table or DataFrame" in str(error(tables.as_table, 7, "scores"))


def test_csv_keeps_text_as_it_is(tmp_path):
    (tmp_path / "t.csv").write_text('\ufeffid,a,b\n007,NA,"two\nlines"\n008,,nan\n', encoding="utf-8")
    table = tables.read_table(tmp_path / "t.csv")
    assert table.to_pylist() == [
        {"id": "007", "a": "NA", "b": "two\nlines"},
        {"id": "008", "a": None, "b": "nan"},
    ]


# Scores


def test_scores_by_value(tmp_path):
    (tmp_path / "s.csv").write_text("uri,score,confidence,note\na.png,1,0.5,x\nb.png,0.25,,y\n")
    table = tables.as_scores(tmp_path / "s.csv")
    assert table.to_pylist() == [
        {"instance_id": "a.png", "score": 1.0, "confidence": 0.5},
        {"instance_id": "b.png", "score": 0.25, "confidence": None},
    ]


def test_scores_by_prediction():
    table = tables.as_scores(pd.DataFrame({"id": [1], "predicted": ["cat"], "prob_dog": [0.25], "prob_cat": [0.75]}))
    assert table.to_pylist() == [{"instance_id": "1", "predicted_label": "cat", "probabilities": [0.25, 0.75]}]
    lists = pa.table({"id": ["1"], "predicted_label": ["cat"], "probabilities": pa.array([[0.25, 0.75]])})
    assert tables.as_scores(lists).equals(table)


def test_wrong_and_right_may_be_booleans():
    assert tables.as_scores({"id": ["a", "b"], "score": [True, False]})["score"].to_pylist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("columns", "field", "text"),
    [
        ({"score": [1.0]}, "instance_id", "no column id"),
        ({"id": ["a"], "scores": [1.0]}, "score", "the columns are id, scores"),
        ({"id": ["a"], "score": ["good"]}, "score", "no number"),
        ({"id": [None], "score": [1.0]}, "id", "row 1"),
        ({"id": ["a"], "predicted": ["b"], "probabilities": ["0.5"]}, "probabilities", "list of numbers"),
        ({"id": ["a"], "predicted": ["b"], "p_cat": ["x"]}, "p_cat", "no number"),
    ],
)
def test_scores_that_are_wrong(columns, field, text):
    caught = error(tables.as_scores, pa.table(columns))
    assert caught.violations[0].field == field
    assert text in str(caught)


# Tables to enumerate


@quick
@given(
    data=st.lists(
        st.tuples(st.one_of(st.none(), TEXT), st.one_of(st.none(), TEXT), st.floats(0, 1)), min_size=1, max_size=20
    )
)
def test_csv_and_parquet_give_the_same_tags(tmp_path, data):
    columns = zip(*data, strict=True)
    kinds = (pa.string(), pa.string(), pa.float64())
    table = pa.table(dict(zip("abs", map(pa.array, columns, kinds), strict=True)))
    pa.parquet.write_table(table, tmp_path / "t.parquet")
    pa.csv.write_csv(table, tmp_path / "t.csv")
    from_csv, from_parquet = (tables.as_attributes(tmp_path / f"t.{end}", ["s"]) for end in ("csv", "parquet"))
    assert from_parquet.column_names == from_csv.column_names == ["a", "b", "s"]
    assert from_csv["s"].to_pylist() == pytest.approx(from_parquet["s"].to_pylist())
    for name in "ab":
        assert from_csv[name].to_pylist() == from_parquet[name].to_pylist()


@given(numbers=st.lists(st.one_of(st.none(), st.integers(-(2**53), 2**53)), min_size=1, max_size=20))
def test_whole_numbers_are_tags_without_a_fraction(numbers):
    expected = [None if n is None else str(n) for n in numbers]
    table = tables.as_attributes({"n": pa.array(numbers, pa.int64()), "s": [0.5] * len(numbers)}, ["s"])
    assert table["n"].to_pylist() == expected


@quick
@given(numbers=st.lists(st.one_of(st.none(), st.integers(-99_999, 99_999)), min_size=1, max_size=20))
def test_whole_numbers_with_gaps_have_the_same_tags_from_every_source(tmp_path, numbers):
    frame = pd.DataFrame({"n": pd.Series(numbers, dtype="float64"), "s": 0.5})
    frame.to_csv(tmp_path / "n.csv", index=False)
    frame.to_parquet(tmp_path / "n.parquet")
    expected = [None if n is None else str(n) for n in numbers]
    for source in (frame, tmp_path / "n.csv", tmp_path / "n.parquet"):
        assert tables.as_attributes(source, ["s"])["n"].to_pylist() == expected


def test_other_kinds_of_tags():
    table = tables.as_attributes(
        pa.table(
            {
                "flag": [True, False, None],
                "real": [0.5, 2.0, math.nan],
                "small": pa.array([0.1, -0.0, None], pa.float32()),
                "coded": pa.array(["x", "y", "x"]).dictionary_encode(),
                "nothing": pa.nulls(3),
                "s": [1, 0, None],
            }
        ),
        ["s"],
    )
    assert table.to_pydict() == {
        "flag": ["True", "False", None],
        "real": ["0.5", "2", None],
        "small": ["0.1", "0", None],
        "coded": ["x", "y", "x"],
        "nothing": [None, None, None],
        "s": [1.0, 0.0, None],
    }


@pytest.mark.parametrize(
    ("scores", "text"),
    [(["t"], "no column 't'"), (["s", "s"], "twice"), (["a", "s"], "names every column")],
)
def test_score_columns_that_are_wrong(scores, text):
    caught = error(tables.as_attributes, pa.table({"a": [1.0], "s": [0.5]}), scores)
    assert caught.violations[0].field == "scores"
    assert text in str(caught)


def test_an_attribute_of_lists_is_refused():
    assert "tags: holds list" in str(error(tables.as_attributes, pa.table({"tags": [["a"]], "s": [1.0]}), ["s"]))
