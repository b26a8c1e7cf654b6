from __future__ import annotations

import asyncio
from contextvars import copy_context

import pytest
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from hibug2.v1 import types_pb2
from shared import jobs
from shared.errors import InvalidInput, NotFound, Unavailable, Violation
from shared.jobs import Jobs, Progress
from shared.queue.stream import connect
from shared.rpc import context, status
from tests.integration.waiting import eventually

NAME = "datasets/d/things/t"
RUNNING, SUCCEEDED, FAILED, CANCELLED = (
    types_pb2.JOB_STATE_RUNNING,
    types_pb2.JOB_STATE_SUCCEEDED,
    types_pb2.JOB_STATE_FAILED,
    types_pb2.JOB_STATE_CANCELLED,
)


class Replica:
    """One process of a service: its jobs, over artifacts that all replicas share."""

    def __init__(self, redis: Redis, artifacts: set[str]) -> None:
        self.redis, self.artifacts = redis, artifacts
        self.jobs = Jobs(redis, "service", self._is_complete)
        self.started = 0
        self.running = 0
        self.go = asyncio.Event()
        self.progress = Progress()

    async def _is_complete(self, name: str) -> bool:
        return f"{context.team.get()}/{name}" in self.artifacts

    async def work(self, progress: Progress) -> None:
        self.started += 1
        self.running += 1
        self.progress = progress
        try:
            await self.go.wait()
            self.artifacts.add(f"{context.team.get()}/{NAME}")
        finally:
            self.running -= 1


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(jobs, "LEASE_S", 1.0)
    monkeypatch.setattr(jobs, "BEAT_S", 0.05)


@pytest.fixture
async def replicas(redis_url):
    artifacts: set[str] = set()
    made = [Replica(connect(redis_url), artifacts) for _ in range(2)]
    yield made
    for replica in made:
        await replica.jobs.close()
        await replica.redis.aclose()


async def watched(replica: Replica) -> list[types_pb2.Job]:
    return [job async for job in replica.jobs.watch(NAME)]


async def die(replica: Replica) -> None:
    """End as a killed process does: no work, no beat, nothing released."""
    await replica.redis.connection_pool.disconnect()

    async def gone(*_, **__):
        raise ConnectionError

    replica.redis.eval = replica.redis.set = gone
    for task in list(replica.jobs._tasks):
        task.cancel()
    await asyncio.gather(*replica.jobs._tasks, return_exceptions=True)


async def test_two_replicas_never_do_the_same_work_at_once(replicas):
    one, two = replicas
    created = await asyncio.gather(*(r.jobs.create(NAME, r.work) for r in [one, two] * 20))
    assert {job.state for job in created} == {RUNNING}
    await asyncio.sleep(2 * jobs.LEASE_S)
    assert one.started + two.started == 1
    worker = one if one.started else two
    worker.go.set()
    for snapshots in await asyncio.gather(watched(one), watched(two)):
        assert snapshots[-1].state == SUCCEEDED
        assert not snapshots[-1].reused
    assert one.started + two.started == 1


async def test_a_replica_sees_what_the_other_does(replicas):
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    watching = asyncio.create_task(watched(two))
    await _running(one)
    one.progress.step, one.progress.message = "counting", "sheep"
    one.progress.update(3, 10)

    job = await eventually(lambda: _published(two, 3))
    assert (job.state, job.step, job.message, job.total_count) == (RUNNING, "counting", "sheep", 10)
    assert job.rate_per_second > 0
    assert job.HasField("eta")
    one.progress.update(10, 10)
    one.go.set()
    snapshots = await watching
    assert [job.state for job in snapshots[:-1]] == [RUNNING] * (len(snapshots) - 1)
    assert (snapshots[-1].state, snapshots[-1].done_count) == (SUCCEEDED, 10)
    assert not snapshots[-1].HasField("eta")


async def _published(replica: Replica, done: int) -> types_pb2.Job | None:
    job = await replica.jobs.get(NAME)
    return job if job.done_count == done else None


async def _running(replica: Replica) -> None:
    await eventually(lambda: replica.running)


async def test_a_replica_cancels_what_the_other_does(replicas):
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await _running(one)
    assert (await two.jobs.cancel(NAME)).state == CANCELLED
    assert one.progress.cancelled
    assert one.running == 0
    assert (await two.jobs.cancel(NAME)).state == CANCELLED
    assert (await two.jobs.create(NAME, two.work)).state == RUNNING
    await _running(two)
    two.progress.update(1, 2)
    await eventually(lambda: _published(one, 1))  # beats have passed: the cancel was of the first attempt
    two.go.set()
    assert (await watched(one))[-1].state == SUCCEEDED


async def test_the_work_of_a_replica_that_died_is_taken_over(replicas):
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await _running(one)
    await die(one)
    assert (await two.jobs.create(NAME, two.work)).state == RUNNING  # the lease still stands
    assert two.started == 0
    last = (await watched(two))[-1]
    assert last.state == FAILED
    assert isinstance(status.error_of_problem(last.problem), Unavailable)
    assert (await two.jobs.create(NAME, two.work)).state == RUNNING
    two.go.set()
    assert (await watched(two))[-1].state == SUCCEEDED
    assert two.started == 1


async def test_a_replica_that_slept_past_its_lease_stops_when_another_has_the_work(replicas):
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await _running(one)
    await two.redis.set(one.jobs._key(NAME, "lease"), b"another", px=60_000)
    await eventually(lambda: not one.running)
    assert one.progress.cancelled
    await asyncio.gather(*one.jobs._tasks, return_exceptions=True)
    assert await two.redis.get(one.jobs._key(NAME, "lease")) == b"another"
    assert (await two.jobs.get(NAME)).state == RUNNING  # it is another's to say how it went


async def test_a_replica_that_stops_gives_its_work_up_at_once(replicas, monkeypatch):
    monkeypatch.setattr(jobs, "LEASE_S", 60.0)
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await _running(one)
    await one.jobs.close()
    assert one.running == 0
    await two.jobs.create(NAME, two.work)
    await asyncio.wait_for(_running(two), 5)


async def test_a_replica_that_stops_at_once_gives_up_what_it_has_not_begun(replicas, monkeypatch):
    monkeypatch.setattr(jobs, "LEASE_S", 60.0)
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await one.jobs.close()
    await two.jobs.create(NAME, two.work)
    await asyncio.wait_for(_running(two), 5)


async def test_redis_wiped_in_mid_job_neither_stops_it_nor_its_watchers(replicas):
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await _running(one)
    seen: list[types_pb2.Job] = []

    async def watch(replica: Replica) -> types_pb2.Job:
        async for job in replica.jobs.watch(NAME):
            seen.append(job)
        return job

    watching = [asyncio.create_task(watch(replica)) for replica in replicas]
    await eventually(lambda: len(seen) >= 2)
    for _ in range(5):
        await one.redis.flushall()
        await eventually(lambda: two.redis.exists(two.jobs._key(NAME, "lease")))
    assert (await two.jobs.create(NAME, two.work)).state == RUNNING
    one.go.set()
    assert [job.state for job in await asyncio.gather(*watching)] == [SUCCEEDED, SUCCEEDED]
    assert (one.started, two.started) == (1, 0)


async def test_a_watcher_of_a_job_that_nobody_remembers_is_told(replicas):
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await _running(one)
    watching = two.jobs.watch(NAME)
    assert (await anext(watching)).state == RUNNING
    await die(one)
    await two.redis.flushall()
    with pytest.raises(NotFound):
        await anext(watching)


async def test_a_failure_carries_all_that_it_says(replicas):
    one, two = replicas
    violations = (Violation("a", "is wrong"), Violation("b[3]", "too"))

    async def fail(_: Progress) -> None:
        raise InvalidInput("no good", {"key": "value"}, violations)

    await one.jobs.create(NAME, fail)
    last = (await watched(two))[-1]
    assert last.state == FAILED
    assert status.error_of_problem(last.problem) == InvalidInput("no good", {"key": "value"}, violations)
    await one.jobs.create(NAME, one.work)
    one.go.set()
    last = (await watched(two))[-1]
    assert last.state == SUCCEEDED
    assert not last.HasField("problem")


async def test_an_unexpected_failure_tells_no_internals(replicas):
    async def fail(_: Progress) -> None:
        raise KeyError("secret")

    await replicas[0].jobs.create(NAME, fail)
    last = (await watched(replicas[1]))[-1]
    assert (last.state, last.problem.reason) == (FAILED, "INTERNAL")
    assert "secret" not in str(last)


async def test_what_is_there_is_not_made_again(replicas):
    one, two = replicas
    one.artifacts.add(f"default/{NAME}")
    job = await one.jobs.create(NAME, one.work)
    assert (job.state, job.reused) == (SUCCEEDED, True)
    assert [(job.state, job.reused) for job in await watched(two)] == [(SUCCEEDED, True)]
    assert one.started == 0


async def test_what_has_come_to_rest_is_not_started_by_who_saw_it_run(replicas):
    one, two = replicas
    held: list[int] = []

    async def rests() -> types_pb2.Job:
        held.append(await two.redis.exists(two.jobs._key(NAME, "lease")))
        return types_pb2.Job(name=NAME, state=CANCELLED)

    assert (await one.jobs.create(NAME, one.work, rests)).state == CANCELLED
    assert held == [1]  # nobody else can begin while it is asked
    assert (await two.jobs.get(NAME)).state == CANCELLED
    assert one.started == 0
    await two.jobs.create(NAME, two.work)
    await _running(two)


async def test_an_artifact_says_more_than_the_state_of_an_earlier_attempt(replicas):
    one, two = replicas
    await one.jobs.create(NAME, one.work)
    await _running(one)
    await two.jobs.cancel(NAME)
    one.artifacts.add(f"default/{NAME}")  # the cancelled work came to its end in a thread
    assert (await one.jobs.create(NAME, one.work)).state == SUCCEEDED
    assert (await watched(two))[-1].state == SUCCEEDED


async def test_a_job_that_waits_for_somebody_is_paused_and_goes_on_with_the_next_create(replicas):
    one, two = replicas

    async def wait_for_money(_: Progress) -> None:
        raise jobs.Paused("the budget is spent; give more")

    await one.jobs.create(NAME, wait_for_money)
    (*_, told) = await watched(two)  # the watch ends: nothing will happen of itself
    assert (told.state, told.message) == (types_pb2.JOB_STATE_PAUSED, "the budget is spent; give more")
    assert not told.HasField("problem")
    assert (await two.jobs.get(NAME)).state == types_pb2.JOB_STATE_PAUSED
    two.go.set()
    assert (await two.jobs.create(NAME, two.work)).state == RUNNING
    assert (await watched(one))[-1].state == SUCCEEDED


async def test_a_paused_job_can_be_cancelled_though_nobody_works_on_it(replicas):
    one, two = replicas

    async def wait_for_money(_: Progress) -> None:
        raise jobs.Paused("the budget is spent; give more")

    await one.jobs.create(NAME, wait_for_money)
    await watched(one)
    assert (await two.jobs.cancel(NAME)).state == CANCELLED
    assert (await one.jobs.get(NAME)).state == CANCELLED
    await two.jobs.create(NAME, two.work)
    await _running(two)


async def test_a_job_that_nobody_created_is_not_found(replicas):
    for ask in (replicas[0].jobs.get, replicas[0].jobs.cancel):
        with pytest.raises(NotFound, match=NAME):
            await ask(NAME)
    with pytest.raises(NotFound):
        await watched(replicas[0])


async def test_a_job_whose_artifact_was_deleted_is_not_found(replicas):
    one, two = replicas
    one.go.set()
    await one.jobs.create(NAME, one.work)
    await watched(one)
    one.artifacts.clear()
    with pytest.raises(NotFound):
        await two.jobs.get(NAME)
    await two.jobs.create(NAME, two.work)
    await _running(two)


async def test_teams_with_the_same_names_have_jobs_of_their_own(replicas, monkeypatch):
    one, two = replicas

    def of_team(team: str, call):
        inside = copy_context()
        inside.run(context.team.set, team)
        return asyncio.create_task(call, context=inside)

    await of_team("a", one.jobs.create(NAME, one.work))
    await of_team("b", one.jobs.create(NAME, one.work))
    await eventually(lambda: one.running == 2)
    assert (await of_team("a", two.jobs.cancel(NAME))).state == CANCELLED
    assert one.running == 1
    assert (await of_team("b", two.jobs.get(NAME))).state == RUNNING
    await one.jobs.close()
    assert one.running == 0


async def test_how_long_each_step_took_is_measured_over_all_its_times(redis_url):
    artifacts: set[str] = set()
    replica = Replica(connect(redis_url), artifacts)

    async def work(progress: Progress) -> None:
        for step in ("reading", "counting", "reading"):
            progress.step = step
            await asyncio.sleep(0.05)
        artifacts.add(f"{context.team.get()}/{NAME}")

    def told(step: str, what: str) -> float:
        labels = {"service": "service", "step": step}
        return REGISTRY.get_sample_value(f"hibug2_job_step_seconds_{what}", labels) or 0.0

    before = {(step, what): told(step, what) for step in ("reading", "counting") for what in ("count", "sum")}
    await replica.jobs.create(NAME, work)
    await eventually(lambda: told("counting", "count") > before["counting", "count"])
    await replica.jobs.close()
    await replica.redis.aclose()
    for step, least in (("reading", 0.1), ("counting", 0.05)):
        assert told(step, "count") == before[step, "count"] + 1
        assert least <= told(step, "sum") - before[step, "sum"] < 10
