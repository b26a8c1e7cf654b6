"""`python -m services.enumeration.run_job --team=… --name=…`: one enumeration, as the process of a Kubernetes Job.

It has the service's settings, store and Redis. It says how far it is in Redis, which may be away, and what went wrong
in the pod's termination message, which Kubernetes keeps. SIGTERM stops it within a moment.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

from google.protobuf import json_format
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.enumeration import slices
from services.enumeration.config import Settings
from services.enumeration.lattice import Cancelled
from services.enumeration.order import Order
from services.enumeration.pod_progress import tell
from shared import logs, metrics, traces
from shared.config import load
from shared.errors import HiBug2Error, Unavailable
from shared.jobs import Progress
from shared.names import parse
from shared.queue.stream import connect
from shared.rpc import status
from shared.rpc.server import run_process, stop_signal
from shared.store.artifacts import Artifacts
from shared.store.store import Store

log = logs.get("enumeration.job")

# AWAY: another try may end well, as after what nobody expected; REFUSED: it would end the same way.
DONE, AWAY, REFUSED, STOPPED = 0, 1, 65, 143
TERMINATION_LOG = Path("/dev/termination-log")
_MESSAGE_BYTES = 4096  # that Kubernetes keeps
_TELL_S = 0.5


async def enumerate_order(settings: Settings, order: Order, stop: asyncio.Event, redis: Redis, said: Path) -> int:
    """Enumerate what is ordered and return the exit code; what went wrong is written to `said`, where that exists."""
    artifacts = Artifacts(Store(settings.store_url), order.team)
    name = parse(order.name, "enumerations", "name")
    progress = Progress()

    def work() -> None:
        if artifacts.is_complete(name):  # a pod before this one was ended when it had done it all
            return
        slices.enumerate_artifact(
            artifacts,
            name,
            parse(order.tagging, "taggings", "tagging"),
            order.split,
            order.min_count,
            order.max_depth,
            settings.max_slices,
            progress.update,
            lambda: progress.cancelled,
        )

    working = asyncio.ensure_future(asyncio.to_thread(work))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        while not working.done():
            await asyncio.wait([working, stopping], timeout=_TELL_S, return_when=asyncio.FIRST_COMPLETED)
            progress.cancelled = stop.is_set()
            if progress.cancelled:
                break
            try:
                await tell(redis, order, progress.done, progress.total)
            except RedisError as error:
                log.warning("progress not published", error=str(error))
        await working
    except Cancelled:
        return STOPPED
    except HiBug2Error as error:
        log.warning("enumeration failed", reason=error.reason, error=str(error))
        _say(said, error)
        return AWAY if isinstance(error, Unavailable) else REFUSED
    finally:
        stopping.cancel()
    return DONE


def _say(said: Path, error: HiBug2Error) -> None:
    problem = status.problem_of(error)
    text = json_format.MessageToJson(problem, indent=None)
    if len(text.encode()) > _MESSAGE_BYTES:
        problem.message = problem.message[: _MESSAGE_BYTES // 8]  # a character may take six bytes in JSON
        problem.ClearField("violations")
        problem.ClearField("metadata")
        text = json_format.MessageToJson(problem, indent=None)
    if said.exists():
        with suppress(OSError):
            said.write_text(text)


def main(arguments: list[str]) -> None:
    order = Order.parse(arguments)
    settings = load(Settings, [])
    ended = [DONE]

    async def work() -> None:
        stopped = stop_signal()  # before anything is up, so that no signal is lost
        stop_metrics = metrics.serve(settings.metrics_port)
        redis = connect(settings.redis_url)
        parent = os.environ.get("TRACEPARENT", "")
        try:
            with traces.span("enumeration pod", "consumer", parent=parent, attributes={"hibug2.job": order.name}):
                ended[0] = await enumerate_order(settings, order, stopped, redis, TERMINATION_LOG)
        finally:
            await redis.aclose()
            stop_metrics()

    run_process("enumeration-job", settings, work())
    sys.exit(ended[0])


if __name__ == "__main__":
    main(sys.argv[1:])
