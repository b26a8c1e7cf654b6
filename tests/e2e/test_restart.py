"""A gateway that is killed between steps and started again finishes the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hibug2 import Client
from hibug2.v1 import run_pb2, types_pb2
from shared.rpc.probe import healthy


@contextmanager
def gateway(platform: Any, images: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A gateway in a process of its own, in front of the platform's services."""
    environment = {
        **os.environ,
        "HIBUG2_LISTEN": f"127.0.0.1:{port}",
        "HIBUG2_HTTP_PORT": "0",
        "HIBUG2_METRICS_PORT": "0",
        "HIBUG2_LOG_LEVEL": "warning",
        "HIBUG2_STORE_URL": (platform.stack.folder / "store").resolve().as_uri(),
        "HIBUG2_REDIS_URL": platform.stack.redis_url,
        "HIBUG2_IMAGE_PREFIXES": images.as_uri(),
        **{f"HIBUG2_{k.upper()}": v for k, v in platform.stack.backends.items()},
    }
    process = subprocess.Popen([sys.executable, "-m", "services.gateway"], env=environment)
    try:
        assert healthy(f"127.0.0.1:{port}", 30)
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_gateway_finishes_the_run_when_it_is_back(start_platform: Callable[..., Any], images: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # No worker yet: the run cannot get past tagging before the gateway is dead.
    with start_platform(images, workers=0, with_gateway=False) as platform:
        with gateway(platform, images, port) as first, Client(f"127.0.0.1:{port}") as client:
            client.create_dataset("bags", images / "manifest.csv")
            client.add_scores("bags", "v1", images / "v1.csv")
            started = client.run("bags", "v1", wait=False, budget=20)
            end = time.monotonic() + 30
            while not any(s.kind == run_pb2.STEP_KIND_TAGGING for s in client.get_run(started).steps):
                assert time.monotonic() < end
                time.sleep(0.05)
            first.send_signal(signal.SIGKILL)
            first.wait()
        platform.stack.start_workers(2)
        with gateway(platform, images, port), Client(f"127.0.0.1:{port}") as client:
            *_, last = client.watch(started)
            assert last.job.state == types_pb2.JOB_STATE_SUCCEEDED
            assert last.summary.error_slice_count > 0
            assert len(client.runs()) == 1
