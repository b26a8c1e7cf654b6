"""Runs at the gateway, whatever the store and Redis were left with; the steps themselves are made up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import copy_context
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from hibug2.v1 import run_pb2 as pb
from hibug2.v1 import types_pb2
from services.gateway import run_server
from services.gateway.config import Settings
from services.gateway.run_server import RunServicer, filled
from shared.errors import Precondition
from shared.jobs import Paused
from shared.rpc import context
from shared.store.store import Store
from tests.integration.waiting import eventually

RUNNING, SUCCEEDED, FAILED, CANCELLED, PAUSED = (
    types_pb2.JOB_STATE_RUNNING,
    types_pb2.JOB_STATE_SUCCEEDED,
    types_pb2.JOB_STATE_FAILED,
    types_pb2.JOB_STATE_CANCELLED,
    types_pb2.JOB_STATE_PAUSED,
)


class Steps:
    """In the pipeline's place: notes the runs that are taken through their steps."""

    def __init__(self) -> None:
        self.taken: list[pb.Run] = []
        self.pause = ""
        self.held = False

    def __call__(self, run: pb.Run, *_: object) -> Steps:
        self.taken.append(run)
        return self

    async def execute(self) -> None:
        if self.pause:
            raise Paused(self.pause)
        if self.held:
            await asyncio.Event().wait()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    made = Steps()
    monkeypatch.setattr(run_server, "Pipeline", made)
    monkeypatch.setattr(run_server, "SWEEP_S", 0.05)
    return made


@pytest.fixture
async def server(redis: Redis, tmp_path: Path, steps: Steps) -> AsyncIterator[RunServicer]:
    made = RunServicer(Settings(), redis, Store(tmp_path.as_uri()), cast("Any", None))
    yield made
    await made.close()


async def save(server: RunServicer, key: str, state: types_pb2.JobState.ValueType, **parameters: float) -> pb.Run:
    run = pb.Run(name=f"runs/{key}", dataset="datasets/d", parameters=filled(pb.RunParameters(**parameters)))
    run.job.name, run.job.state = run.name, state
    run.job.create_time.GetCurrentTime()
    await server._shelf.save(run)
    return run


def leave_folder(store: Path, team: str = "default") -> None:
    """What a first write that failed leaves of a run."""
    (store / "teams" / team / "runs" / "broken").mkdir(parents=True)


async def listed(server: RunServicer) -> list[str]:
    return [run.name for run in (await server.ListRuns(pb.ListRunsRequest(), cast("Any", None))).runs]


async def cancel(server: RunServicer, run: pb.Run) -> pb.Run:
    return (await server.CancelRun(pb.CancelRunRequest(name=run.name), cast("Any", None))).run


async def resume(server: RunServicer, run: pb.Run, **more: float) -> pb.Run:
    return (await server.ResumeRun(pb.ResumeRunRequest(name=run.name, **more), cast("Any", None))).run


async def kept(server: RunServicer, run: pb.Run) -> pb.Run:
    return await server._shelf.read(run.name.partition("/")[2])


async def test_a_run_whose_first_write_failed_hides_no_other(server: RunServicer, tmp_path: Path) -> None:
    leave_folder(tmp_path)
    await save(server, "whole", SUCCEEDED)
    assert await listed(server) == ["runs/whole"]


async def test_a_run_whose_first_write_failed_keeps_none_from_being_taken_up(
    server: RunServicer, tmp_path: Path, steps: Steps
) -> None:
    for team in ("a", "b"):
        leave_folder(tmp_path, team)
        inside = copy_context()
        inside.run(context.team.set, team)
        await asyncio.create_task(save(server, f"of-{team}", RUNNING), context=inside)
    server.start_sweeping()
    await eventually(lambda: len(steps.taken) == 2)
    assert {run.name for run in steps.taken} == {"runs/of-a", "runs/of-b"}


@pytest.mark.parametrize("state", [CANCELLED, FAILED, PAUSED, SUCCEEDED])
async def test_a_run_that_comes_to_rest_while_it_is_swept_is_left_so(
    server: RunServicer,
    redis: Redis,
    steps: Steps,
    monkeypatch: pytest.MonkeyPatch,
    state: types_pb2.JobState.ValueType,
) -> None:
    run = await save(server, "r", RUNNING)
    read = server._shelf.read

    async def overtaken(key: str) -> pb.Run:
        found = await read(key)
        await save(server, key, state)
        return found

    monkeypatch.setattr(server._shelf, "read", overtaken)
    await server._take_up("r")
    monkeypatch.undo()
    assert not steps.taken
    assert (await kept(server, run)).job.state == state
    assert (await server.jobs.get(run.name)).state == state
    assert not await redis.exists(server.jobs._key(run.name, "lease"))


async def test_a_run_is_taken_up_as_it_was_left(
    server: RunServicer, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await save(server, "r", RUNNING)
    read = server._shelf.read

    async def overtaken(key: str) -> pb.Run:
        found = await read(key)
        run.steps.add(kind=pb.STEP_KIND_TAGGING)
        await server._shelf.save(run)
        return found

    monkeypatch.setattr(server._shelf, "read", overtaken)
    await server._take_up("r")
    monkeypatch.undo()
    await eventually(lambda: steps.taken)
    assert len(steps.taken[0].steps) >= 1


async def test_who_lost_a_run_to_another_gateway_writes_no_more_of_it(
    server: RunServicer, redis: Redis, steps: Steps
) -> None:
    steps.held = True
    run = await save(server, "r", RUNNING)
    await server._start(run)
    await eventually(lambda: steps.taken)
    await redis.set(server.jobs._key(run.name, "lease"), b"another", px=60_000)
    await eventually(lambda: not server.jobs._tasks)
    assert (await kept(server, run)).job.state == RUNNING


async def paused(server: RunServicer, redis: Redis, steps: Steps) -> pb.Run:
    """A run that has come to its cap of 1."""
    steps.pause = "the cap is reached"
    run = await save(server, "r", types_pb2.JOB_STATE_PENDING, max_cost=1.0)
    await server._start(run)
    key = server.jobs._key(run.name, "lease")

    async def rests() -> bool:
        return not await redis.exists(key)

    await eventually(rests)
    steps.pause = ""
    found = await kept(server, run)
    assert (found.job.state, found.job.message) == (PAUSED, "the cap is reached")
    return found


@pytest.mark.parametrize("lost", [False, True])
async def test_a_paused_run_is_cancelled_for_good(server: RunServicer, redis: Redis, steps: Steps, lost: bool) -> None:
    run = await paused(server, redis, steps)
    if lost:
        await redis.flushall()
    for found in (await cancel(server, run), await kept(server, run), await cancel(server, run)):
        assert (found.job.state, found.job.message) == (CANCELLED, "")
    await resume(server, run)
    await eventually(lambda: len(steps.taken) == 2)


async def test_a_paused_run_goes_on_with_another_cap(server: RunServicer, redis: Redis, steps: Steps) -> None:
    run = await paused(server, redis, steps)
    assert (await resume(server, run, max_cost=2.0)).parameters.max_cost == 2.0
    await eventually(lambda: len(steps.taken) == 2)
    assert steps.taken[-1].parameters.max_cost == 2.0
    assert (await kept(server, run)).parameters.max_cost == 2.0


async def test_the_cap_of_a_run_under_way_is_not_changed(server: RunServicer) -> None:
    run = await save(server, "r", RUNNING, max_cost=1.0)
    with pytest.raises(Precondition, match="hibug2 cancel r"):
        await resume(server, run, max_cost=2.0)
    assert (await kept(server, run)).parameters.max_cost == 1.0
    assert (await resume(server, run, max_cost=1.0)).parameters.max_cost == 1.0  # the same call, tried again


async def test_nothing_is_told_of_a_cap_that_a_finished_run_no_longer_needs(server: RunServicer, steps: Steps) -> None:
    run = await save(server, "r", SUCCEEDED, max_cost=1.0)
    assert (await resume(server, run, max_cost=2.0)).parameters.max_cost == 1.0
    assert not steps.taken
