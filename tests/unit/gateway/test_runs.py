"""A run's steps, against services that are away for a while, fail, or never come back."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest

from hibug2.v1 import run_pb2, types_pb2
from services.gateway import runs
from services.gateway.runs import Pipeline
from shared.errors import Busy, HiBug2Error, NotFound, Unavailable
from shared.jobs import Progress
from shared.rpc import status

TAGGING = "datasets/bears/taggings/t"


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waits: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


class Shelf:
    """Remembers what watchers were shown last of the steps."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    async def save(self, run: run_pb2.Run) -> None: ...

    async def publish(self, run: run_pb2.Run) -> None:
        self.shown.append(run.steps[-1].job.message)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(runs, "time", made)
    monkeypatch.setattr(runs, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": made.sleep}))
    return made


def away(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "tagging is gone")


def job(state: types_pb2.JobState.ValueType, done: int = 0, problem: HiBug2Error | None = None) -> Any:
    made = types_pb2.Job(name=TAGGING, state=state, done_count=done, total_count=9)
    if problem is not None:
        made.problem.CopyFrom(status.problem_of(problem))
    return SimpleNamespace(job=made)


class Tagging:
    """A tagging service; a call does what `script(now)` says: an error to raise, or the job's snapshots to show."""

    def __init__(self, clock: Clock, script: Any) -> None:
        self._clock, self._script, self.calls = clock, script, 0
        self._shown: list[Any] = []

    async def CreateTagging(self, _: object) -> Any:  # noqa: N802
        self.calls += 1
        found = self._script(self._clock.now - 1000.0)
        if isinstance(found, Exception):
            raise found
        self._shown = list(found)
        return job(types_pb2.JOB_STATE_RUNNING)

    async def WatchTagging(self, _: object) -> Any:  # noqa: N802
        for shown in self._shown:
            if isinstance(shown, Exception):
                raise shown
            yield shown


async def no_report(_: run_pb2.Run) -> None: ...


def pipeline(tagging: object) -> tuple[Pipeline, Shelf]:
    run = run_pb2.Run(name="runs/a", dataset="datasets/bears", model="datasets/bears/models/m", schema="s")
    shelf = Shelf()
    parts = [cast("Any", part) for part in (SimpleNamespace(tagging=tagging), shelf, SimpleNamespace())]
    return Pipeline(run, *parts, Progress(), no_report), shelf


DONE = job(types_pb2.JOB_STATE_SUCCEEDED, 9)


async def test_a_service_that_is_rolled_for_two_minutes_fails_no_run(clock: Clock) -> None:
    made, shelf = pipeline(Tagging(clock, lambda now: away() if now < 120 else [DONE]))
    await made._tagging()
    assert made.run.tagging == TAGGING
    assert 120 <= sum(clock.waits) < 135
    assert shelf.shown[0] == "waits: tagging is gone"
    assert made.run.steps[-1].job.message == ""  # and no more


@pytest.mark.parametrize("text", ["the process that worked on it is gone", "Redis is away"])
async def test_a_job_that_fails_for_what_passes_is_made_again(clock: Clock, text: str) -> None:
    failed = job(types_pb2.JOB_STATE_FAILED, problem=Unavailable(text))
    made, shelf = pipeline(Tagging(clock, lambda now: [failed] if now < 120 else [DONE]))
    await made._tagging()
    assert f"waits: {text}" in shelf.shown


async def test_who_is_busy_is_asked_again_when_it_said(clock: Clock) -> None:
    made, _ = pipeline(Tagging(clock, lambda now: Busy("full", {}, 7.0) if now < 60 else [DONE]))
    await made._tagging()
    assert set(clock.waits) == {7.0}


@pytest.mark.parametrize("fault", [away(), away(grpc.StatusCode.DEADLINE_EXCEEDED), Unavailable("tagging is gone")])
async def test_what_stays_away_fails_the_run_after_the_time_limit_and_says_so(clock: Clock, fault: Exception) -> None:
    shown = [job(types_pb2.JOB_STATE_FAILED, problem=fault)] if isinstance(fault, HiBug2Error) else fault
    tagging = Tagging(clock, lambda _: shown)
    made, _ = pipeline(tagging)
    with pytest.raises(Unavailable, match="gone"):
        await made._tagging()
    assert runs.PATIENCE_S - 10 <= sum(clock.waits) <= runs.PATIENCE_S
    assert tagging.calls < 80  # the waits grow


def ended(told: bool) -> Any:
    """What a service says of tagging that ended while nobody watched: with its figures, or having lost them."""
    made = types_pb2.Job(name=TAGGING, state=types_pb2.JOB_STATE_SUCCEEDED, reused=not told)
    if told:
        made.done_count = made.total_count = 9
        made.cost.call_count = 9
    return SimpleNamespace(job=made)


class Ended(Tagging):
    """A service that finds the tagging done at every call but the first, which breaks off after `seen` calls paid."""

    def __init__(self, clock: Clock, seen: int, told: bool) -> None:
        running = job(types_pb2.JOB_STATE_RUNNING, seen)
        running.job.cost.call_count = seen
        super().__init__(clock, lambda _: [running, away()] if self.calls == 1 else [ended(told)])

    async def CreateTagging(self, _: object) -> Any:  # noqa: N802
        made = await super().CreateTagging(_)
        return made if self.calls == 1 else ended(told=False)


@pytest.mark.parametrize(("told", "calls"), [(True, 9), (False, 4)])
async def test_work_that_ends_while_nobody_watches_is_the_runs_own(clock: Clock, told: bool, calls: int) -> None:
    made, _ = pipeline(Ended(clock, 4, told))
    await made._tagging()
    step = made.run.steps[-1]
    assert not step.job.reused
    assert step.job.state == types_pb2.JOB_STATE_SUCCEEDED
    assert made.run.job.cost.call_count == calls


@pytest.mark.parametrize(("told", "calls"), [(True, 9), (False, 4)])
async def test_who_takes_a_run_over_counts_what_it_began(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, told: bool, calls: int
) -> None:
    service = Ended(clock, 4, told)
    first, _ = pipeline(service)
    monkeypatch.setattr(first, "_patiently", lambda attempt: attempt())  # its gateway is killed as the watch breaks
    with pytest.raises(grpc.aio.AioRpcError):
        await first._tagging()
    second, _ = pipeline(service)
    second.run.CopyFrom(first.run)
    for name in ("_schema", "_enumeration", "_ranking", "_prediction", "_selection", "_report"):
        monkeypatch.setattr(second, name, nothing)
    await second.execute()
    (step,) = second.run.steps
    assert not step.job.reused
    assert second.run.job.cost.call_count == calls


async def test_what_another_run_did_is_found_again_and_costs_nothing(clock: Clock) -> None:
    service = Ended(clock, 4, told=True)
    service.calls = 1
    made, _ = pipeline(service)
    await made._tagging()
    assert made.run.steps[-1].job.reused
    assert made.run.job.cost.call_count == 0


async def test_who_takes_a_run_over_keeps_the_schema_that_it_asked_for(clock: Clock) -> None:
    made, _ = pipeline(Tagging(clock, lambda _: [DONE]))
    paid = made.run.steps.add(kind=run_pb2.STEP_KIND_SCHEMA)
    paid.job.name, paid.job.state = "datasets/bears/generations/g", types_pb2.JOB_STATE_SUCCEEDED
    paid.job.cost.call_count = 7
    with pytest.raises(AttributeError):  # there is no enumeration service
        await made.execute()
    schema, tagging = made.run.steps[:2]
    assert schema.job.cost.call_count == made.run.job.cost.call_count == 7
    assert tagging.job.done_count == 9


@pytest.mark.parametrize("taken_over", [False, True])
async def test_who_lost_a_run_to_another_leaves_its_step_alone(clock: Clock, taken_over: bool) -> None:
    watched, cancelled = asyncio.Event(), []

    class Endless(Tagging):
        async def WatchTagging(self, _: object) -> Any:  # noqa: N802
            yield job(types_pb2.JOB_STATE_RUNNING, 3)
            watched.set()
            await asyncio.Event().wait()

        async def CancelTagging(self, request: Any) -> None:  # noqa: N802
            cancelled.append(request.name)

    made, _ = pipeline(Endless(clock, lambda _: []))
    task = asyncio.create_task(made._tagging())
    await watched.wait()
    made._progress.cancelled, made._progress.taken_over = True, taken_over
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert cancelled == ([] if taken_over else [TAGGING])


async def nothing() -> None: ...


async def test_who_gets_further_between_failures_is_not_given_up(clock: Clock) -> None:
    """Five times away for most of the limit, with one more part done each time."""
    limit, done = runs.PATIENCE_S * 0.9, 0
    back = limit

    def script(now: float) -> Any:
        nonlocal back, done
        if now < back:
            return away()
        back, done = now + limit, done + 1
        return [DONE] if done == 5 else [job(types_pb2.JOB_STATE_RUNNING, done), away()]

    made, _ = pipeline(Tagging(clock, script))
    await made._tagging()
    assert sum(clock.waits) > 4 * runs.PATIENCE_S


async def test_a_service_that_dies_of_a_run_again_and_again_is_left_in_peace(clock: Clock) -> None:
    tagging = Tagging(clock, lambda _: [job(types_pb2.JOB_STATE_RUNNING, 3), away()])
    made, _ = pipeline(tagging)
    with pytest.raises(Unavailable):
        await made._tagging()
    assert tagging.calls < 80


async def test_what_will_not_pass_is_asked_once(clock: Clock) -> None:
    tagging = Tagging(clock, lambda _: [job(types_pb2.JOB_STATE_FAILED, problem=NotFound("no such schema"))])
    made, _ = pipeline(tagging)
    with pytest.raises(NotFound, match="no such schema"):
        await made._tagging()
    assert tagging.calls == 1
    assert clock.waits == []


async def test_a_read_between_two_jobs_waits_as_well(clock: Clock) -> None:
    class Predicting:
        async def CreatePrediction(self, _: object) -> Any:  # noqa: N802
            return DONE

        async def GetPrediction(self, _: object) -> Any:  # noqa: N802
            if clock.now < 1000 + 60:
                raise away()
            return SimpleNamespace(predicted_slice_count=4)

    made, _ = pipeline(None)
    made._b.prediction = cast("Any", Predicting())
    made.run.summary.error_slice_count = 1
    await made._prediction()
    assert made.run.summary.predicted_slice_count == 4
