"""Picks that are asked for with rules of their own, what to collect, and files for training code."""

from __future__ import annotations

import json

import pyarrow.csv
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from hibug2 import messages
from hibug2.command import app
from hibug2.errors import HiBug2Error, UserError
from hibug2.repair import PickRules
from hibug2.v1 import repair_pb2, run_pb2, types_pb2

PAIR = {"attribute": "[bold]colour", "tag": "dark, red"}


@pytest.fixture
def hibug2(gateway, monkeypatch):
    monkeypatch.setenv("HIBUG2_ADDRESS", gateway.address)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return result

    return invoke


def test_a_selection_is_made_with_its_rules_and_rivals(client, gateway):
    run = gateway.add_run()
    run.parameters.budget, run.parameters.seed, run.parameters.pool_split = 70, 4, "pool"
    rules = PickRules(3, ["a", "b"], without_near_copies=True, spread=True, one_per_family=True, embeddings="s3://e")
    made = client.select("abc", "drop_support", rivals=["margin", "k_center"], rules=rules)
    sent = next(r for r in gateway.requests if isinstance(r, repair_pb2.CreateSelectionRequest))
    assert sent.method == repair_pb2.SELECTION_METHOD_DROP_SUPPORT
    assert list(sent.rival_methods) == [repair_pb2.SELECTION_METHOD_MARGIN, repair_pb2.SELECTION_METHOD_K_CENTER]
    assert (sent.ranking, sent.budget, sent.seed, sent.split) == ("datasets/bears/rankings/r1", 70, 4, "pool")
    assert sent.options == repair_pb2.SelectionOptions(
        class_quota=3,
        excluded_instance_ids=["a", "b"],
        without_near_copies=True,
        spread=True,
        one_per_family=True,
        embeddings_uri="s3://e",
    )
    assert (made.name, made.pick_count, made.near_copy_count) == ("datasets/bears/selections/drop_support", 1, 3)
    assert made.methods.schema.equals(messages.PICKED_METHODS)
    assert client.selected(made)["tags"].to_pylist() == [[PAIR], [PAIR]]
    client.selected(made, "margin")
    assert gateway.requests[-1].method == repair_pb2.SELECTION_METHOD_MARGIN
    client.select("abc", budget=5, seed=0, split="test")
    sent = [r for r in gateway.requests if isinstance(r, repair_pb2.CreateSelectionRequest)][-1]
    assert (sent.budget, sent.seed, sent.split) == (5, 0, "test")


def test_a_selection_that_fails_says_why(client, gateway):
    gateway.add_run()
    gateway.problem = types_pb2.Problem(code=9, reason="PRECONDITION", message="no probabilities")
    with pytest.raises(HiBug2Error, match="no probabilities"):
        client.select("abc", "margin")
    for call in (lambda: client.select("abc", "best"), lambda: client.select("abc", rivals=["best"])):
        with pytest.raises(UserError, match="best"):
            call()


def test_what_to_collect(client, gateway):
    gateway.add_run()
    (row,) = client.data_needs("abc", wanted=10).to_pylist()
    assert (row["missing_count"], row["prompt"]) == (8, "A realistic photo of bear.")
    assert gateway.requests[-1].wanted_count == 10


def test_models_trained_with_any_selection_are_compared(client, gateway):
    gateway.add_run()
    found = client.compare_repair("abc", {"v2": "datasets/bears/selections/x#margin", "v3": "random"}, repaired=[2, 1])
    sent = gateway.requests[-1]
    assert sent.compared_models[0].selection == "datasets/bears/selections/x"
    assert sent.compared_models[0].method == repair_pb2.SELECTION_METHOD_MARGIN
    assert sent.compared_models[1].method == repair_pb2.SELECTION_METHOD_UNSPECIFIED
    assert list(sent.repaired_ranks) == [2, 1]
    first, second, _ = found["groups"].to_pylist()
    assert first == [
        {"group": "failing", "scored_count": 4, "mean": 0.25, "change": None, "change_low": None, "change_high": None}
    ]
    assert (second[0]["group"], second[0]["change"], second[0]["change_low"]) == ("matching", 0.25, 0.125)


def read_csv(path):
    return pyarrow.csv.read_csv(path).to_pylist()


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "read"),
    [("p.csv", read_csv), ("p.parquet", lambda p: pyarrow.parquet.read_table(p).to_pylist()), ("P.JSONL", read_jsonl)],
)
def test_picks_are_written_as_rows(hibug2, gateway, tmp_path, name, read):
    gateway.add_run()
    out = tmp_path / name
    assert name in hibug2("repair", "abc", "--out", str(out)).stdout
    rows = read(out)
    assert [(r["instance_id"], r["slice_rank"], r["pool_index"]) for r in rows] == [("p1", 1, 5), ("p2", 1, 2)]
    assert rows[0]["tags"] in ([PAIR], "[bold]colour: dark, red")


def test_picks_are_written_as_a_coco_image_list(hibug2, gateway, tmp_path):
    gateway.add_run()
    out = tmp_path / "p.coco.json"
    document = json.loads(hibug2("repair", "abc", "--out", str(out), "--json").stdout)
    assert document["out"] == str(out)
    found = json.loads(out.read_text())
    assert [(i["id"], i["file_name"]) for i in found["images"]] == [(5, "file:///p1.png"), (2, "file:///p2.png")]
    assert found["images"][0]["tags"] == {"[bold]colour": "dark, red"}
    assert found["annotations"] == found["categories"] == []


def test_picks_are_written_as_places_in_the_pool(hibug2, gateway, tmp_path):
    gateway.add_run()
    out = tmp_path / "p.index.json"
    hibug2("repair", "abc", "--out", str(out))
    assert json.loads(out.read_text()) == [5, 2]


def test_a_run_without_error_slices_says_why_there_are_no_picks(hibug2, gateway):
    run = gateway.add_run()
    del run.selections[:]
    run.steps.add(kind=run_pb2.STEP_KIND_SELECTION, skipped="no error slices")
    shown = hibug2("repair", "abc").stdout
    assert "No picks." in shown
    assert "left them out: no error slices" in shown


def test_a_file_of_no_format_is_refused_before_anything_is_asked(hibug2, gateway, tmp_path):
    gateway.add_run()
    said = hibug2("repair", "abc", "--out", str(tmp_path / "p.json"), code=2).stderr
    assert ".index.json" in said
    assert not gateway.requests


def test_the_command_makes_selections_with_rules(hibug2, gateway, tmp_path):
    gateway.add_run()
    ids = tmp_path / "ids.txt"
    ids.write_text("a\n\n b \n")
    options = ["--method", "p_value", "--rival", "margin", "--per-class", "4", "--exclude", str(ids), "--budget", "6"]
    shown = hibug2("repair", "abc", *options, "--without-near-copies").stdout
    sent = next(r for r in gateway.requests if isinstance(r, repair_pb2.CreateSelectionRequest))
    assert (sent.budget, sent.options.class_quota) == (6, 4)
    assert list(sent.options.excluded_instance_ids) == ["a", "b"]
    assert sent.options.without_near_copies
    assert "margin" in shown
    assert "[bold]colour: dark, red" in shown
    document = json.loads(hibug2("repair", "abc", *options, "--json").stdout)
    assert document["selection"] == "datasets/bears/selections/p_value"
    assert document["near_copy_count"] == 3
    assert [m["method"] for m in document["methods"]] == ["lowest_mean", "margin"]
    assert "cannot be read" in hibug2("repair", "abc", "--exclude", str(tmp_path / "none"), code=2).stderr


def test_the_command_says_what_to_collect(hibug2, gateway):
    gateway.add_run()
    assert "Collect 8 images with [bold]colour red" in hibug2("repair", "abc", "--collect").stdout
    (need,) = json.loads(hibug2("repair", "abc", "--collect", "--wanted", "3", "--json").stdout)["needs"]
    assert need["prompt"] == "A realistic photo of bear."
    assert gateway.requests[-1].wanted_count == 3


def test_the_command_says_what_a_repair_brought(hibug2, gateway):
    gateway.add_run()
    shown = hibug2("repair", "abc", "--compare", "v2=random", "--slice", "2").stdout
    assert "+0.250" in shown
    assert "+0.125 … +0.375" in shown
    assert list(gateway.requests[-1].repaired_ranks) == [2]
    document = json.loads(hibug2("repair", "abc", "--compare", "v2=random", "--split", "validation", "--json").stdout)
    assert [row["method"] for row in document["outcomes"]] == ["original", "random"]
    assert gateway.requests[-1].split == "validation"
    assert "MODEL=PICKS" in hibug2("repair", "abc", "--compare", "v2", code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        (["--collect", "--out", "p.csv"], "--out: does nothing with --collect"),
        (["--collect", "--method", "lowest_mean"], "--method: does nothing with --collect"),
        (["--collect", "--slice", "1"], "--slice: goes with --compare"),
        (["--compare", "v2=random", "--out", "p.csv"], "--out: does nothing with --compare"),
        (["--compare", "v2=random", "--spread"], "--spread: does nothing with --compare"),
        (["--compare", "v2=random", "--collect"], "--collect: does nothing with --compare"),
        (["--wanted", "3"], "--wanted: goes with --collect"),
        (["--slice", "1"], "--slice: goes with --compare"),
    ],
)
def test_an_option_of_another_question_is_refused(hibug2, gateway, arguments, refused):
    gateway.add_run()
    assert refused in hibug2("repair", "abc", *arguments, code=2).stderr
    assert not gateway.requests
