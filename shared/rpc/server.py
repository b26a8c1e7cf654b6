"""A gRPC server: TLS, health, reflection by switch, interceptors, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared import logs, metrics, traces
from shared.config import ServiceSettings, load
from shared.errors import InvalidInput
from shared.rpc import tls
from shared.rpc.interceptors import ServerInterceptor

log = logs.get("rpc")
Service = TypeVar("Service", bound=ServiceSettings)
_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]


@dataclass
class RunningServer:
    """A server that answers at `address` until `stop` has been awaited.

    inside: where this process calls it without TLS; the same as `address` where there is no TLS.
    """

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    address: str
    inside: str
    drain_s: float
    closers: Sequence[Callable[[], object]] = field(default_factory=tuple)

    async def stop(self) -> None:
        """Report NOT_SERVING, let running calls end for at most `drain_s` seconds, then close what it stood on."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(self.drain_s)
        for closer in self.closers:
            result = closer()
            if asyncio.iscoroutine(result):
                await result


async def start(
    settings: ServiceSettings,
    add: Callable[[grpc.aio.Server], Sequence[str]],
    closers: Sequence[Callable[[], object]] = (),
) -> RunningServer:
    """Start a server at `settings.listen`. `add` adds the servicers and returns the full names of their services.

    With TLS when the settings name a certificate. Raises InvalidInput for one that cannot be used, and OSError when an
    address is taken.
    """
    credentials = tls.server_credentials(tls.Pems(settings))
    async with AsyncExitStack() as exits:
        server = grpc.aio.server(interceptors=[ServerInterceptor()], options=_OPTIONS)
        exits.push_async_callback(server.stop, None)
        names = add(server)
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        if settings.reflection:
            reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        host = settings.listen.rpartition(":")[0]
        port = _listen(server, settings.listen, "HIBUG2_LISTEN", credentials)
        address = f"{'127.0.0.1' if host in ('0.0.0.0', '[::]', '') else host}:{port}"  # noqa: S104
        inside = address
        if credentials is not None:
            folder = tempfile.mkdtemp(prefix="hibug2-")  # nobody else may look into it
            exits.callback(shutil.rmtree, folder, ignore_errors=True)
            inside = f"unix:{folder}/grpc.sock"
            server.add_insecure_port(inside)
        if settings.health_port:
            probed = grpc.aio.server(options=_OPTIONS)
            exits.push_async_callback(probed.stop, None)
            health_pb2_grpc.add_HealthServicer_to_server(health_servicer, probed)
            _listen(probed, f"{host}:{settings.health_port}", "HIBUG2_HEALTH_PORT", None)
            await probed.start()
        await server.start()
        for name in ["", *names]:
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", address=address, services=list(names), tls=credentials is not None)
        closing = [*closers, exits.pop_all().aclose]
        return RunningServer(server, health_servicer, address, inside, settings.drain_s, closing)


def _listen(server: grpc.aio.Server, address: str, variable: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address} ({variable}): {error}") from error


async def serve_until(stopped: asyncio.Event, running: RunningServer, settings: ServiceSettings) -> None:
    """Serve, with /metrics beside, until `stopped` is set; then drain and return."""
    stop_metrics = metrics.serve(settings.metrics_port)
    try:
        await stopped.wait()
    finally:
        log.info("draining", address=running.address)
        await running.stop()
        stop_metrics()


def run(settings_type: type[Service], start_server: Callable[[Service], Awaitable[RunningServer]]) -> None:
    """The main function of a service: settings from the environment, logs, serve until stopped."""
    settings = load(settings_type, sys.argv[1:])

    async def main() -> None:
        stopped = stop_signal()  # before anything is up, so that no signal is lost
        await serve_until(stopped, await start_server(settings), settings)

    run_process(settings_type.__module__.split(".")[1], settings, main())  # services.<service>.config


def run_process(name: str, settings: ServiceSettings, main: Coroutine[object, object, None]) -> None:
    """Run `main` with logs, and with traces as `name`; a setting that names what cannot be used ends it with a line."""
    logs.configure(settings.log_level)
    try:
        with traces.sending(name, settings.otlp_endpoint):
            asyncio.run(main)
    except InvalidInput as error:
        sys.exit(str(error))


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped
