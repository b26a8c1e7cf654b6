"""Predicted slices by any method, and what other data says of them: the client and the verb."""

import json

import pytest
from typer.testing import CliRunner

from hibug2 import HiBug2Error, UserError, messages
from hibug2.command import app
from hibug2.v1 import prediction_pb2, types_pb2


@pytest.fixture
def hibug2(gateway, monkeypatch):
    monkeypatch.setenv("HIBUG2_ADDRESS", gateway.address)
    gateway.add_run()

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, ["predict", "abc", *map(str, arguments)])
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        return result

    return invoke


def created(gateway):
    return [r for r in gateway.requests if isinstance(r, prediction_pb2.CreatePredictionRequest)]


def test_what_the_run_predicted_is_read_and_what_else_is_asked_for_is_made(client, gateway):
    gateway.add_run()
    own = client.predicted("abc").to_pylist()[0]
    assert own["replaced"] == {"attribute": "colour", "tag": "red"}
    assert (own["known_count"], own["target"], own["expected_mean"]) == (None, None, None)
    assert created(gateway) == []
    prior = client.predicted("abc", "prior", pair_count=2, max_per_class=5).to_pylist()[0]
    assert (prior["method"], prior["known_count"], prior["expected_mean"]) == ("prior", 3, 0.25)
    assert (prior["replaced"], prior["similarity"], prior["origin_ranks"]) == (None, None, [])
    (request,) = created(gateway)
    assert (request.parent, request.ranking) == ("datasets/bears", "datasets/bears/rankings/r1")
    assert (request.method, request.pair_count, request.max_per_class) == (3, 2, 5)
    client.predicted("abc", max_per_class=7)  # another one than the run's
    assert created(gateway)[1].method == prediction_pb2.PREDICTION_METHOD_TAG_SUBSTITUTION
    with pytest.raises(UserError, match="'guess' is not one of tag_substitution, instruction, prior"):
        client.predicted("abc", "guess")


def test_a_run_without_error_slices_has_no_prediction_of_its_own_and_may_be_asked_for_others(client, gateway):
    gateway.add_run(prediction="")
    assert client.predicted("abc").equals(messages.PREDICTED.empty_table())
    assert client.predicted("abc", "prior").num_rows == 1


def test_a_prediction_that_fails_says_why(client, gateway):
    gateway.add_run()
    gateway.problem = types_pb2.Problem(code=9, reason="PRECONDITION", message="no language model is configured")
    with pytest.raises(HiBug2Error, match="no language model is configured") as caught:
        client.predicted("abc", "instruction")
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "PRECONDITION")


def test_predictions_are_verified_with_their_slices_beside(client, gateway):
    gateway.add_run()
    found = client.verify_predictions(
        "abc", ["tag_substitution", "prior"], splits=["test", "pool"], model="v2", pair_count=2, seed=4, min_count=3
    )
    assert (found.overall_mean, found.scored_count) == (0.75, 1200)
    request = gateway.requests[-3]
    assert list(request.predictions) == ["datasets/bears/predictions/p1", "datasets/bears/predictions/prior"]
    assert (list(request.splits), request.model, request.tagging) == (["test", "pool"], "datasets/bears/models/v2", "")
    assert (request.seed, request.min_count) == (4, 3)
    (own, prior) = found.methods.to_pylist()
    assert own == {
        "method": "tag_substitution",
        "pair_counts": [2, 3],
        "predicted_count": 1,
        "verified_count": 1,
        "verified_mean_drop": 0.5,
        "verified_interval_low": 0.25,
        "verified_interval_high": 0.625,
        "verified_error_slice_share": 1.0,
        "base_count": 40,
        "base_mean_drop": 0.0625,
        "base_interval_low": None,
        "base_interval_high": None,
        "base_error_slice_share": 0.125,
    }
    assert (prior["verified_count"], prior["verified_mean_drop"]) == (0, None)
    first, second = found.slices.to_pylist()
    assert (first["method"], first["scored_count"], first["mean"], first["is_error_slice"]) == (
        "tag_substitution",
        12,
        0.25,
        True,
    )
    assert (second["expected_mean"], second["scored_count"], second["mean"]) == (0.25, 0, None)


def test_the_verb_shows_each_method_in_its_own_way(hibug2):
    assert "from rank" in hibug2().stdout
    prior = hibug2("--method", "prior").stdout
    assert "expected" in prior
    assert "0.250" in prior
    assert "[bold]kettle" in hibug2("--method", "instruction").stdout
    both = hibug2("--method", "prior", "--method", "tag_substitution", "--pairs", "2")
    assert both.stdout.index("prior") < both.stdout.index("tag_substitution")
    document = json.loads(hibug2("--method", "prior", "--json").stdout)
    assert document["run"] == "runs/abc"
    assert [row["expected_mean"] for row in document["predicted_slices"]] == [0.25]
    assert "verification" not in document
    assert "Invalid value" in hibug2("--method", "guess", code=2).stderr


@pytest.mark.parametrize("option", [["--split", "pool"], ["--seed", 0]])
def test_what_only_a_verification_takes_is_refused_without_one(hibug2, gateway, option):
    assert hibug2(*option, code=2).stderr.startswith(f"error: {option[0]}: goes with --verify")
    assert not gateway.requests


def test_the_verb_verifies(hibug2, gateway):
    text = hibug2("--verify", "--method", "tag_substitution", "--method", "prior").stdout
    assert "1,200 scored instances of test; overall mean 0.750" in text
    assert "0.25 … 0.62" in text
    assert "100.0%" in text
    assert "0.10 … 0.60" in text
    document = json.loads(hibug2("--verify", "--split", "pool", "--split", "test", "--json").stdout)
    assert document["verification"]["splits"] == ["pool", "test"]
    assert document["verification"]["methods"][0]["base_mean_drop"] == 0.0625
    assert document["predicted_slices"][0]["drop"] == 0.5


def test_pairs_go_to_tag_substitution_only_when_it_stands_alone(hibug2, gateway):
    hibug2("--pairs", "2")  # the server refuses it and says why
    assert created(gateway)[-1].pair_count == 2
    count = len(created(gateway))
    hibug2("--pairs", "2", "--method", "tag_substitution", "--method", "prior", "--verify")
    assert [r.method for r in created(gateway)[count:]] == [prediction_pb2.PREDICTION_METHOD_PRIOR]
