"""The demo, and runs of its data, through the gateway of a platform that stands somewhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from deploy.images import build
from hibug2 import Client
from hibug2.v1 import run_pb2, types_pb2


class Reached(Protocol):
    """A platform: where its gateway is, and a folder that is the same here as there."""

    @property
    def address(self) -> str: ...

    @property
    def images(self) -> Path: ...


def demo(platform: Reached) -> str:
    """All that `make demo` does, through the platform's gateway; what it printed."""
    program = "import sys; from deploy.local.demo import debug; debug(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", program, platform.address],
        cwd=platform.images,
        env={**os.environ, "PYTHONPATH": f"{build.ROOT}{os.pathsep}{build.ROOT / 'client'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_again(platform: Reached, client: Client, name: str) -> run_pb2.Run:
    """A run of the demo's model over a dataset of its own, just started."""
    folder = platform.images / ".demo"
    client.create_dataset(name, folder / "manifest.csv")
    client.add_scores(name, "logreg", folder / "predictions.csv")
    return client.run(name, "logreg", wait=False)


def in_tagging(client: Client, run: run_pb2.Run) -> int:
    """Wait until some images are tagged and others are not; how many are."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for step in client.get_run(run).steps:
            if step.kind == run_pb2.STEP_KIND_TAGGING and 0 < step.job.done_count < step.job.total_count:
                return int(step.job.done_count)
        time.sleep(0.02)
    raise AssertionError("the run was never seen in the middle of tagging")


def finished(platform: Reached, run: run_pb2.Run) -> run_pb2.Run:
    """The run when it has ended, well, with every image tagged. The gateway may be away for a while."""
    end = time.monotonic() + 300
    while True:
        try:
            with Client(platform.address) as client:
                *_, last = client.watch(run)
            break
        except Exception:
            if time.monotonic() > end:
                raise
            time.sleep(1)
    assert last.job.state == types_pb2.JOB_STATE_SUCCEEDED, last
    tagging = next(step for step in last.steps if step.kind == run_pb2.STEP_KIND_TAGGING)
    assert tagging.job.done_count == tagging.job.total_count > 0
    return last


def error_slices(client: Client, run: run_pb2.Run) -> list[tuple[object, ...]]:
    """Pairs, count and mean of every error slice of the run, in an order of their own."""
    table: pa.Table = client.slices(run)
    return sorted(
        (tuple((p["attribute"], p["tag"]) for p in row["tags"]), row["count"], row["mean"]) for row in table.to_pylist()
    )
