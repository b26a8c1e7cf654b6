from __future__ import annotations

import contextvars
import time

import pytest

from shared.errors import InvalidInput
from shared.rpc import context


@pytest.fixture(autouse=True)
def _apart():
    tokens = [(var, var.set(var.get())) for var in (context.team, context.request_id, context.deadline)]
    yield
    for var, token in tokens:
        var.reset(token)


def entered(metadata=(), remaining=None):
    inside = contextvars.copy_context()
    inside.run(context.enter, metadata, remaining)
    return inside


def test_team_and_request_id_go_out_as_they_came_in():
    came = [(context.TEAM_KEY, "team-a"), (context.REQUEST_KEY, "r1"), ("other", "x"), ("x-bin", b"\0")]
    assert entered(came).run(context.outgoing) == [(context.TEAM_KEY, "team-a"), (context.REQUEST_KEY, "r1")]


def test_a_call_without_an_id_gets_one_and_keeps_it():
    inside = entered()
    first, second = inside.run(context.outgoing), inside.run(context.outgoing)
    assert first == second
    assert first[0] == (context.TEAM_KEY, "default")
    assert len(first[1][1]) == 32


def test_a_long_request_id_is_cut():
    assert dict(entered([(context.REQUEST_KEY, "x" * 500)]).run(context.outgoing))[context.REQUEST_KEY] == "x" * 64


@pytest.mark.parametrize("team", ["", "A", "-a", "a/b", "..", "a" * 41, "a\n", "é"])
def test_what_is_no_team_is_refused(team):
    with pytest.raises(InvalidInput, match=context.TEAM_KEY):
        entered([(context.TEAM_KEY, team)])


def test_the_nearer_of_limit_and_deadline_counts():
    assert entered().run(context.time_left, 60.0) == 60.0
    assert entered().run(context.time_left, None) is None
    near = entered(remaining=5.0)
    assert 4.0 < near.run(context.time_left, 60.0) <= 5.0
    assert 4.0 < near.run(context.time_left, None) <= 5.0
    assert near.run(context.time_left, 0.5) == 0.5
    assert 0 < entered(remaining=-1.0).run(context.time_left, 60.0) <= 0.001
    assert context.deadline.get() is None or context.deadline.get() > time.monotonic()
