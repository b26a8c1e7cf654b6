"""A gRPC server: health, reflection by switch, interceptors, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shared import logs, metrics
from shared.config import ServiceSettings, load
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
    """A server that answers at `address` until `stop` has been awaited."""

    server: grpc.aio.Server
    health: health.aio.HealthServicer
    address: str
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
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> RunningServer:
    """Start a server at `settings.listen`. `add` adds the servicers and returns the full names of their services.

    OSError when the address is taken.
    """
    server = grpc.aio.server(interceptors=[ServerInterceptor(), *interceptors], options=_OPTIONS)
    names = add(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if settings.reflection:
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    try:
        port = server.add_insecure_port(settings.listen)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {settings.listen} (HIBUG2_LISTEN): {error}") from error
    await server.start()
    for name in ["", *names]:
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    host = settings.listen.rpartition(":")[0]
    address = f"{'127.0.0.1' if host in ('0.0.0.0', '[::]', '') else host}:{port}"  # noqa: S104
    log.info("serving", address=address, services=list(names))
    return RunningServer(server, health_servicer, address, settings.drain_s, tuple(closers))


async def serve_until_stopped(running: RunningServer, settings: ServiceSettings) -> None:
    """Serve, with /metrics beside, until SIGTERM or SIGINT; then drain and return."""
    stop_metrics = metrics.serve(settings.metrics_port)
    stopped = stop_signal()
    try:
        await stopped.wait()
    finally:
        log.info("draining", address=running.address)
        await running.stop()
        stop_metrics()


def run(settings_type: type[Service], start_server: Callable[[Service], Awaitable[RunningServer]]) -> None:
    """The main function of a service: settings from the environment, logs, serve until stopped."""
    settings = load(settings_type, sys.argv[1:])
    logs.configure(settings.log_level)

    async def main() -> None:
        await serve_until_stopped(await start_server(settings), settings)

    asyncio.run(main())


def stop_signal() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    return stopped
