"""`python -m services.tagging` serves; `python -m services.tagging worker` works."""

from __future__ import annotations

import gc
import sys

from services.tagging.config import Settings
from services.tagging.server import start_server
from services.tagging.worker import Worker
from shared import metrics
from shared.config import load
from shared.queue.stream import connect
from shared.rpc.server import run, run_process, start, stop_signal
from shared.store.store import Store


async def _work(settings: Settings) -> None:
    gc.collect()
    gc.freeze()  # what is loaded now stays: going through it again and again took a sixth of a worker's time
    stop_metrics = metrics.serve(settings.metrics_port)
    redis = connect(settings.redis_url)
    health = await start(settings, lambda server: [])  # a worker answers no call but the prober's
    try:
        await Worker(settings, redis, Store(settings.store_url)).run(stop_signal())
    finally:
        await health.stop()
        await redis.aclose()
        stop_metrics()


def main(arguments: list[str]) -> None:
    if "worker" not in arguments:
        return run(Settings, start_server)
    settings = load(Settings, arguments)
    return run_process("tagging-worker", settings, _work(settings))


if __name__ == "__main__":
    main(sys.argv[1:])
