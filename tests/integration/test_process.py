"""A service as its own process: settings, metrics, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from hibug2.v1 import repair_pb2 as pb
from hibug2.v1 import repair_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from shared.errors import Precondition
from shared.jobs import Jobs, Progress
from shared.rpc.channel import connect
from shared.rpc.probe import healthy
from tests.integration.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
NAME = "datasets/d/selections/s"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


async def process(*arguments: str, **variables: str) -> Process:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HIBUG2_")}
    environment |= {f"HIBUG2_{name}": value for name, value in variables.items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "client")])
    command = [sys.executable, "-m", *arguments]
    return await asyncio.create_subprocess_exec(*command, env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE)


@pytest.mark.parametrize("arguments", [("services.repair",), ("services.tagging", "worker")])
async def test_a_wrong_setting_ends_with_2_and_names_the_variable(arguments):
    started = await process(*arguments, METRICS_PORT="x", DRAIN_S="-1")
    _, told = await asyncio.wait_for(started.communicate(), 30)
    assert started.returncode == 2
    assert sorted(line.partition(":")[0] for line in told.decode().splitlines()) == [
        "HIBUG2_DRAIN_S",
        "HIBUG2_METRICS_PORT",
    ]


async def test_a_certificate_that_is_not_there_ends_the_process_with_a_line_that_names_the_variable():
    started = await process(
        "services.repair", METRICS_PORT="0", TLS_CERT_FILE="/none/tls.crt", TLS_KEY_FILE="/none/tls.key"
    )
    _, told = await asyncio.wait_for(started.communicate(), 30)
    assert started.returncode == 1
    assert told.decode().splitlines()[-1].startswith("HIBUG2_TLS_CERT_FILE: /none/tls.crt cannot be read")
    assert "Traceback" not in told.decode()


async def test_print_config_masks_the_key():
    started = await process("services.tagging", "--print-config", LLM_API_KEY="sesame", LLM_MODEL="m")
    printed, _ = await asyncio.wait_for(started.communicate(), 30)
    assert started.returncode == 0
    assert b'"llm_model": "m"' in printed
    assert b'"llm_api_key": "*' in printed
    assert b"sesame" not in printed


async def test_a_service_serves_measures_and_drains(redis, redis_url, tmp_path):
    """SIGTERM lets a running call end, and the process ends with 0."""
    port, metrics_port = free_port(), free_port()
    started = await process(
        "services.repair",
        LISTEN=f"127.0.0.1:{port}",
        METRICS_PORT=str(metrics_port),
        REDIS_URL=redis_url,
        STORE_URL=tmp_path.as_uri(),
        DRAIN_S="30",
    )

    async def is_complete(_: str) -> bool:
        return False  # neither replica finds the artifact: the job's own word is what the watcher gets

    release = asyncio.Event()

    async def work(progress: Progress) -> None:
        await release.wait()
        raise Precondition("enough")

    jobs = Jobs(redis, "repair", is_complete)  # another replica, whose job the process watches
    await jobs.create(NAME, work)
    try:
        await eventually(lambda: asyncio.to_thread(healthy, f"127.0.0.1:{port}", 1.0), 30)
        async with connect(f"127.0.0.1:{port}") as channel:
            stub = rpc.RepairServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.GetSelection(pb.GetSelectionRequest(name="nonsense"))

            def metrics() -> str:
                with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5) as page:
                    return page.read().decode()

            async def counted() -> bool:
                return line in await asyncio.to_thread(metrics)

            method = "/hibug2.v1.RepairService/GetSelection"
            line = f'hibug2_rpc_handled_total{{code="INVALID_ARGUMENT",method="{method}"}} 1.0'
            await eventually(counted)  # a call is counted once its answer is out
            watching = stub.WatchSelection(pb.WatchSelectionRequest(name=NAME))
            assert (await watching.read()).job.state == types_pb2.JOB_STATE_RUNNING
            started.send_signal(signal.SIGTERM)
            await eventually(lambda: _refuses(port))
            release.set()
            states = [answer.job.state async for answer in watching]
            assert states[-1] == types_pb2.JOB_STATE_FAILED
        assert await asyncio.wait_for(started.wait(), 20) == 0
        logged = (await started.stderr.read()).decode()
        assert '"event": "draining"' in logged
        assert "Traceback" not in logged
    finally:
        release.set()
        await jobs.close()
        if started.returncode is None:
            started.kill()
            await started.wait()


@pytest.mark.parametrize("arguments", [("services.gateway",), ("services.tagging", "worker")])
async def test_sigterm_ends_well_whatever_has_begun(arguments, redis_url, tmp_path):
    """While it is imported, and in the moment in which it begins to serve."""

    async def ended(moment: Callable[[Process], Awaitable[object]]) -> tuple[int, str]:
        settings = {"LISTEN": "127.0.0.1:0", "METRICS_PORT": "0", "HTTP_PORT": "0", "DRAIN_S": "1"}
        started = await process(*arguments, **settings, REDIS_URL=redis_url, STORE_URL=tmp_path.as_uri())
        try:
            await asyncio.wait_for(moment(started), 30)
            started.send_signal(signal.SIGTERM)
            _, logged = await asyncio.wait_for(started.communicate(), 20)
        finally:
            if started.returncode is None:
                started.kill()
                await started.wait()
        return started.returncode, logged.decode()

    async def imported(started: Process) -> None:
        await eventually(lambda: _hears_sigterm(started.pid))

    async def serving(started: Process) -> None:
        while line := await started.stderr.readline():  # nothing more comes of one that died
            if b'"serving"' in line:
                return

    early, late = await asyncio.gather(ended(imported), ended(serving))
    for status, logged in (early, late):
        assert status == 0, logged
        assert "Traceback" not in logged
    assert '"draining"' not in early[1]
    if "worker" not in arguments:
        assert '"draining"' in late[1]  # what has begun to serve ends as it should


def _hears_sigterm(pid: int) -> bool:
    """True once the process has a handler for the signal."""
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


async def _refuses(port: int) -> bool:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            await rpc.RepairServiceStub(channel).GetSelection(pb.GetSelectionRequest(name="x"), timeout=2)
        except grpc.aio.AioRpcError as failure:
            return failure.code() is grpc.StatusCode.UNAVAILABLE
    return False
