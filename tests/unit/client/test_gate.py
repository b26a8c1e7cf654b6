"""Which runs a gate holds against each other, and what it asks of the gateway."""

import functools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibug2 import HiBug2Error, UserError, messages
from hibug2.gate import Wanted, comparable_runs
from hibug2.v1 import dataset_pb2, model_pb2, run_pb2, types_pb2

BEARS = "datasets/bears"


def created(gateway):
    return [request for request in gateway.requests if isinstance(request, run_pb2.CreateRunRequest)]


@pytest.fixture
def bears(gateway):
    gateway.add_models(v1="s1", v2="s1")
    gateway.run_ids = ["new1", "new2", "new3"]
    return gateway


def test_the_newest_pair_with_the_same_slices_is_taken(client, bears):
    bears.add_ranked_run("old1", "v1", seconds=1)
    bears.add_ranked_run("old2", "v2", seconds=2)
    bears.add_ranked_run("deep1", "v1", depth=4, seconds=3)
    bears.add_ranked_run("deep2", "v2", depth=4, seconds=4)
    bears.add_ranked_run("deeper1", "v1", depth=5, seconds=5)
    found = client.gate("v1", "v2", max_drop=0.1)
    assert (found.baseline.name, found.candidate.name) == ("runs/deep1", "runs/deep2")
    found = client.gate("v1", f"{BEARS}/models/v2", max_drop=0.1, depth=3)
    assert (found.baseline.name, found.candidate.name) == ("runs/old1", "runs/old2")
    assert created(bears) == []


def test_the_missing_run_is_started_like_the_one_there(client, bears):
    bears.add_ranked_run("r1", "v1", depth=2)
    seen = []
    start = functools.partial(client.run, on_progress=seen.append)
    found = client.gate("v1", "v2", max_drop=0.1, start=start)
    assert (found.baseline.name, found.candidate.name) == ("runs/r1", "runs/new1")
    (request,) = created(bears)
    p = request.parameters
    assert (request.model, request.schema) == (f"{BEARS}/models/v2", f"{BEARS}/schemas/s0")
    assert (p.max_depth, p.min_count, p.margin, p.seed) == (2, 10, 0.2, 7)
    assert seen == [found.candidate]


def test_both_runs_are_started_with_what_was_asked_for(client, bears):
    found = client.gate("v1", "v2", max_drop=0.1, min_count=5, margin=0.0)
    assert (found.baseline.name, found.candidate.name) == ("runs/new1", "runs/new2")
    assert [r.model for r in created(bears)] == [f"{BEARS}/models/v1", f"{BEARS}/models/v2"]
    for request in created(bears):
        assert (request.parameters.max_depth, request.parameters.min_count, request.parameters.margin) == (3, 5, 0)


@pytest.mark.parametrize("stale", [{"scores": "s0"}, {"instances": "d0"}])
def test_runs_of_other_scores_or_instances_are_not_todays(client, bears, stale):
    bears.add_ranked_run("r1", "v1")
    bears.add_ranked_run("r2", "v2", **stale)
    assert client.gate("v1", "v2", max_drop=0.1).candidate.name == "runs/new1"


def test_the_baseline_is_run_again_when_the_tags_have_changed(client, bears):
    bears.add_ranked_run("r1", "v1")
    bears.tagged = "now"
    found = client.gate("v1", "v2", max_drop=0.1)
    assert (found.baseline.name, found.candidate.name) == ("runs/new2", "runs/new1")
    assert found.baseline.enumeration == found.candidate.enumeration


def test_runs_that_are_named_are_taken_as_they_are(client, bears):
    bears.add_ranked_run("r1", "v1", depth=2, scores="s0")
    bears.add_ranked_run("r2", "v2", depth=2)
    bears.add_ranked_run("deep", "v2", depth=4)
    assert client.gate("runs/r1", client.get_run("r2"), max_drop=0.1).passed
    with pytest.raises(UserError, match="candidate: runs/r1 and runs/deep did not rank the same slices"):
        client.gate("runs/r1", "runs/deep", max_drop=0.1)
    assert created(bears) == []
    found = client.gate("v1", "runs/deep", max_drop=0.1)
    assert (found.baseline.name, found.baseline.parameters.max_depth) == ("runs/new1", 4)
    bears.tagged = "now"
    with pytest.raises(UserError, match="did not rank the same slices"):
        client.gate("runs/r1", "v2", max_drop=0.1, depth=3)
    bears.add_run("busy", types_pb2.JOB_STATE_RUNNING)
    with pytest.raises(HiBug2Error, match="hibug2 watch runs/busy"):
        client.gate("runs/busy", "v2", max_drop=0.1)


def test_the_dataset_is_the_only_one_that_has_both_models(client, bears):
    bears.add_ranked_run("r1", "v1")
    bears.add_ranked_run("r2", "v2")
    bears.datasets["ants"] = dataset_pb2.Dataset(name="datasets/ants")
    bears.models["datasets/ants"] = {"v1": "s1"}
    assert client.gate("v1", "v2", max_drop=0.1).candidate.dataset == BEARS
    with pytest.raises(UserError, match="dataset: none has scores of both v1 and v3"):
        client.gate("v1", "v3", max_drop=0.1)
    with pytest.raises(UserError, match="candidate: 'v2' is no model of datasets/ants; there are v1"):
        client.gate("v1", "v2", max_drop=0.1, dataset="ants")
    bears.models["datasets/ants"] = {"v1": "s1", "v2": "s1"}
    for arguments, named in ((("v1", "v2"), None), ((f"{BEARS}/models/v1", "v2"), "ants"), (("runs/r1", "v2"), "ants")):
        with pytest.raises(UserError, match="dataset: more than one is meant: datasets/ants, datasets/bears"):
            client.gate(*arguments, max_drop=0.1, dataset=named)
    assert created(bears) == []


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"max_drop": 1.5}, "max_drop"),
        ({"max_drop": 0.1, "max_overall_drop": -0.1}, "max_overall_drop"),
        ({"max_drop": float("nan")}, "max_drop"),
        ({"max_drop": 0.1, "significance": 0.0}, "significance"),
        ({"max_drop": 0.1, "significance": 1.0}, "significance"),
        ({"max_drop": 0.1, "severities": [("grave", 0.3, 2.0)]}, "severities"),
        ({"max_drop": 0.1, "thresholds": [({"pose": "lying"}, 2.0)]}, "thresholds"),
    ],
)
def test_nothing_is_sent_when_a_limit_is_wrong(client, bears, wrong, name):
    with pytest.raises(UserError, match=f"^{name}: "):
        client.gate("v1", "v2", **wrong)
    assert bears.requests == []


def test_what_is_forbidden(client, bears):
    bears.add_ranked_run("r1", "v1")
    bears.add_ranked_run("r2", "v2")
    bears.forbid()
    found = client.gate("v1", "v2", max_drop=0.05, thresholds=[({"pose": "lying"}, 0.25)], every_slice=True)
    assert (found.passed, found.compared_slice_count, found.judged_slice_count) == (False, 1234, 7)
    assert found.violations.schema.equals(messages.VIOLATIONS)
    assert found.violations["tags"].to_pylist() == [[], [{"attribute": "[bold]brightness", "tag": "dark1"}]]
    assert found.violations["q_value"].to_pylist() == [None, 0.01]
    request = bears.requests[-1]
    assert (request.thresholds[0].max_drop, request.every_slice, request.significance) == (0.25, True, 0.05)


# Any history of runs


@dataclass
class Shelf:
    """The dataset with its models v1 and v2 and some runs; tags are those of `tagged`."""

    history: list[run_pb2.Run]
    tagged: str
    started: list[run_pb2.Run] = field(default_factory=list)

    def models(self, dataset):
        return [model_pb2.Model(name=f"{dataset}/models/{m}", digest=f"{m} today") for m in ("v1", "v2")]

    def dataset(self, dataset):
        return dataset_pb2.Dataset(name=dataset, digest="today")

    def runs(self, dataset):
        return self.history

    def start(self, dataset, model, *, depth, min_count, margin, schema, seed):
        slices = (depth, min_count, schema or f"{BEARS}/schemas/a", self.tagged)
        model_id = model.rpartition("/")[2]
        self.started.append(a_run(f"started{len(self.started)}", model_id, *slices, f"{model_id} today", "today"))
        return self.started[-1]


def a_run(name, model, depth, min_count, schema, tagged, scores, instances, state=types_pb2.JOB_STATE_SUCCEEDED):
    run = run_pb2.Run(name=f"runs/{name}", dataset=BEARS, model=f"{BEARS}/models/{model}", schema=schema)
    run.job.state = state
    run.enumeration = f"{BEARS}/enumerations/{depth}-{min_count}-{schema[-1]}-{tagged}"
    run.ranking = f"{BEARS}/rankings/{name}"
    run.parameters.CopyFrom(run_pb2.RunParameters(max_depth=depth, min_count=min_count, margin=0.2))
    run.provenance.inputs.add(input="dataset", digest=instances)
    run.provenance.inputs.add(input="scores", digest=scores)
    return run


HISTORY = st.lists(
    st.builds(
        lambda model, scores, *rest: a_run("r", model, *rest[:4], f"{model} {scores}", *rest[4:]),
        st.sampled_from(["v1", "v2", "v3"]),
        st.sampled_from(["today", "today", "before"]),
        st.integers(2, 3),
        st.integers(10, 11),
        st.sampled_from([f"{BEARS}/schemas/a", f"{BEARS}/schemas/b"]),
        st.sampled_from(["now", "then"]),
        st.sampled_from(["today", "today", "before"]),
        st.sampled_from([types_pb2.JOB_STATE_SUCCEEDED, types_pb2.JOB_STATE_SUCCEEDED, types_pb2.JOB_STATE_FAILED]),
    ),
    max_size=8,
)


@given(HISTORY, st.sampled_from([None, 2, 3]), st.sampled_from([None, 10, 11]))
def test_whatever_ran_before_two_runs_of_today_with_the_same_slices_are_found(history, depth, min_count):
    for i, run in enumerate(history):
        run.name = f"runs/r{i}"
    shelf = Shelf(history, "now")
    wanted = Wanted("bears", depth, min_count)
    pair = comparable_runs(shelf, "v1", "v2", wanted, shelf.start)

    def serves(run, model):
        todays = [("dataset", "today"), ("scores", f"{model} today")]
        p = run.parameters
        return (
            run.model == f"{BEARS}/models/{model}"
            and run.job.state == types_pb2.JOB_STATE_SUCCEEDED
            and [(i.input, i.digest) for i in run.provenance.inputs] == todays
            and depth in (None, p.max_depth)
            and min_count in (None, p.min_count)
        )

    assert [serves(run, model) for run, model in zip(pair, ("v1", "v2"), strict=True)] == [True, True]
    assert pair[0].enumeration == pair[1].enumeration
    # Nothing is started where a pair is there, and no run twice.
    there = {m: {run.enumeration for run in history if serves(run, m)} for m in ("v1", "v2")}
    assert bool(shelf.started) == (not there["v1"] & there["v2"])
    assert len(shelf.started) <= 2
