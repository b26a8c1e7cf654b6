"""Each container's process, as the chart starts it, answers the probe that the chart gives it and ends on SIGTERM."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from deploy.local.redis import embedded_redis
from shared.rpc.probe import healthy
from tests.chart.conftest import ROOT, SERVICES, VALUES, Run, render, service_of


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.parametrize("component", [*SERVICES, "tagging-workers"])
def test_a_process_is_probed_and_stopped(run_helm: Run, tmp_path: Path, component: str) -> None:
    rendered = render(run_helm, VALUES / "folder-store.yaml")
    deployment = rendered.of("Deployment")[f"hibug2-{component}"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    port, metrics = free_port(), free_port()
    with embedded_redis() as redis_url:
        of_this_machine = {
            "HIBUG2_LISTEN": f"127.0.0.1:{port}",
            "HIBUG2_METRICS_PORT": str(metrics),
            "HIBUG2_HTTP_PORT": str(free_port()),
            "HIBUG2_STORE_URL": f"file://{tmp_path}/store",
            "HIBUG2_REDIS_URL": redis_url,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", f"services.{service_of(container)}", *container.get("args", [])],
            cwd=ROOT,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("HIBUG2_")},
                **rendered.environment(container),
                **of_this_machine,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            up, deadline = False, time.monotonic() + 60
            while not up and process.poll() is None and time.monotonic() < deadline:
                # /metrics comes last, just before the process minds SIGTERM
                up = healthy(f"127.0.0.1:{port}", timeout_s=1) and answers(metrics)
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert up, f"no answer to the probe; the process said:\n{output}"
    assert process.returncode == 0, output
