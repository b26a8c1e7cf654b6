"""`python -m tests.load.load_slices`: many clients read a million slices each from one enumeration server.

The server is a process of its own; its memory is read while 20 clients stream an enumeration of 1,000,000 slices, in
a second round one of them slowly. Told are rows a second, the server's memory before and at its highest, and how
long the quick clients took with and without the slow one beside them. The figures go to docs/results.md.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pyarrow as pa

from hibug2.v1 import slice_pb2, slice_pb2_grpc
from shared.names import Name
from shared.rpc.probe import healthy
from shared.schema import Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import Artifacts, Manifest, Provenance, item_columns
from shared.store.store import Store
from tests.load.page import write_section

CLIENTS, SLICES, ATTRIBUTES, TAGS = 20, 1_000_000, 47, 5
NAME = Name("load", "enumerations", "million")


def store_slices(store: Store) -> None:
    """An enumeration of SLICES three-pair slices under its names in the store."""
    tags = tuple(f"tag {t}" for t in range(TAGS))
    schema = Schema(
        Task.CLASSIFICATION,
        ("thing",),
        tuple(Attribute(f"attribute {a}", Category.GLOBAL, tags, Tagger.GIVEN) for a in range(ATTRIBUTES)),
    )
    artifacts = Artifacts(store, "default")
    artifacts.write_schema("load", schema, Provenance({}))
    rng = np.random.default_rng(0)
    attributes = np.sort(rng.permuted(np.tile(np.arange(ATTRIBUTES), (SLICES, 1)), axis=1)[:, :3], axis=1)
    items = (attributes * TAGS + rng.integers(0, TAGS, attributes.shape)).astype(np.int32)
    count = rng.integers(10, 500, SLICES)
    artifacts.write_part(NAME, "slices", pa.table({**item_columns(items), "count": pa.array(count)}))
    parameters = {"schema": schema.schema_id, "tagging": "datasets/load/taggings/none", "split": "validation"}
    artifacts.complete(NAME, Manifest(Provenance({}, parameters), {"slice_count": SLICES}))


def read_all(address: str, pause_s: float = 0.0, stop: threading.Event | None = None) -> int:
    """Rows that one client read; with a pause after each message, until `stop`."""
    rows = 0
    with grpc.insecure_channel(address) as channel:
        call = slice_pb2_grpc.SliceServiceStub(channel).ReadSlices(slice_pb2.ReadSlicesRequest(parent=str(NAME)))
        pieces = (response.arrow for response in call)
        if pause_s:
            for _ in pieces:
                if stop is not None and stop.wait(pause_s):
                    call.cancel()
                    return rows
            return rows
        for batch in pa.ipc.open_stream(_Pieces(pieces)):
            rows += batch.num_rows
    return rows


class _Pieces:
    """A file over an iterator of bytes."""

    closed = False

    def __init__(self, pieces: object) -> None:
        self._pieces = iter(pieces)  # type: ignore[call-overload]
        self._left = b""

    def read(self, size: int = -1) -> bytes:
        while len(self._left) < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._left += piece
        out, self._left = self._left[:size], self._left[size:]
        return out

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


class Memory(threading.Thread):
    """The highest resident bytes of a process, read ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._path = Path(f"/proc/{pid}/status")
        self.highest = 0
        self.done = threading.Event()

    def now(self) -> int:
        line = next(line for line in self._path.read_text().splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def run(self) -> None:
        while not self.done.wait(0.1):
            self.highest = max(self.highest, self.now())


def quick_clients(address: str, count: int) -> tuple[float, int]:
    """Seconds and rows of `count` clients that read at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        rows = list(pool.map(lambda _: read_all(address), range(count)))
    assert rows == [SLICES] * count, rows
    return time.perf_counter() - start, sum(rows)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        store_slices(Store(Path(folder).as_uri()))
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        environment = {
            **os.environ,
            "HIBUG2_LISTEN": address,
            "HIBUG2_STORE_URL": Path(folder).as_uri(),
            "HIBUG2_METRICS_PORT": "0",
            "HIBUG2_LOG_LEVEL": "error",
            "HIBUG2_DRAIN_S": "0",
        }
        server = subprocess.Popen([sys.executable, "-m", "services.enumeration"], env=environment)
        try:
            assert healthy(address, 30)
            read_all(address)  # the artifact is opened once, whoever reads it
            memory = Memory(server.pid)
            before = memory.now()
            memory.start()
            alone_s, rows = quick_clients(address, CLIENTS)
            stop = threading.Event()
            slow = threading.Thread(target=read_all, args=(address, 0.5, stop))
            slow.start()
            beside_s, _ = quick_clients(address, CLIENTS - 1)
            stop.set()
            slow.join()
            memory.done.set()
        finally:
            server.terminate()
            server.wait()
    text = f"""## Many readers of one enumeration

`make load`: {CLIENTS} clients read {SLICES:,} slices each by Arrow stream from one server process, on
{os.cpu_count()} cores with the clients beside it.

| | |
|---|---:|
| {CLIENTS} clients at once | {alone_s:.1f} s, {rows / alone_s / 1e6:.2f} million slices a second |
| {CLIENTS - 1} clients beside one that pauses half a second after each message | {beside_s:.1f} s |
| server memory with the artifact open, before | {before / 1e6:.0f} MB |
| highest while they read | {memory.highest / 1e6:.0f} MB (+{(memory.highest - before) / 1e6:.0f} MB) |
"""
    write_section("readers", text)
    print(text)


if __name__ == "__main__":
    main()
