"""The command over a real socket: what it prints, and how it ends."""

import io
import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from importlib.metadata import EntryPoint

import grpc
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console
from typer.testing import CliRunner

from hibug2 import embedded, messages, progress, show
from hibug2.command import app
from hibug2.v1 import prediction_pb2, repair_pb2, run_pb2, slice_pb2, types_pb2

RUNNING, SUCCEEDED, FAILED = (
    types_pb2.JOB_STATE_RUNNING,
    types_pb2.JOB_STATE_SUCCEEDED,
    types_pb2.JOB_STATE_FAILED,
)


@pytest.fixture
def hibug2(gateway, monkeypatch):
    monkeypatch.setenv("HIBUG2_ADDRESS", gateway.address)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return result

    return invoke


@pytest.fixture
def photos(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "validation/cat/c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"image")
    return tmp_path / "photos"


def copy(run):
    return run_pb2.Run.FromString(run.SerializeToString())


def three_snapshots(gateway):
    running = gateway.add_run(state=RUNNING)
    running.steps.append(gateway.step(run_pb2.STEP_KIND_SCHEMA, SUCCEEDED, reused=True))
    running.steps.append(
        gateway.step(run_pb2.STEP_KIND_TAGGING, RUNNING, done_count=12, total_count=100, rate_per_second=20)
    )
    ended = copy(gateway.add_run())
    ended.steps.append(running.steps[0])
    ended.steps.append(gateway.step(run_pb2.STEP_KIND_TAGGING, SUCCEEDED, done_count=100, total_count=100))
    # A run has two selections: by slice, and at random.
    ended.steps.append(gateway.step(run_pb2.STEP_KIND_SELECTION, SUCCEEDED, done_count=7))
    ended.steps.append(run_pb2.Step(kind=run_pb2.STEP_KIND_SELECTION, skipped="no pool"))
    gateway.add_run(state=RUNNING)
    return [running, running, ended]


def test_help_names_the_verbs_and_the_exit_codes(hibug2):
    text = " ".join(hibug2("--help").stdout.split())
    verbs = "dataset scores run watch slices families ask compare gate predict repair report enumerate schema"
    for verb in verbs.split():
        assert f" {verb} " in text
    for words in ("Exit codes: 0", "2 wrong", "3 the server cannot be reached", "130 interrupted"):
        assert words in text.replace("│ ", "")


def test_help_waits_for_neither_grpc_nor_arrow():
    code = "import sys, hibug2.command; print({'grpc', 'pyarrow', 'numpy', 'google'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_datasets(hibug2, photos):
    made = json.loads(hibug2("dataset", "create", "bears", "--images", photos, "--json").stdout)
    assert (made["name"], made["instance_count"], made["task"]) == ("datasets/bears", 3, "classification")
    assert "train 2, validation 1" in hibug2("dataset", "list").stdout
    assert "model v1: 4 scored" in hibug2("dataset", "show", "bears").stdout
    assert json.loads(hibug2("--json", "dataset", "show", "bears").stdout)["models"][0]["scored_count"] == 4
    assert json.loads(hibug2("dataset", "list", "--json").stdout)["datasets"][0]["name"] == "datasets/bears"
    assert "there is a dataset 'bears'" in hibug2("dataset", "create", "bears", "--images", photos, code=2).stderr
    hibug2("dataset", "delete", "bears")
    assert hibug2("dataset", "list").stdout.strip() == "No datasets."


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["dataset", "create", "bears", "--images", "nowhere"], "--images: there is no folder or file 'nowhere'"),
        (["dataset", "show", "bears"], "there is no datasets/bears"),
        (["slices", "abc"], "there is no runs/abc"),
        (["slices", "latest"], "there is no run yet"),
        (["scores", "add", "bears", "v1", "none.csv"], "none.csv: there is no such file"),
        (["enumerate", "none.csv", "--scores", "s", "--out", "nowhere/x.parquet"], "--out: there is no folder"),
        (["enumerate", "none.csv", "--scores", ",", "--out", "x.parquet"], "--scores: names no column"),
        (["enumerate", "t.csv", "--scores", "s", "--top", "3", "--out", "x.parquet"], "--top: goes with --errors"),
        (["dataset", "create", "bears"], "--images"),
        (["dataset", "create", "bears", "--images", ".", "--task", "sorting"], "--task"),
        (["run", "bears"], "--model"),
        (["ask", "abc", "pose"], "terms: 'pose' is not"),
        (["compare", "abc"], "there is no runs/abc"),
        (["gate", "--baseline", "v1", "--candidate", "v2"], "--max-drop"),
        (["gate", "--baseline", "v1", "--candidate", "v2", "--max-drop", "2"], "--max-drop"),
        (
            ["gate", "--baseline", "v1", "--candidate", "v2", "--max-drop", "0", "--threshold", "a"],
            "--threshold: 'a' in",
        ),
        (["gate", "--baseline", "v1", "--candidate", "v2", "--max-drop", "0", "--severity", "a=0"], "--severity: 'a'"),
        (["gate", "--baseline", "v1", "--candidate", "v2", "--max-drop", "0", "--significance", "1"], "significance: "),
        (["gate", "--baseline", "v1", "--candidate", "v2", "--max-drop", "0"], "dataset: none has scores of both"),
        (["fly"], "fly"),
    ],
)
def test_wrong_usage_and_input_end_with_two_and_name_the_field(hibug2, arguments, text):
    result = hibug2(*arguments, code=2)
    assert text in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_a_refused_field_is_named_once(hibug2, tmp_path):
    (tmp_path / "s.csv").write_text("id,score\na,1.5\n")
    result = hibug2("scores", "add", "bears", "v1", tmp_path / "s.csv", code=2)
    assert result.stderr == "error: score: must lie in [0, 1]; row 1 has 1.5\n"


def test_scores(hibug2, tmp_path):
    (tmp_path / "s.csv").write_text("id,score\na,1\nb,0\n")
    assert "datasets/bears/models/v1: 2 scored" in hibug2("scores", "add", "bears", "v1", tmp_path / "s.csv").stdout


def test_a_server_that_is_away_ends_with_three(hibug2):
    result = hibug2("runs", "--address", "127.0.0.1:1", code=3)
    assert "127.0.0.1:1" in result.stderr
    assert "make up" in result.stderr


def test_a_failure_of_the_server_ends_with_one_and_tells_the_request(hibug2, gateway):
    gateway.faults = [grpc.StatusCode.INTERNAL]
    result = hibug2("runs", code=1)
    assert gateway.metadata[0]["x-request-id"] in result.stderr


def test_debug_shows_the_traceback(gateway, monkeypatch):
    monkeypatch.setenv("HIBUG2_ADDRESS", gateway.address)
    result = CliRunner().invoke(app, ["slices", "abc", "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_a_run_tells_its_progress_and_its_worst_slices(hibug2, gateway):
    gateway.watches = [three_snapshots(gateway)]
    result = hibug2("run", "bears", "--model", "v1", "--depth", 2, "--min-count", 5, "--margin", 0.1, "--seed", 4)
    assert gateway.requests[0].parameters.max_depth == 2
    lines = result.stderr.splitlines()
    assert "schema: was there already" in lines
    assert lines.count("tagging: 12 of 100, 20/s") == 1
    assert "tagging: 100 done in 2 s" in lines
    assert [line for line in lines if line.startswith("selection")] == [
        "selection: 7 done in 2 s",
        "selection: left out: no pool",
    ]
    assert "3 error slices of 40 slices over 100 instances; overall mean 0.750" in result.stdout
    assert "[bold]brightness: dark1" in result.stdout


def test_a_run_as_json_is_one_document(hibug2, gateway):
    gateway.watches = [three_snapshots(gateway)]
    document = json.loads(hibug2("run", "bears", "--model", "v1", "--json").stdout)
    assert (document["name"], document["job"]["state"]) == ("runs/abc", "succeeded")
    assert document["steps"][1]["kind"] == "tagging"


def test_a_detached_run_prints_its_name(hibug2):
    assert hibug2("run", "bears", "--model", "v1", "--detach").stdout == "runs/abc\n"
    assert json.loads(hibug2("run", "bears", "--model", "v1", "--detach", "--json").stdout)["name"] == "runs/abc"


def test_a_schema_file_is_imported_before_the_run(hibug2, gateway, tmp_path):
    data = {"task": "classification", "main_objects": [], "attributes": {"pose": ["a", "b"]}}
    (tmp_path / "s.json").write_text(json.dumps(data))
    hibug2("run", "bears", "--model", "v1", "--detach", "--schema", tmp_path / "s.json")
    assert gateway.requests[-1].schema == "datasets/bears/schemas/s0"


@pytest.mark.parametrize("verb", ["watch", "resume"])
def test_a_failed_run_ends_with_one(hibug2, gateway, verb):
    failed = copy(gateway.add_run(state=FAILED))
    failed.job.problem.CopyFrom(types_pb2.Problem(code=3, message="depth: is more than the 2 attributes"))
    gateway.watches = [[failed], [failed]]
    result = hibug2(verb, "abc", code=1)
    assert "error: runs/abc failed: depth: is more than the 2 attributes" in result.stderr
    document = json.loads(hibug2(verb, "abc", "--json", code=1).stdout)
    assert document["job"]["problem"]["message"] == "depth: is more than the 2 attributes"


def test_interrupting_a_watch_leaves_the_run_and_ends_with_130(gateway):
    gateway.watches = [[copy(gateway.add_run(state=RUNNING)), threading.Event()]]
    code = "from hibug2.command import app; app()"
    arguments = [sys.executable, "-c", code, "watch", "abc", "--address", gateway.address]
    # A shell that starts the tests in the background has them, and what they start, ignore Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    watching = subprocess.Popen(arguments, **pipes, preexec_fn=heard)
    try:
        assert gateway.watching.wait(30)
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=30)
    finally:
        watching.kill()
    assert watching.returncode == 130
    assert "hibug2 watch abc follows it, hibug2 cancel abc stops it" in err
    assert out == ""
    assert "Traceback" not in err


def test_runs_and_cancel(hibug2, gateway):
    assert hibug2("runs").stdout.strip() == "No runs."
    gateway.add_run()
    assert "abc" in hibug2("runs").stdout
    assert json.loads(hibug2("runs", "--json").stdout)["runs"][0]["summary"]["overall_mean"] == 0.75
    assert "cancelled" in hibug2("cancel", "abc").stdout


def test_slices_for_people_and_for_programs(hibug2, gateway):
    gateway.add_run()
    gateway.slice_count = 25
    people = hibug2("slices", "runs/abc").stdout
    assert gateway.requests[-1].order_by == "p_value"
    assert people.splitlines()[0] == "runs/abc: overall mean 0.750; the surest to be bad first"
    assert people.splitlines()[2].split() == [
        *("1", "[bold]brightness:", "dark1", "11", "0.250", "█" * 10, "0.500", "12.5%", "0.010", "1"),
    ]
    assert people.splitlines()[3].split()[-3:] == ["12.5%", "–", "1"]
    assert people.count("dark") == 20
    assert "… and more" in people
    assert "… and more" not in hibug2("slices", "latest", "--limit", 25).stdout
    document = json.loads(hibug2("slices", "abc", "--json").stdout)
    assert (document["run"], document["overall_mean"], len(document["slices"])) == ("runs/abc", 0.75, 25)
    first = document["slices"][0]
    assert (first["rank"], first["count"], first["error_share"], first["q_value"]) == (1, 11, 0.125, 0.01)
    assert first["blame"] == [{"attribute": "[bold]brightness", "tag": "dark1", "drop": 0.5}]
    assert len(json.loads(hibug2("slices", "abc", "--json", "--limit", 2).stdout)["slices"]) == 2
    ordered = hibug2("slices", "abc", "--filter", "count > 5", "--order-by", "error_share desc").stdout
    assert "; by error_share desc\n" in ordered
    assert (gateway.requests[-1].filter, gateway.requests[-1].order_by) == ("count > 5", "error_share desc")
    gateway.slice_count = 0
    assert "No error slices." in hibug2("slices", "abc").stdout
    assert "No error slice passes the filter tag = Nope" in hibug2("slices", "abc", "--filter", "tag = Nope").stdout


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        ({}, "815 error slices of 40 slices over"),
        ({"family_count": 43}, "815 error slices (640 at q ≤ 0.05) in 43 families, of 40 slices over"),
        ({"family_count": 43, "expected_by_chance": 1200.4}, "(640 at q ≤ 0.05, about 1,200 by chance) in 43 families"),
        ({"family_count": 1, "expected_by_chance": 0.25}, "(640 at q ≤ 0.05, about 0.2 by chance) in 1 family, of"),
        ({"family_count": 1, "expected_by_chance": 0}, "(640 at q ≤ 0.05, about 0 by chance)"),
    ],
)
def test_a_run_tells_how_far_its_slices_are_to_be_believed(hibug2, gateway, figures, text):
    run = gateway.add_run()
    run.summary.MergeFrom(run_pb2.RunSummary(error_slice_count=815, significant_slice_count=640, **figures))
    gateway.watches = [[copy(run)]]
    assert text in hibug2("watch", "abc").stdout


def test_slices_that_were_not_tested_have_no_such_columns(capsys):
    row = {"rank": 1, "tags": [], "count": 5, "mean": 0.5, "drop": 0.25, "error_share": 0.1}
    console = Console(width=100)
    show.slices([{**row, "q_value": None, "family": None}], console)
    show.slices([{**row, "q_value": 0.0001, "family": 0}], console)
    plain, _, tested, cells = (line.split() for line in capsys.readouterr().out.splitlines())
    assert plain == ["rank", "slice", "count", "mean", "drop", "errors"]
    assert tested == [*plain, "q"]
    assert cells[-1] == "<0.001"


def test_doubtful_tags_are_marked(capsys):
    tags = [{"attribute": "mood", "tag": "calm"}, {"attribute": "light", "tag": "dark"}]
    row = {"rank": 1, "tags": tags, "count": 5, "mean": 0.5, "drop": 0.25, "error_share": 0.1, "q_value": None}
    show.slices([{**row, "family": None, "doubtful": ["mood"]}], Console(width=100))
    family = {**row, "cover_rank": 1, "covered_share": 0.5, "member_ranks": [1], "doubtful": ["mood"]}
    show.families([family], Console(width=120))
    assert capsys.readouterr().out.count("mood: calm (doubtful) · light: dark  ") == 2


@pytest.mark.parametrize(
    ("message", "to_batch", "to_show"),
    [
        (slice_pb2.ConfirmedSlice(), messages.confirmed_batch, show.confirmed),
        (slice_pb2.SliceDifference(change=slice_pb2.VERSION_CHANGE_NEW), messages.differences_batch, None),
        (slice_pb2.GateViolation(reason="fell"), messages.violations_batch, None),
        (
            prediction_pb2.PredictedSlice(method=prediction_pb2.PREDICTION_METHOD_PRIOR),
            messages.predicted_batch,
            show.predicted,
        ),
        (repair_pb2.DataNeed(description="Collect"), messages.needs_batch, partial(show.needs, more=False)),
    ],
)
def test_doubt_comes_through_with_every_kind_of_slice(message, to_batch, to_show, capsys):
    for pair in (("mood", "calm"), ("light", "dark")):
        message.tags.add(attribute=pair[0], tag=pair[1])
    for doubtful in (["mood"], []):
        message.doubtful[:] = doubtful
        (row,) = to_batch([message]).to_pylist()
        assert row["doubtful"] == doubtful
        assert [tag["attribute"] for tag in row["tags"]] == ["mood", "light"]
        if to_show is not None:
            to_show([row], Console(width=120))
            told = capsys.readouterr().out
            assert ("doubtful" in told) == bool(doubtful)
            assert ("mood" in told) or not doubtful


def test_families_for_people_and_for_programs(hibug2, gateway):
    gateway.add_run()
    people = hibug2("families", "abc").stdout.splitlines()
    assert people[1].split() == [
        *("1", "[bold]brightness:", "dark1", "11", "0.250", "█" * 10, "0.500", "0.010", "12.5%", "50.0%", "2"),
    ]
    assert people[3].split()[-2:] == ["–", "2"]
    assert "… and more" in hibug2("families", "abc", "--limit", 2).stdout
    document = json.loads(hibug2("families", "abc", "--json").stdout)
    assert [family["member_ranks"] for family in document["families"]] == [[1, 2], [3, 4], [5, 6]]
    assert len(json.loads(hibug2("families", "abc", "--json", "--limit", 1).stdout)["families"]) == 1
    gateway.slice_count = 0
    assert hibug2("families", "abc").stdout == "No error slices.\n"


def test_a_hypothesis_is_asked(hibug2, gateway):
    gateway.add_run()
    people = hibug2("ask", "abc", "pose: sitting, lying", "[b]color: white").stdout.splitlines()
    assert people == [
        "pose: sitting or lying · [b]color: white",
        "30 instances, 20 scored",
        "mean 0.500 (95%: 0.400 to 0.600), 0.250 below the overall mean 0.750; 10.0% of all errors",
        "p = 0.016: how often a random group of this size does as badly",
    ]
    assert [(t.attribute, list(t.tags)) for t in gateway.requests[-1].terms] == [
        ("pose", ["sitting", "lying"]),
        ("[b]color", ["white"]),
    ]
    document = json.loads(hibug2("ask", "abc", "pose: sitting", "--json").stdout)
    assert document["terms"] == [{"attribute": "pose", "tags": ["sitting"]}]
    assert (document["count"], document["mean"], document["overall_mean"]) == (30, 0.5, 0.75)
    assert hibug2("ask", "abc", "nothing: a").stdout.splitlines()[1:] == ["4 instances, 0 scored"]
    assert json.loads(hibug2("ask", "abc", "nothing: a", "--json").stdout)["mean"] is None


def test_models_are_compared(hibug2, gateway):
    for i, model in enumerate(("v1", "v2", "v2")):
        gateway.add_ranked_run(f"r{i}", model)
    two = hibug2("compare", "r0", "r1").stdout
    assert "50%  v1 and v2" in two
    assert "Where v2 is worse, beyond the overall difference:" in two
    assert "Error slices: 1,200 fixed, 1 regressed" in two
    row = ["[bold]brightness:", "dark1", "12", "0.750", "0.500", "-0.250"]
    lines = [line.split() for line in two.splitlines()]
    assert [*row, "0.010"] in lines
    assert ["regressed", *row] in lines
    three = hibug2("compare", "r0", "r1", "r2").stdout
    assert "50%  v2 (runs/r1) and v2 (runs/r2)" in three
    assert "50%  on average" in three
    document = json.loads(hibug2("compare", "r0", "r1", "--limit", 7, "--json").stdout)
    assert gateway.requests[-1].page_size == 7
    assert [run["name"] for run in document["runs"]] == ["runs/r0", "runs/r1"]
    assert document["overlaps"] == [{"first": "runs/r0", "second": "runs/r1", "share": 0.5}]
    assert document["changes"] == {"fixed": 1200, "regressed": 1}
    assert document["worse"][0]["tags"] == [{"attribute": "[bold]brightness", "tag": "dark1"}]
    assert "name two or more" in hibug2("compare", "r0", code=2).stderr
    gateway.add_ranked_run("deep", "v2", depth=4)
    assert "did not rank the same slices" in hibug2("compare", "r0", "deep", code=2).stderr


GATE = ("gate", "--baseline", "v1", "--candidate", "v2", "--max-drop", 0.05)


def test_a_gate_that_passes(hibug2, gateway):
    gateway.add_models(v1="s1", v2="s1")
    gateway.add_ranked_run("r1", "v1")
    gateway.add_ranked_run("r2", "v2")
    result = hibug2(*GATE)
    assert result.stdout.splitlines() == [
        "gate passed: v2 in place of v1 on bears (runs/r2 against runs/r1)",
        "- passed: nothing fell",
    ]
    assert result.stderr == ""
    request = gateway.requests[-1]
    assert (request.baseline, request.candidate) == ("datasets/bears/rankings/r1", "datasets/bears/rankings/r2")
    assert (request.max_drop, request.significance, request.HasField("max_overall_drop")) == (0.05, 0.05, False)
    arguments = ("--overall-drop", 0, "--significance", 0.25, "--threshold", "pose: lying, color: red=0.25")
    arguments += ("--severity", "grave: 0.3=0.02", "--severity", "mild: 0=1", "--every-slice")
    document = json.loads(hibug2(*GATE, *arguments, "--json").stdout)
    assert document["passed"] is True
    assert document["baseline"] == {"model": "datasets/bears/models/v1", "run": "runs/r1"}
    request = gateway.requests[-1]
    assert (request.max_overall_drop, request.HasField("max_overall_drop"), request.significance) == (0, True, 0.25)
    assert [(v.severity, v.below, v.max_drop) for v in request.severities] == [("grave", 0.3, 0.02), ("mild", 0, 1)]
    assert request.every_slice
    threshold = request.thresholds[0]
    assert [(t.attribute, t.tag) for t in threshold.tags] == [("pose", "lying"), ("color", "red")]
    assert threshold.max_drop == 0.25


def test_a_gate_that_forbids_ends_with_one_and_says_why(hibug2, gateway):
    gateway.add_models(v1="s1", v2="s1")
    gateway.add_ranked_run("r1", "v1")
    gateway.add_ranked_run("r2", "v2")
    gateway.forbid()
    assert hibug2(*GATE, code=1).stdout.splitlines() == [
        "gate failed: v2 in place of v1 on bears (runs/r2 against runs/r1)",
        "- the whole dataset: fell from 0.750 to 0.500",
        "- [bold]brightness: fell",
        "7 of 1,234 slices were held to a limit",
    ]
    document = json.loads(hibug2(*GATE, "--json", code=1).stdout)
    assert document["passed"] is False
    assert [(v["tags"], v["q_value"]) for v in document["violations"]] == [
        ([], None),
        ([{"attribute": "[bold]brightness", "tag": "dark1"}], 0.01),
    ]
    gateway.verdict.violations.extend([gateway.verdict.violations[1]] * 20)
    lines = hibug2(*GATE, code=1).stdout.splitlines()
    assert (len(lines), lines[21]) == (23, "… and 2 more (--json for all)")
    gateway.verdict.ClearField("violations")
    assert "- failed: the whole dataset; and 1 more" in hibug2(*GATE, code=1).stdout


def test_a_gate_starts_the_runs_that_are_missing(hibug2, gateway):
    gateway.add_models(v1="s1", v2="s1")
    gateway.add_ranked_run("r1", "v1")
    gateway.run_ids = ["new"]
    result = hibug2(*GATE, "--dataset", "bears")
    assert "runs/new against runs/r1" in result.stdout
    assert "runs/new  datasets/bears v2" in result.stderr
    failed = copy(gateway.add_run("worse", FAILED))
    failed.job.problem.message = "no tagger is there"
    gateway.run_ids, gateway.watches = ["worse"], [[failed]]
    result = hibug2(*GATE, "--depth", 2, code=1)
    assert "error: runs/worse failed: no tagger is there" in result.stderr
    assert result.stdout == ""


def test_a_gate_without_a_server_ends_with_three(hibug2):
    assert "127.0.0.1:1" in hibug2(*GATE, "--address", "127.0.0.1:1", code=3).stderr


def test_predictions_and_picks(hibug2, gateway):
    gateway.add_run()
    assert "colour: crimson" in hibug2("predict", "abc").stdout
    assert json.loads(hibug2("predict", "abc", "--json").stdout)["predicted_slices"][0]["origin_ranks"] == [2, 1]
    assert "file:///p1.png" in hibug2("repair", "abc").stdout
    document = json.loads(hibug2("repair", "abc", "--method", "random", "--json").stdout)
    assert [(p["instance_id"], p["image_uri"], p["slice_rank"]) for p in document["picks"]] == [
        ("p1", "file:///p1.png", 0)
    ]


def test_the_report_is_written(hibug2, gateway, tmp_path, monkeypatch):
    gateway.add_run()
    monkeypatch.chdir(tmp_path)
    hibug2("report", "abc")
    assert (tmp_path / "hibug2-abc.html").read_text("utf-8") == "<html>café</html>"
    document = json.loads(hibug2("report", "abc", "--out", "r.html", "--json").stdout)
    assert document == {"run": "runs/abc", "report": str(tmp_path / "r.html"), "bytes": 18}
    hibug2("report", "abc", "--compare", "v2=random", "--compare", "v3=lowest_mean")
    assert [c.model for c in gateway.requests[-1].compared_models] == [f"datasets/bears/models/v{i}" for i in (2, 3)]
    assert "--compare: 'v2' is not MODEL=METHOD" in hibug2("report", "abc", "--compare", "v2", code=2).stderr
    assert "is a folder" in hibug2("report", "abc", "--out", tmp_path, code=2).stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hibug2-abc.html", "r.html"]


def test_enumerate_writes_the_promised_parquet(hibug2, tmp_path):
    (tmp_path / "t.csv").write_text("colour,v1,flag,v2\nred,1,1,0.5\nred,0,1,\n,1,0,1\n")
    out = tmp_path / "slices.parquet"
    result = hibug2(
        "enumerate", tmp_path / "t.csv", "--scores", "v1,v2", "--depth", 2, "--min-count", 2, "--out", out, "--json"
    )
    assert json.loads(result.stdout) == {"slice_count": 2, "out": str(out)}
    table = pa.parquet.read_table(out)
    pair = pa.struct([("attribute", pa.string()), ("tag", pa.string())])
    names = ["tags", "count", "v1_count", "v1_mean", "v2_count", "v2_mean"]
    kinds = [pa.list_(pair), pa.int64(), pa.int64(), pa.float64(), pa.int64(), pa.float64()]
    assert table.schema.names == names
    # Parquet names the list's field otherwise; the kinds of the values are what counts.
    assert [t.value_type if pa.types.is_list(t) else t for t in table.schema.types] == [pair, *kinds[1:]]
    assert table.to_pylist() == [
        {"tags": [{"attribute": a, "tag": t}], "count": 2, "v1_count": 2, "v1_mean": 0.5, "v2_count": 1, "v2_mean": 0.5}
        for a, t in (("colour", "red"), ("flag", "1"))
    ]


def test_enumerate_passes_on_what_is_asked(hibug2, gateway, tmp_path):
    (tmp_path / "t.csv").write_text("colour,s,flag\nred,1,1\nred,0,1\n")
    command = ("enumerate", tmp_path / "t.csv", "--scores", "s", "--out", tmp_path / "o.parquet")
    hibug2(*command, "--must-hold", "flag", "--errors", "s", "--margin", 0.1, "--top", 7)
    header = gateway.requests[-1]
    assert (header.must_hold, header.error_rule.score_column) == ("flag", "s")
    assert (header.error_rule.margin, header.error_rule.max_slices) == (0.1, 7)
    assert pa.parquet.read_table(tmp_path / "o.parquet").column_names[-2:] == ["interval_low", "interval_high"]
    hibug2(*command)
    assert not gateway.requests[-1].HasField("error_rule")


def test_enumerate_leaves_nothing_behind_when_it_fails(hibug2, tmp_path):
    (tmp_path / "t.csv").write_text("a,s\n" + "".join(f"x{i},1\n" for i in range(200)))
    (tmp_path / "o.parquet").write_text("old")
    arguments = ("enumerate", tmp_path / "t.csv", "--scores", "s", "--min-count", 1, "--out", tmp_path / "o.parquet")
    assert "raise --min-count" in hibug2(*arguments, code=2).stderr
    assert (tmp_path / "o.parquet").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.parquet", "t.csv"]


# A gateway for `enumerate` alone


def test_the_embedded_server_is_used_only_where_nothing_else_is(gateway, monkeypatch):
    stopped = []

    @contextmanager
    def server():
        yield gateway.address
        stopped.append(True)

    monkeypatch.setattr(EntryPoint, "load", lambda self: server)
    entry = EntryPoint("enumeration", "somewhere:server", embedded.ENTRY_POINTS)
    monkeypatch.delenv("HIBUG2_ADDRESS", raising=False)
    monkeypatch.setattr(embedded, "DEFAULT_ADDRESS", "localhost:1")
    monkeypatch.setattr(embedded, "entry_points", lambda **_: ())
    with embedded.enumeration_address(None) as address:
        assert address == "localhost:1"
    monkeypatch.setattr(embedded, "entry_points", lambda **_: (entry,))
    with embedded.enumeration_address(None) as address:
        assert (address, stopped) == (gateway.address, [])
    assert stopped == [True]
    with embedded.enumeration_address("given:1") as address:
        assert address == "given:1"
    monkeypatch.setattr(embedded, "DEFAULT_ADDRESS", gateway.address)
    with embedded.enumeration_address(None) as address:
        assert address == gateway.address
    assert stopped == [True]


def test_bars_on_a_terminal(gateway):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    last = progress.follow(three_snapshots(gateway), console)
    assert last.job.state == SUCCEEDED
    text = console.file.getvalue()
    assert "100 done in 2 s" in text
    assert "left out: no pool" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (2, "2 s"), (16.2, "16 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_rows_say_nothing_json_cannot():
    table = pa.table({"mean": [float("nan"), 0.5]})
    assert messages.rows(table) == [{"mean": None}, {"mean": 0.5}]
