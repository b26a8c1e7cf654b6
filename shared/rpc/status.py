"""Errors on the wire: `shared.errors` to and from `google.rpc.Status`."""

from __future__ import annotations

from urllib.parse import quote

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from hibug2.v1 import types_pb2
from shared import errors

_DETAILS = "grpc-status-details-bin"
# The status travels in trailers, which peers bound to 8 KiB: the details in base64, the message percent-encoded.
_DETAIL_BYTES = 4200
_MESSAGE_BYTES = 1500
_MAX_VIOLATIONS = 20
_MAX_METADATA = 5
_PLAIN = "".join(chr(c) for c in range(0x20, 0x7F) if c != ord("%"))
_CLASSES: dict[str, type[errors.HiBug2Error]] = {
    cls.code: cls
    for cls in (
        errors.InvalidInput,
        errors.NotFound,
        errors.AlreadyExists,
        errors.Precondition,
        errors.PermissionDenied,
        errors.TooLarge,
        errors.Unavailable,
        errors.DataLoss,
    )
}
# Errors that share their code with another are told apart by their reason.
_REASONS: dict[str, type[errors.HiBug2Error]] = {errors.Busy.reason: errors.Busy}


def status_of(error: errors.HiBug2Error) -> status_pb2.Status:
    """The status that says what `error` says."""
    code = grpc.StatusCode[error.code].value[0]
    status = status_pb2.Status(code=code, message=_clipped(error.message, _MESSAGE_BYTES))
    told = list(error.metadata.items())[:_MAX_METADATA]
    metadata = {_clipped(key, 60): _clipped(value, 200) for key, value in told}
    _add(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=errors.DOMAIN, metadata=metadata))
    if isinstance(error, errors.InvalidInput) and error.violations:
        room = _DETAIL_BYTES - status.ByteSize()
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad.field_violations.add(
                field=_clipped(violation.field, 200), description=_clipped(violation.description, 300)
            )
            if bad.ByteSize() + 64 > room:
                del bad.field_violations[-1]
                break
        _add(status, bad)
    if isinstance(error, errors.Busy):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(error.retry_s * 1000))
        _add(status, retry)
    return status


def _clipped(text: str, limit: int) -> str:
    """The head of `text` that takes at most `limit` bytes percent-encoded, as gRPC sends a message."""
    text = text[:limit]
    while len(quote(text, safe=_PLAIN)) > limit:
        text = text[: len(text) * 9 // 10]
    return text


def _add(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


async def abort(context: grpc.aio.ServicerContext, error: errors.HiBug2Error) -> None:  # type: ignore[type-arg]
    """End the call with `error`; does not return."""
    status = status_of(error)
    trailers = ((_DETAILS, status.SerializeToString()),)
    await context.abort(grpc.StatusCode[error.code], status.message, trailing_metadata=trailers)


def error_of(failure: grpc.aio.AioRpcError) -> errors.HiBug2Error:
    """The error that a called service meant, or Unavailable / HiBug2Error for what gRPC itself says."""
    for key, value in failure.trailing_metadata() or ():
        if key == _DETAILS and isinstance(value, bytes):
            return _from_status(status_pb2.Status.FromString(value))
    message = failure.details() or failure.code().name
    if failure.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return errors.Unavailable(message)
    return _named(failure.code().name, "", message, {}, ())


def _from_status(status: status_pb2.Status) -> errors.HiBug2Error:
    reason, metadata = "", {}
    violations: tuple[errors.Violation, ...] = ()
    retry_s = errors.Busy.retry_s
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            violations = tuple(errors.Violation(v.field, v.description) for v in bad.field_violations)
        elif detail.Unpack(retry):
            retry_s = retry.retry_delay.ToMilliseconds() / 1000
    code = next((c.name for c in grpc.StatusCode if c.value[0] == status.code), "INTERNAL")
    return _named(code, reason, status.message, metadata, violations, retry_s)


def _named(
    code: str,
    reason: str,
    message: str,
    metadata: dict[str, str],
    violations: tuple[errors.Violation, ...],
    retry_s: float = errors.Busy.retry_s,
) -> errors.HiBug2Error:
    cls = _REASONS.get(reason) or _CLASSES.get(code, errors.HiBug2Error)
    if cls is errors.InvalidInput:
        return errors.InvalidInput(message, metadata, violations)
    if cls is errors.Busy:
        return errors.Busy(message, metadata, retry_s)
    return cls(message, metadata)


def problem_of(error: errors.HiBug2Error) -> types_pb2.Problem:
    """The same facts as a field of a failed job."""
    problem = types_pb2.Problem(
        code=grpc.StatusCode[error.code].value[0],
        reason=error.reason,
        message=error.message,
        metadata=error.metadata,
    )
    if isinstance(error, errors.InvalidInput):
        for violation in error.violations[:_MAX_VIOLATIONS]:
            problem.violations.add(field=violation.field, description=violation.description)
    return problem


def error_of_problem(problem: types_pb2.Problem) -> errors.HiBug2Error:
    """The error that made a job fail."""
    code = next((c.name for c in grpc.StatusCode if c.value[0] == problem.code), "INTERNAL")
    violations = tuple(errors.Violation(v.field, v.description) for v in problem.violations)
    return _named(code, problem.reason, problem.message, dict(problem.metadata), violations)
