"""One exception that says what was wrong, in which field, and what to do."""

import grpc
import pytest

from hibug2 import Client, HiBug2Error, RunStopped, UserError, Violation
from hibug2.v1 import run_pb2, types_pb2


def test_a_refusal_carries_code_reason_fields_and_request(client, gateway):
    with pytest.raises(HiBug2Error) as caught:
        client.add_scores("bears", "v1", {"id": ["a"], "score": [1.5]})
    error = caught.value
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert error.violations == (Violation("score", "must lie in [0, 1]; row 1 has 1.5"),)
    assert str(error) == error.message == "score: must lie in [0, 1]; row 1 has 1.5"
    assert error.metadata == {"limit": "7"}
    assert error.request_id == gateway.metadata[-1]["x-request-id"]


def test_a_status_without_details_keeps_its_code(client, gateway):
    gateway.faults = [grpc.StatusCode.INTERNAL]
    with pytest.raises(HiBug2Error) as caught:
        client.datasets()
    assert (caught.value.code, caught.value.reason, caught.value.message) == ("INTERNAL", "INTERNAL", "told to fail")


def test_a_server_that_is_away_is_named_with_the_remedy():
    with (
        Client("127.0.0.1:1", timeout_s=5) as nobody,
        pytest.raises(HiBug2Error, match=r"127\.0\.0\.1:1.*make up.*HIBUG2_ADDRESS") as caught,
    ):
        nobody.datasets()
    assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "UNREACHABLE")


def test_a_server_that_is_too_slow_is_named_with_what_anyone_can_do(client, gateway):
    gateway.faults = [grpc.StatusCode.DEADLINE_EXCEEDED]
    with pytest.raises(HiBug2Error, match="did not answer in time; try again, or call it from Python with a longer"):
        client.datasets()


def test_input_that_is_refused_here_looks_the_same():
    error = UserError("images", "holds no rows")
    assert isinstance(error, HiBug2Error)
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert (str(error), error.violations) == ("images: holds no rows", (Violation("images", "holds no rows"),))


def test_a_failed_run_says_what_its_problem_says():
    problem = types_pb2.Problem(
        code=grpc.StatusCode.DATA_LOSS.value[0],
        reason="DATA_LOSS",
        message="the tag table is broken",
        violations=[types_pb2.FieldViolation(field="tagging", description="cannot be read")],
        metadata={"part": "3"},
    )
    run = run_pb2.Run(name="runs/abc", job=types_pb2.Job(state=types_pb2.JOB_STATE_FAILED, problem=problem))
    error = RunStopped(run)
    assert str(error) == "runs/abc failed: the tag table is broken"
    assert (error.code, error.reason, error.metadata) == ("DATA_LOSS", "DATA_LOSS", {"part": "3"})
    assert error.violations == (Violation("tagging", "cannot be read"),)
    assert error.run is run


def test_a_cancelled_run_says_how_to_go_on():
    run = run_pb2.Run(name="runs/abc", job=types_pb2.Job(state=types_pb2.JOB_STATE_CANCELLED))
    assert "hibug2 resume runs/abc" in str(RunStopped(run))
    assert RunStopped(run).code == "CANCELLED"
