"""Channels to other services: deadlines, retries on UNAVAILABLE, one connection to every replica."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc.aio import ClientCallDetails

from shared.config import ServiceSettings
from shared.rpc import context, tls

UNARY_S = 60.0
STREAM_S = 24 * 3600.0

_BALANCING: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}
_RETRIES = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A service that comes back under another address is found within seconds, not after gRPC's half minute.
    ("grpc.dns_min_time_between_resolutions_ms", 3_000),
]


def _details(details: ClientCallDetails, limit_s: float) -> ClientCallDetails:
    metadata = grpc.aio.Metadata(*(details.metadata or ()))
    present = {key for key, _ in metadata}
    for key, value in context.outgoing():
        if key not in present:
            metadata.add(key, value)
    timeout = details.timeout if details.timeout is not None else context.time_left(limit_s)
    return ClientCallDetails(details.method, timeout, metadata, details.credentials, details.wait_for_ready)


class _UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: ClientCallDetails,
        request: Any,
    ) -> Any:
        return await continuation(_details(client_call_details, UNARY_S), request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: ClientCallDetails,
        request: Any,
    ) -> Any:
        return await continuation(_details(client_call_details, STREAM_S), request)


def connect(target: str, settings: ServiceSettings | None = None, *, retries: bool = True) -> grpc.aio.Channel:
    """A channel to `target` (host:port or dns:///name:port) on behalf of the caller of the moment.

    A call that finds nobody there (UNAVAILABLE) is made up to five times, within 2 s or so, unless `retries` is off.
    With TLS where `settings` name a CA, and with the certificate that they name, if any, shown to the server.
    InvalidInput for a file that cannot be used.
    """
    interceptors: list[Any] = [_UnaryUnary(), _UnaryStream()]
    config = json.dumps(_BALANCING | _RETRIES if retries else _BALANCING)
    options = [("grpc.service_config", config), *OPTIONS]
    if settings is None or not settings.tls_ca_file:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    return tls.RenewedChannel(
        tls.Pems(settings),
        lambda credentials: grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors),
    )
