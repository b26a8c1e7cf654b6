from __future__ import annotations

from urllib.parse import quote

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from shared import errors
from shared.rpc.status import error_of_problem, problem_of, status_of

KINDS = [
    errors.HiBug2Error,
    errors.InvalidInput,
    errors.NotFound,
    errors.AlreadyExists,
    errors.Precondition,
    errors.PermissionDenied,
    errors.TooLarge,
    errors.Busy,
    errors.Unavailable,
    errors.DataLoss,
]
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.sampled_from(KINDS), texts, st.dictionaries(texts, texts, max_size=3), st.lists(st.tuples(texts, texts)))
def test_a_failed_job_tells_the_error_that_failed_it(kind, message, metadata, pairs):
    error = kind(message, metadata)
    if kind is errors.InvalidInput:
        error.violations = tuple(errors.Violation(*pair) for pair in pairs[:20])
    problem = problem_of(error)
    again = error_of_problem(type(problem).FromString(problem.SerializeToString()))
    assert type(again) is kind
    assert again == error


@pytest.mark.parametrize("text", ["x", "é", "😀", "%", "\n"])
def test_the_status_always_fits_into_the_trailers(text):
    violations = tuple(errors.Violation(f"instances[{i}]." + text * 500, text * 500) for i in range(100))
    error = errors.InvalidInput(text * 5000, {text * 100 + str(i): text * 2000 for i in range(20)}, violations)
    status = status_of(error)
    sent = len(quote(status.message, safe=" ")) + len(status.SerializeToString()) * 4 / 3
    assert sent < 8192 - 500
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    packed: list[any_pb2.Any] = list(status.details)
    assert packed[0].Unpack(info)
    assert info.reason == "INVALID_INPUT"
    assert packed[1].Unpack(bad)
    assert bad.field_violations[0].field.startswith("instances[0].")
    assert bad.field_violations[0].description


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_code_that_grpc_knows(kind):
    assert status_of(kind("text")).code == grpc.StatusCode[kind.code].value[0]


def test_all_violations_are_raised_as_one_and_none_raises_nothing():
    errors.refuse([])
    with pytest.raises(errors.InvalidInput, match=r"a: wrong; .* \(and 2 more\)") as refused:
        errors.refuse(errors.Violation("a", "wrong") for _ in range(7))
    assert len(refused.value.violations) == 7
    assert errors.invalid("f", "is bad").violations == (errors.Violation("f", "is bad"),)


def test_who_is_refused_for_the_load_is_told_when_to_come_back():
    status = status_of(errors.Busy("too much waits", retry_s=12.5))
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    assert retry.retry_delay.ToMilliseconds() == 12_500
