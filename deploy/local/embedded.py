"""An enumeration server for one command: `hibug2 enumerate` starts it where no gateway runs.

It is the service itself on a loopback socket, in a thread of the calling process. A table that is sent along needs no
Redis, so none is started.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from deploy.local.plain import PLAIN
from services.enumeration.config import Settings
from services.enumeration.server import start_server
from shared import logs


@contextmanager
def enumeration() -> Iterator[str]:
    """The address of an enumeration server that lives as long as the context."""
    logs.configure("warning")
    settings = Settings(
        **PLAIN,
        listen="127.0.0.1:0",
        metrics_port=0,
        drain_s=0.0,
        store_url="memory://hibug2",
        redis_url="redis://127.0.0.1:1/0",
    )
    started: Future[str] = Future()
    stop = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        try:
            running = await start_server(settings)
        except BaseException as error:
            started.set_exception(error)
            raise
        started.set_result(f"http://{running.address}")
        await stop.wait()
        await running.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        yield started.result()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
