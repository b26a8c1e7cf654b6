"""Jobs: long work that any replica can report on, and that is never done twice at a time.

A job is named after the artifact it makes. Its state lives in Redis while it runs, with a lease that the process
doing the work renews; when the lease is gone the work is nobody's and the next Create takes it over. What is
finished is told from the artifact, so losing Redis loses no result.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import structlog
from google.protobuf.duration_pb2 import Duration
from redis.asyncio import Redis
from redis.exceptions import RedisError

from hibug2.v1 import types_pb2
from shared import logs, metrics, traces
from shared.errors import HiBug2Error, NotFound, Unavailable
from shared.rpc import context, status

log = logs.get("jobs")

LEASE_S = 10.0
BEAT_S = 0.25
KEEP_S = 7 * 24 * 3600
DONE = frozenset({types_pb2.JOB_STATE_SUCCEEDED, types_pb2.JOB_STATE_FAILED, types_pb2.JOB_STATE_CANCELLED})
RESTING = DONE | {types_pb2.JOB_STATE_PAUSED}  # nobody works on it; the next Create goes on with what is not done

# Whoever gets the lease writes the first state with it, so that nobody sees the one without the other.
_START = """
if not redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 0 end
redis.call('DEL', KEYS[3])
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4])
return 1
"""
# Renew only what this process still owns: another may have taken the job over.
_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Paused(Exception):
    """Raised by work that cannot go on before somebody acts; the job is then paused, with the text as its message."""


@dataclass
class Progress:
    """What the work tells: set from any thread. `cancelled` turns true when it should stop."""

    done: int = 0
    total: int = 0
    message: str = ""
    cancelled: bool = False
    taken_over: bool = False  # stopped because another process does the work now
    cost: types_pb2.Cost = field(default_factory=types_pb2.Cost)
    started: float = field(default_factory=time.monotonic)
    # Where the counting began: resumed work must not count what was there as its own speed.
    done_at_start: int = 0
    _step: str = field(default="", init=False)
    _step_began: float = field(default_factory=time.monotonic, init=False)
    _step_seconds: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def step(self) -> str:
        """What is being done, in a few fixed words: they label a metric."""
        return self._step

    @step.setter
    def step(self, step: str) -> None:
        now = time.monotonic()
        if self._step:
            self._step_seconds[self._step] = self._step_seconds.get(self._step, 0.0) + now - self._step_began
        self._step, self._step_began = step, now

    def step_seconds(self) -> dict[str, float]:
        """How long each step has taken so far, all its times together."""
        self.step = self._step
        return dict(self._step_seconds)

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total

    def fill(self, job: types_pb2.Job) -> None:
        """Write the figures into `job`."""
        job.step, job.message = self.step, self.message
        job.done_count, job.total_count = self.done, self.total
        job.cost.CopyFrom(self.cost)
        elapsed = time.monotonic() - self.started
        job.rate_per_second = (self.done - self.done_at_start) / elapsed if elapsed > 0 else 0.0
        job.ClearField("eta")
        if job.rate_per_second > 0 and self.total >= self.done:
            job.eta.CopyFrom(Duration(seconds=int((self.total - self.done) / job.rate_per_second)))


Work = Callable[[Progress], Awaitable[None]]
Rests = Callable[[], Awaitable[types_pb2.Job | None]]


class Jobs:
    """The jobs of one service. `is_complete(name)` says whether a job's artifact is there, for the caller's team."""

    def __init__(self, redis: Redis, service: str, is_complete: Callable[[str], Awaitable[bool]]) -> None:
        self._redis = redis
        self._service = service
        self._is_complete = is_complete
        self._tasks: set[asyncio.Task[None]] = set()

    def _key(self, name: str, what: str = "state") -> str:
        return f"hibug2:job:{self._service}:{context.team.get()}:{name}:{what}"

    async def create(self, name: str, work: Work, rests: Rests | None = None) -> types_pb2.Job:
        """Start `work` unless its artifact is there or somebody is at it; returns the job as it now stands.

        `rests` is asked when nobody else can be at it: it may give the job as it came to rest, and nothing is started.
        """
        if await self._is_complete(name):
            return _finished(name)
        token = uuid.uuid4().hex
        job = types_pb2.Job(name=name, state=types_pb2.JOB_STATE_RUNNING)
        job.create_time.GetCurrentTime()
        job.update_time.CopyFrom(job.create_time)
        if not await self._take(job, token):
            return await self.get(name)
        if await self._is_complete(name):  # another finished it between the first look and the lease
            await self._redis.eval(_RELEASE, 1, self._key(name, "lease"), token)
            return _finished(name)
        rested = None if rests is None else await rests()
        if rested is not None:
            await self._save(rested)  # the lease was shown as work
            await self._redis.eval(_RELEASE, 1, self._key(name, "lease"), token)
            return rested
        task = asyncio.create_task(self._run(job, token, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.sleep(0)  # a task that is cancelled before it has begun would not give the lease up
        return _copy(job)

    async def get(self, name: str) -> types_pb2.Job:
        """The job as it stands. NotFound for one nobody started; a job whose process died is FAILED and resumable."""
        job = await self._read(name)
        if job is not None and job.state not in RESTING:
            if await self._redis.exists(self._key(name, "lease")):
                return job
            job = await self._read(name)  # the owner may have said its last word since, or Redis lost both
        if await self._is_complete(name):
            return _finished(name, job)
        if job is None or job.state == types_pb2.JOB_STATE_SUCCEEDED:
            raise NotFound(f"there is no job {name}; create it")
        if job.state not in RESTING:
            gone = Unavailable(f"the process that worked on {name} is gone; create it again to go on")
            job.state = types_pb2.JOB_STATE_FAILED
            job.problem.CopyFrom(status.problem_of(gone))
        return job

    async def cancel(self, name: str) -> types_pb2.Job:
        """Ask the work to stop and wait for it, at most two seconds."""
        job = await self.get(name)
        if job.state == types_pb2.JOB_STATE_PAUSED:  # nobody is there to be asked
            job.state, token = types_pb2.JOB_STATE_CANCELLED, uuid.uuid4().hex
            if await self._take(job, token):
                await self._redis.eval(_RELEASE, 1, self._key(name, "lease"), token)
                return job
        if job.state in DONE:
            return job
        await self._redis.set(self._key(name, "cancel"), b"1", ex=KEEP_S)
        for _ in range(8):
            await asyncio.sleep(BEAT_S)
            job = await self.get(name)
            if job.state in DONE:
                break
        return job

    async def watch(self, name: str) -> AsyncIterator[types_pb2.Job]:
        """Snapshots of the job, each time something changed, until it has ended or is paused. Raises as `get` does."""
        last, found = b"", time.monotonic()
        while True:
            try:
                job = await self.get(name)
                found = time.monotonic()
            except NotFound:
                # If Redis lost its data, the owner tells it again with its next beat.
                if time.monotonic() - found > (LEASE_S if last else 4 * BEAT_S):
                    raise
                await asyncio.sleep(BEAT_S)
                continue
            seen = job.SerializeToString(deterministic=True)
            if seen != last:
                last = seen
                yield job
            if job.state in RESTING:
                return
            await asyncio.sleep(BEAT_S)

    async def close(self) -> None:
        """Stop all work of this process and give up its leases, so that another takes it over at once."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, name: str) -> types_pb2.Job | None:
        raw = await self._redis.get(self._key(name))
        return types_pb2.Job.FromString(raw) if isinstance(raw, bytes) else None

    async def _save(self, job: types_pb2.Job) -> None:
        job.update_time.GetCurrentTime()
        await self._redis.set(self._key(job.name), job.SerializeToString(), ex=KEEP_S)

    async def _take(self, job: types_pb2.Job, token: str) -> bool:
        """Take the lease, unless another has it, and show the job's state."""
        keys = [self._key(job.name, what) for what in ("lease", "state", "cancel")]
        arguments = (token, int(LEASE_S * 1000), job.SerializeToString(), KEEP_S)
        return bool(await self._redis.eval(_START, 3, *keys, *arguments))

    async def _run(self, job: types_pb2.Job, token: str, work: Work) -> None:
        progress = Progress()
        started = time.perf_counter()
        with (
            structlog.contextvars.bound_contextvars(job=job.name, team=context.team.get()),
            traces.span(f"{self._service} job", attributes={"hibug2.job": job.name}) as span,
        ):
            context.deadline.set(None)  # the call that created the job ends long before it
            task = asyncio.ensure_future(work(progress))
            beat = asyncio.create_task(self._beat(job, token, progress, task))
            interrupted = False
            try:
                await task
                job.state = types_pb2.JOB_STATE_SUCCEEDED
            except asyncio.CancelledError:
                progress.cancelled = True
                interrupted = not await self._was_cancelled(job.name)
                job.state = types_pb2.JOB_STATE_CANCELLED
            except Paused as pause:
                job.state, progress.message = types_pb2.JOB_STATE_PAUSED, str(pause)
            except HiBug2Error as error:
                job.state = types_pb2.JOB_STATE_FAILED
                job.problem.CopyFrom(status.problem_of(error))
                log.warning("job failed", reason=error.reason, error=str(error))
            except Exception:
                job.state = types_pb2.JOB_STATE_FAILED
                job.problem.CopyFrom(status.problem_of(HiBug2Error(f"internal error in {job.name}; see the log")))
                log.exception("job failed unexpectedly")
            finally:
                beat.cancel()
                await asyncio.gather(beat, return_exceptions=True)
                task.cancel()
            progress.fill(job)
            job.ClearField("eta")
            try:
                if not interrupted:  # a process that is stopped leaves its job to be taken over
                    await self._save(job)
                await self._redis.eval(_RELEASE, 1, self._key(job.name, "lease"), token)
            except RedisError as error:
                log.warning("job state not saved", error=str(error))
            state = types_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_").lower()
            span.set({"hibug2.state": state})
            if job.state == types_pb2.JOB_STATE_FAILED:
                span.fail(job.problem.reason)
            seconds = time.perf_counter() - started
            metrics.JOBS.labels(self._service, state).inc()
            metrics.JOB_SECONDS.labels(self._service).observe(seconds)
            for step, took in progress.step_seconds().items():
                metrics.JOB_STEP_SECONDS.labels(self._service, step).observe(took)
            log.info("job ended", state=state, seconds=round(seconds, 3), interrupted=interrupted)

    async def _was_cancelled(self, name: str) -> bool:
        try:
            return bool(await self._redis.exists(self._key(name, "cancel")))
        except RedisError:
            return False

    async def _beat(self, job: types_pb2.Job, token: str, progress: Progress, task: asyncio.Future[None]) -> None:
        """Renew the lease, publish progress, look for a cancel; a Redis that is away for a while is waited for."""
        lease = self._key(job.name, "lease")
        while not task.done():
            await asyncio.sleep(BEAT_S)
            try:
                if await self._was_cancelled(job.name):
                    progress.cancelled = True
                    task.cancel()
                    return
                held = await self._redis.eval(_RENEW, 1, lease, token, int(LEASE_S * 1000))
                # A lost lease (Redis was wiped, or we slept past it) is taken again, unless another has it.
                if not held and not await self._take(job, token):
                    log.warning("job taken over by another process")
                    progress.cancelled = progress.taken_over = True
                    task.cancel()
                    return
                progress.fill(job)
                await self._save(job)
            except RedisError as error:
                log.warning("progress not published", error=str(error))


def _finished(name: str, told: types_pb2.Job | None = None) -> types_pb2.Job:
    """The job of an artifact that is there, with the figures that its owner `told` last."""
    job = types_pb2.Job(name=name, reused=True) if told is None else told
    job.state = types_pb2.JOB_STATE_SUCCEEDED
    job.ClearField("problem")
    job.ClearField("eta")
    return job


def _copy(job: types_pb2.Job) -> types_pb2.Job:
    out = types_pb2.Job()
    out.CopyFrom(job)
    return out
