"""Calls that the gateway passes on: bytes in, bytes out, to the service that owns them.

What the gateway adds is what a public door is for: the caller's team and request id, bound by the interceptor, travel
with the call; a caller cannot choose them behind the door.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from shared.rpc import context as call
from shared.rpc.channel import STREAM_S, UNARY_S

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


def _same(data: bytes) -> bytes:
    return data


def add_proxy(server: grpc.aio.Server, service: ServiceDescriptor, channel: grpc.aio.Channel) -> str:
    """Serve every method of `service` by calling it on `channel`; returns the service's full name."""
    handlers = {method.name: _handler(method, channel) for method in service.methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    return str(service.full_name)


def _handler(method: MethodDescriptor, channel: grpc.aio.Channel) -> grpc.RpcMethodHandler[Any, Any]:
    path = f"/{method.containing_service.full_name}/{method.name}"
    if method.client_streaming and method.server_streaming:
        call_both = channel.stream_stream(path, _same, _same)

        async def both(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            answers = call_both(requests, timeout=call.time_left(STREAM_S), metadata=call.outgoing())
            async for response in answers:
                yield response

        return grpc.stream_stream_rpc_method_handler(both, _same, _same)
    if method.server_streaming:
        call_stream = channel.unary_stream(path, _same, _same)

        async def stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
            async for response in call_stream(request, timeout=call.time_left(STREAM_S), metadata=call.outgoing()):
                yield response

        return grpc.unary_stream_rpc_method_handler(stream, _same, _same)
    if method.client_streaming:
        call_upload = channel.stream_unary(path, _same, _same)

        async def upload(requests: AsyncIterator[bytes], context: Context) -> bytes:
            return await call_upload(requests, timeout=call.time_left(STREAM_S), metadata=call.outgoing())

        return grpc.stream_unary_rpc_method_handler(upload, _same, _same)
    call_unary = channel.unary_unary(path, _same, _same)

    async def unary(request: bytes, context: Context) -> bytes:
        return await call_unary(request, timeout=call.time_left(UNARY_S), metadata=call.outgoing())

    return grpc.unary_unary_rpc_method_handler(unary, _same, _same)
