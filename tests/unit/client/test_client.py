"""One call each, over a real socket."""

import threading

import grpc
import pandas as pd
import pyarrow as pa
import pytest

from hibug2 import Client, HiBug2Error, RunStopped, UserError, messages
from hibug2.v1 import dataset_pb2, slice_pb2, types_pb2

PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED = (
    types_pb2.JOB_STATE_PENDING,
    types_pb2.JOB_STATE_RUNNING,
    types_pb2.JOB_STATE_SUCCEEDED,
    types_pb2.JOB_STATE_FAILED,
    types_pb2.JOB_STATE_CANCELLED,
)


def manifest(n=3):
    return pa.table({"uri": [f"s3://x/{i}.png" for i in range(n)], "label": ["cat"] * n})


def snapshots(gateway, *states):
    made = []
    for state in states:
        run = type(gateway.add_run()).FromString(gateway.add_run(state=state).SerializeToString())
        made.append(run)
    gateway.add_run(state=PENDING)
    return made


def test_datasets_come_and_go(client, gateway):
    client.create_dataset("bears", manifest(), task="detection")
    client.create_dataset("ants", manifest(5))
    assert gateway.datasets["bears"].task == types_pb2.TASK_DETECTION
    assert [d.name for d in client.datasets()] == ["datasets/ants", "datasets/bears"]
    client.add_instances("datasets/bears", pd.DataFrame({"uri": ["s3://x/new.png"]}))
    assert client.dataset("bears").instance_count == 4
    client.delete_dataset("bears")
    with pytest.raises(HiBug2Error) as caught:
        client.dataset("bears")
    assert caught.value.code == "NOT_FOUND"


def test_uploads_come_whole_in_pieces_of_a_mebibyte(client, gateway):
    table = manifest(100_000)
    client.create_dataset("bears", table)
    assert gateway.tables[0]["image_uri"].equals(table["uri"])
    assert len(gateway.piece_bytes) > 5
    assert max(gateway.piece_bytes) <= 1 << 20


def test_nothing_is_sent_when_the_input_is_wrong(client, gateway):
    with pytest.raises(UserError):
        client.create_dataset("bears", pa.table({"file": ["a"]}))
    with pytest.raises(UserError, match="task: 'sorting' is not one of classification, detection, pose"):
        client.create_dataset("bears", manifest(), task="sorting")
    with pytest.raises(UserError, match="metric"):
        client.add_scores("bears", "v1", {"id": ["a"], "score": [1]}, metric="speed")
    assert gateway.requests == []


def test_scores_and_models(client, gateway):
    client.add_scores("bears", "v1", pd.DataFrame({"id": ["a", "b"], "predicted": ["cat", "dog"]}), metric="accuracy")
    header = gateway.requests[-1]
    assert (header.parent, header.model_id, header.metric) == ("datasets/bears", "v1", types_pb2.METRIC_ACCURACY)
    assert gateway.tables[-1].column_names == ["instance_id", "predicted_label"]
    assert [m.name for m in client.models("bears")] == ["datasets/bears/models/v1"]


def test_schemas_from_mappings_and_files(client, tmp_path):
    pose = {
        "name": "pose",
        "category": "main_object",
        "tags": ["sitting", "lying"],
        "tagger": "vlm",
        "sources": ["user"],
    }
    data = {"task": "classification", "main_objects": [], "attributes": [pose]}
    stored = client.import_schema("bears", data)
    (tmp_path / "s.yaml").write_text(
        "task: classification\nmain_objects: []\nattributes:\n- {name: pose, tags: [sitting, lying]}\n"
    )
    again = client.import_schema("bears", tmp_path / "s.yaml")
    assert messages.schema_to_json(again) == messages.schema_to_json(stored) == data
    assert client.schema("bears").name == again.name
    assert client.schema("bears", "s0").name == client.schema("x", stored.name).name == stored.name
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        client.import_schema("bears", tmp_path / "s.json")
    assert [s.name for s in client.schemas("bears")] == [stored.name, again.name]


def test_names_and_tags_are_enough_for_a_schema(client, gateway):
    gateway.datasets["bears"] = dataset_pb2.Dataset(
        name="datasets/bears", task=types_pb2.TASK_POSE, main_objects=["bear", "cub"]
    )
    stored = client.import_schema(
        "bears", {"attributes": {"object pose": ["sitting", "lying"], "is wet": ["yes", "no"]}}
    )
    assert (stored.task, list(stored.main_objects)) == (types_pb2.TASK_POSE, ["bear", "cub"])
    assert [(a.attribute, a.category, a.tagger, list(a.sources)) for a in stored.attributes] == [
        (name, types_pb2.CATEGORY_MAIN_OBJECT, types_pb2.TAGGER_VLM, ["user"]) for name in ("object pose", "is wet")
    ]
    assert not client.import_schema("bears", {"main_objects": [], "attributes": {"a": ["b", "c"]}}).main_objects


def test_edits_are_done_together_or_not_at_all(client, gateway):
    client.import_schema("bears", {"task": "pose", "main_objects": [], "attributes": {"pose": ["a", "b"]}})
    edited = client.edit_schema("bears", [("rename", "pose=object pose"), ("lock", "object pose")])
    assert [(a.attribute, a.locked) for a in edited.attributes] == [("object pose", True)]
    assert client.edit_schema("bears", [("lock", "object pose")]).name == edited.name
    asked = len(gateway.requests)
    with pytest.raises(UserError, match="is locked"):
        client.edit_schema("bears", [("add", "color=red,blue"), ("drop", "object pose")])
    assert len(gateway.requests) == asked + 1
    assert client.schema("bears") == edited


def test_a_run_is_followed_to_its_end(client, gateway):
    states = snapshots(gateway, PENDING, RUNNING, SUCCEEDED)
    gateway.watches = [states]
    seen = []
    run = client.run("bears", "v1", depth=2, min_count=5, margin=0.1, budget=7, seed=3, on_progress=seen.append)
    assert run == states[-1]
    assert seen == states
    request = gateway.requests[0]
    assert (request.dataset, request.model, request.schema) == ("datasets/bears", "datasets/bears/models/v1", "")
    p = request.parameters
    assert (p.max_depth, p.min_count, p.margin, p.budget, p.seed) == (2, 5, 0.1, 7, 3)
    assert request.request_id == gateway.metadata[0]["x-request-id"]


def test_a_run_without_waiting_and_without_a_budget(client, gateway):
    run = client.run("bears", "v1", wait=False, schema="s1")
    assert run.name == "runs/abc"
    request = gateway.requests[-1]
    assert not request.parameters.HasField("budget")
    assert request.schema == "datasets/bears/schemas/s1"


@pytest.mark.parametrize("state", [FAILED, CANCELLED])
def test_a_run_that_does_not_succeed_raises(client, gateway, state):
    gateway.watches = [snapshots(gateway, RUNNING, state)]
    with pytest.raises(RunStopped) as caught:
        client.run("bears", "v1")
    assert caught.value.run.job.state == state


def test_watching_survives_a_gateway_that_goes_away(client, gateway, monkeypatch):
    monkeypatch.setattr("hibug2.client._REWATCH_S", 0)
    first, second, last = snapshots(gateway, RUNNING, RUNNING, SUCCEEDED)
    # Lost in mid-stream, then ended early by a draining server, then served to the end.
    gateway.watches = [[first, grpc.StatusCode.UNAVAILABLE], [second], [last]]
    assert list(client.watch("abc")) == [first, second, last]


def test_watching_ends_on_other_errors(client, gateway):
    first = snapshots(gateway, RUNNING)[0]
    gateway.watches = [[first, grpc.StatusCode.INTERNAL]]
    with pytest.raises(HiBug2Error) as caught:
        list(client.watch("abc"))
    assert caught.value.code == "INTERNAL"


def test_leaving_a_watch_ends_the_call(client, gateway):
    held = threading.Event()
    gateway.watches = [[*snapshots(gateway, RUNNING), held]]
    watching = client.watch("abc")
    next(watching)
    assert gateway.watching.wait(10)
    watching.close()
    assert held.wait(10)


def test_runs_by_any_name(client, gateway):
    with pytest.raises(UserError, match="there is no run yet"):
        client.get_run("latest")
    old = gateway.add_run("old")
    new = gateway.add_run("new")
    new.job.create_time.seconds += 1
    for name in ("new", "runs/new", "latest", new):
        assert client.get_run(name).name == "runs/new"
    assert [r.name for r in client.runs()] == [new.name, old.name]
    assert client.cancel("new").job.state == CANCELLED
    assert client.resume("new").name == "runs/new"


@pytest.mark.parametrize("dictionary", [False, True])
def test_slices_by_stream_and_by_page_are_the_same(client, gateway, dictionary):
    run = gateway.add_run()
    gateway.slice_count, gateway.dictionary_tags = 7, dictionary
    streamed = client.slices(run)
    paged = client.slices(run, order_by="rank")
    assert streamed.equals(paged)
    assert streamed.schema.equals(messages.SLICES)
    assert streamed["tags"][6].as_py() == [{"attribute": "[bold]brightness", "tag": "dark7"}]
    assert streamed["blame"][6].as_py() == [{"attribute": "[bold]brightness", "tag": "dark7", "drop": 0.5}]
    assert streamed["q_value"].to_pylist()[:3] == [0.01, None, 0.01]
    assert streamed["family"].to_pylist() == [1] * 7
    assert client.slices("abc", limit=3).equals(streamed.slice(0, 3))
    assert client.slices("datasets/bears/enumerations/e", filter="count > 1").num_rows == 7
    assert gateway.requests[-1].filter == "count > 1"
    gateway.slice_count = 0
    assert client.slices(run).equals(messages.SLICES.empty_table())


def test_slices_of_an_enumeration_say_nothing_of_a_model(client, gateway):
    """In a stream that column is not there at all, in a page the message is not set."""
    scores = messages.SLICES.names[3:-1]
    bare = slice_pb2.Slice(rank=0, tags=[types_pb2.AttributeTag(attribute="a", tag="b")], instance_count=4)
    row = messages.rows(pa.Table.from_batches([messages.slices_batch([bare])]))[0]
    assert {name: row[name] for name in scores} == dict.fromkeys(scores)
    gateway.streamed = ["tags", "count"]
    row = messages.rows(client.slices("datasets/bears/enumerations/e"))[0]
    assert {name: row[name] for name in scores} == dict.fromkeys(scores)


def test_families_come_in_the_order_of_the_cover(client, gateway):
    run = gateway.add_run()
    gateway.slice_count = 5
    found = client.families(run)
    assert found.schema.equals(messages.FAMILIES)
    assert found["rank"].to_pylist() == [1, 3, 5, 7, 9]
    assert found["cover_rank"].to_pylist() == [1, 2, 3, 4, 0]
    assert found["member_ranks"][1].as_py() == [3, 4]
    assert client.families("datasets/bears/rankings/r1", limit=3).equals(found.slice(0, 3))
    gateway.slice_count = 0
    assert client.families(run).equals(messages.FAMILIES.empty_table())


def test_a_hypothesis(client, gateway):
    run = gateway.add_run()
    found = client.hypothesis(run, {"pose": ["sitting", "lying"], "color": "white"})
    assert [(t.attribute, list(t.tags)) for t in gateway.requests[-1].terms] == [
        ("pose", ["sitting", "lying"]),
        ("color", ["white"]),
    ]
    assert (found["count"], found["scored_count"], found["mean"], found["p_value"]) == (30, 20, 0.5, 0.015625)
    assert set(found) <= set(messages.SLICES.names)
    nothing = client.hypothesis(run, {"nothing": "a"})
    assert (nothing.pop("count"), nothing.pop("scored_count")) == (4, 0)
    assert set(nothing.values()) == {None}


def test_models_side_by_side(client, gateway):
    runs = [gateway.add_ranked_run(f"r{i}", f"v{i}") for i in range(3)]
    three = client.compare_models(runs)
    assert gateway.requests[-1].page_size == 50
    assert [(o["first"], o["second"]) for o in three.overlaps.to_pylist()] == [
        ("runs/r0", "runs/r1"),
        ("runs/r0", "runs/r2"),
        ("runs/r1", "runs/r2"),
    ]
    assert (three.changes, three.worse.num_rows, three.versions.num_rows) == ({}, 0, 0)
    two = client.compare_models(["r0", "runs/r1"])
    assert two.changes == {"fixed": 1200, "regressed": 1}
    assert two.worse.schema.equals(messages.DIFFERENCES)
    worse, version = two.worse.to_pylist()[0], two.versions.to_pylist()[0]
    assert (worse["difference"], worse["p_value"], worse["q_value"], worse["change"]) == (-0.25, None, 0.01, "")
    assert (version["difference"], version["q_value"], version["change"]) == (-0.25, None, "regressed")
    runs[1].ranking = runs[0].ranking
    with pytest.raises(UserError, match="runs/r0 and runs/r1 have the same scores"):
        client.compare_models(runs)
    runs[1].dataset = "datasets/ants"
    with pytest.raises(UserError, match="runs/r1 of datasets/ants"):
        client.compare_models(runs)


def test_results_of_a_run_that_is_not_there_yet(client, gateway):
    gateway.add_run(state=RUNNING)
    for call in (client.slices, client.families, client.predicted, client.picks):
        with pytest.raises(HiBug2Error, match="hibug2 watch runs/abc") as caught:
            call("abc")
        assert caught.value.code == "FAILED_PRECONDITION"


@pytest.mark.parametrize(
    ("state", "words"),
    [(FAILED, "it failed"), (types_pb2.JOB_STATE_PAUSED, "it is paused"), (CANCELLED, "it was cancelled")],
)
def test_a_run_that_ended_before_its_results_is_to_be_resumed(client, gateway, state, words):
    gateway.add_run(state=state)
    with pytest.raises(HiBug2Error, match=f"has no ranking: {words}; `hibug2 resume runs/abc`") as caught:
        client.slices("abc")
    assert caught.value.code == "FAILED_PRECONDITION"


def test_a_run_that_left_steps_out_has_empty_results(client, gateway):
    run = gateway.add_run(prediction="")
    del run.selections[:]
    assert client.predicted("abc").equals(messages.PREDICTED.empty_table())
    assert client.picks("abc").equals(messages.PICKS.empty_table())


def test_predictions_picks_instances_and_report(client, gateway):
    gateway.add_run()
    predicted = client.predicted("abc").to_pylist()
    assert predicted[0]["method"] == "tag_substitution"
    assert predicted[0]["replaced"] == {"attribute": "colour", "tag": "red"}
    assert client.picks("abc")["slice_rank"].to_pylist() == [1, 1]
    assert client.picks("abc", "random")["slice_rank"].to_pylist() == [0]
    with pytest.raises(UserError, match="method"):
        client.picks("abc", "best")
    assert client.slice_instances("abc", {"colour": "red"}) == ["i0", "i1", "i2"]
    assert client.report("abc") == "<html>café</html>".encode()


def test_what_repair_brought(client, gateway):
    gateway.add_run()
    found = client.compare_repair("abc", {"v2": "random", "v3": "lowest_mean"}).to_pylist()
    assert [(row["model"], row["method"], row["added_count"]) for row in found] == [
        ("v1", "original", 0),
        ("v2", "random", 9),
        ("v3", "lowest_mean", 9),
    ]
    assert (found[0]["failing_mean"], found[0]["other_mean"]) == (0.25, None)
    request = gateway.requests[-1]
    assert (request.ranking, request.split) == ("datasets/bears/rankings/r1", "test")
    assert request.compared_models[0].model == "datasets/bears/models/v2"
    client.report("abc", {"v2": "random"})
    assert gateway.requests[-1].compared_models[0].selection == "datasets/bears/selections/s2"
    gateway.add_run("bare").selections.pop()
    with pytest.raises(UserError, match="no random picks"):
        client.compare_repair("bare", {"v2": "random"})


@pytest.mark.parametrize("dictionary", [False, True])
def test_any_table_can_be_enumerated(client, gateway, dictionary):
    gateway.dictionary_tags = dictionary
    frame = pd.DataFrame({"a": ["x", "x", None, "y"], "s": [1.0, 0.0, 1.0, None], "n": [1, 1, 2, 2]})
    found = client.enumerate(frame, ["s"], depth=2, min_count=2)
    assert found.schema.equals(messages.enumeration_schema(["s"]))
    assert found.to_pylist() == [
        {"tags": [{"attribute": "a", "tag": "x"}], "count": 2, "s_count": 2, "s_mean": 0.5},
        {"tags": [{"attribute": "n", "tag": "1"}], "count": 2, "s_count": 2, "s_mean": 0.5},
        {"tags": [{"attribute": "n", "tag": "2"}], "count": 2, "s_count": 1, "s_mean": 1.0},
    ]
    header = gateway.requests[-1]
    assert (list(header.score_columns), header.max_depth, header.min_count) == (["s"], 2, 2)
    assert client.enumerate(frame, ["s"], min_count=99).num_rows == 0


def test_a_refusal_in_mid_table_arrives_as_itself(client):
    table = {"a": [str(i) for i in range(200)], "s": [1] * 200}
    with pytest.raises(HiBug2Error, match="raise --min-count") as caught:
        client.enumerate(table, ["s"], min_count=1)
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "TOO_LARGE")


def test_every_call_has_its_own_request_id_and_the_team_and_token_given(gateway, monkeypatch):
    monkeypatch.setenv("HIBUG2_ADDRESS", gateway.address)
    monkeypatch.setenv("HIBUG2_TOKEN", "from-environment")
    with Client(team="red", token="mine") as named, Client() as plain:
        named.datasets()
        named.datasets()
        plain.datasets()
    first, _, third = gateway.metadata
    assert len({m["x-request-id"] for m in gateway.metadata}) == 3
    assert (first["x-hibug2-team"], first["authorization"]) == ("red", "Bearer mine")
    assert "x-hibug2-team" not in third
    assert third["authorization"] == "Bearer from-environment"


def test_calls_are_tried_again_while_the_gateway_is_unavailable(client, gateway):
    gateway.faults = [grpc.StatusCode.UNAVAILABLE] * 2
    assert client.datasets() == []
    assert len(gateway.requests) == 3
    assert len({m["x-request-id"] for m in gateway.metadata}) == 1


def test_other_failures_are_not_tried_again(client, gateway):
    gateway.faults = [grpc.StatusCode.INTERNAL]
    with pytest.raises(HiBug2Error):
        client.datasets()
    assert len(gateway.requests) == 1
