"""What happens around every call: context, logs, traces, metrics, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from redis.exceptions import RedisError

from shared import logs, metrics, traces
from shared.errors import HiBug2Error, Unavailable
from shared.rpc import context as call_context
from shared.rpc import status

log = logs.get("rpc")
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]


class ServerInterceptor(grpc.aio.ServerInterceptor):
    """Binds team and request id, logs and measures each call, maps errors. Health and reflection pass untouched."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/hibug2."):
            return handler
        return _wrap(method, handler)


def _wrap(method: str, handler: Any) -> Handler:
    if handler.response_streaming:
        inner_stream = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with _call(method, context):
                async for response in inner_stream(request, context):
                    yield response

        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(stream, handler.request_deserializer, handler.response_serializer)

    inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

    async def unary(request: Any, context: Context) -> Any:
        async with _call(method, context):
            return await inner(request, context)

    make_unary = (
        grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    )
    return make_unary(unary, handler.request_deserializer, handler.response_serializer)


def _traceparent(context: Context) -> str:
    return next((str(value) for key, value in context.invocation_metadata() or () if key == traces.KEY), "")


@asynccontextmanager
async def _call(method: str, context: Context) -> AsyncIterator[None]:
    started = time.perf_counter()
    code = "OK"
    in_flight = metrics.RPCS_IN_FLIGHT.labels(method)
    in_flight.inc()
    try:
        call_context.enter(context.invocation_metadata() or (), context.time_remaining())
        team, request = call_context.team.get(), call_context.request_id.get()
        attributes = {"rpc.system": "grpc", "hibug2.team": team, "hibug2.request_id": request}
        with (
            traces.span(method[1:], "server", parent=_traceparent(context), attributes=attributes),
            structlog.contextvars.bound_contextvars(team=team, request_id=request, method=method),
        ):
            try:
                yield
            except (HiBug2Error, RedisError, grpc.RpcError, grpc.aio.AbortError):
                raise
            except Exception:
                log.exception("call failed unexpectedly")
                raise
    except HiBug2Error as error:
        code = error.code
        await status.abort(context, error)
    except RedisError as error:
        log.warning("redis is away", error=str(error))
        away = Unavailable("the queue cannot be reached at the moment; try again")
        code = away.code
        await status.abort(context, away)
    except asyncio.CancelledError:
        code = "CANCELLED"
        raise
    except grpc.aio.AioRpcError as failure:
        # A service behind this one failed: pass on what it said.
        said = status.error_of(failure)
        code = said.code
        await status.abort(context, said)
    except (grpc.aio.AbortError, GeneratorExit):
        code = "ABORTED"
        raise
    except Exception:  # noqa: BLE001 - logged above; the caller learns no internals
        code = "INTERNAL"
        await status.abort(
            context,
            HiBug2Error(f"internal error; quote request {call_context.request_id.get()} to the operator"),
        )
    finally:
        seconds = time.perf_counter() - started
        metrics.RPCS.labels(method, code).inc()
        metrics.RPC_SECONDS.labels(method, code).observe(seconds)
        in_flight.dec()
        log.debug("call", method=method, code=code, seconds=round(seconds, 4), team=call_context.team.get())
