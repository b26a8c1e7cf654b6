"""The whole platform on real sockets, and a small dataset of real images beside it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from deploy.local import demo
from deploy.local.stack import Stack
from hibug2 import Client

COUNTS = {"validation": 700, "pool": 250, "test": 250}


class Platform:
    """A stack in a thread of its own; `address` is the gateway's."""

    def __init__(self, stack: Stack, loop: asyncio.AbstractEventLoop) -> None:
        self.stack = stack
        self._loop = loop

    @property
    def address(self) -> str:
        return self.stack.address

    def client(self, **given: Any) -> Client:
        return Client(self.address, **given)


@contextmanager
def running(folder: Path, images: Path, **settings: Any) -> Iterator[Platform]:
    loop = asyncio.new_event_loop()
    started: Future[Stack] = Future()
    stop = asyncio.Event()

    async def serve() -> None:
        try:
            async with Stack(folder, (images.as_uri(),), **settings) as stack:
                started.set_result(stack)
                await stop.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        yield Platform(started.result(60), loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest (pool images without labels), some hundred real images, and two models' predictions."""
    folder = tmp_path_factory.mktemp("images").resolve()
    table = pq.read_table(demo.DATA)
    parts = [table.filter(pc.equal(table.column("split"), s)).slice(0, n) for s, n in COUNTS.items()]
    demo.write_images(pa.concat_tables(parts), folder)
    rows = pa.concat_tables(parts)
    labels = rows.column("label").cast(pa.string()).to_pylist()
    # Shirts are often taken for coats; every seventh of the rest for its neighbour in the list of classes.
    classes = sorted(set(labels))
    for name, wrong in (("v1", 7), ("v2", 11)):
        said = [
            "Coat"
            if label == "Shirt" and i % 3
            else classes[(classes.index(label) + 1) % len(classes)]
            if i % wrong == 0
            else label
            for i, label in enumerate(labels)
        ]
        pa.csv.write_csv(pa.table({"id": rows.column("id"), "predicted": said}), folder / f"{name}.csv")
    return folder


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def platform(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running(tmp_path_factory.mktemp("stack"), images, http_port=free_port()) as found:
        yield found


@pytest.fixture
def client(platform: Platform) -> Iterator[Client]:
    with platform.client() as found:
        yield found


@pytest.fixture(scope="session")
def start_platform(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Starts a platform of its own, for tests that break it or set it up otherwise."""
    return lambda images, **settings: running(tmp_path_factory.mktemp("stack"), images, **settings)
