"""What goes wrong, as one exception: a server's status, a failed job, or input that was refused before sending."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc

    from hibug2.v1.run_pb2 import Run
    from hibug2.v1.types_pb2 import Job, Problem

_DETAILS = "grpc-status-details-bin"
_PAUSED = 3  # JOB_STATE_PAUSED; the contract is imported only where it is used, for a quick start


@dataclass(frozen=True)
class Violation:
    """One thing wrong with one field of a request."""

    field: str
    description: str


class HiBug2Error(Exception):
    """Base of all errors of this package.

    `code` is a canonical gRPC code name ("NOT_FOUND"), `reason` a stable word for programs, `message` a text for
    people; `violations` name the fields that were wrong; `request_id` finds the call in the server's logs.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        violations: Iterable[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = tuple(violations)
        self.metadata = dict(metadata or {})
        self.request_id = request_id


class UserError(HiBug2Error):
    """Input that was found wrong here; nothing was sent."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(
            f"{field}: {description}",
            code="INVALID_ARGUMENT",
            reason="INVALID_INPUT",
            violations=(Violation(field, description),),
        )


class RunStopped(HiBug2Error):
    """A run failed, paused or was cancelled; `run` is its last snapshot."""

    def __init__(self, run: Run) -> None:
        self.run = run
        problem = run.job.problem
        if run.job.HasField("problem"):
            text = problem.message or problem.reason
            super().__init__(f"{run.name} failed: {text}", **_problem_facts(problem))
        elif run.job.state == _PAUSED:
            super().__init__(f"{run.name} is paused: {run.job.message}", code="RESOURCE_EXHAUSTED", reason="PAUSED")
        else:
            super().__init__(
                f"{run.name} was cancelled; `hibug2 resume {run.name}` goes on with it",
                code="CANCELLED",
                reason="CANCELLED",
            )


def from_job(job: Job) -> HiBug2Error:
    """The error that a job which did not succeed ended with."""
    if job.HasField("problem"):
        return HiBug2Error(job.problem.message or f"{job.name} failed", **_problem_facts(job.problem))
    if job.state == _PAUSED:
        return HiBug2Error(f"{job.name} is paused: {job.message}", code="RESOURCE_EXHAUSTED", reason="PAUSED")
    return HiBug2Error(f"{job.name} was cancelled", code="CANCELLED", reason="CANCELLED")


def _problem_facts(problem: Problem) -> dict[str, Any]:
    from google.rpc import code_pb2

    known = code_pb2.Code.DESCRIPTOR.values_by_number.get(problem.code)
    return {
        "code": known.name if known else "UNKNOWN",
        "reason": problem.reason,
        "violations": [Violation(v.field, v.description) for v in problem.violations],
        "metadata": dict(problem.metadata),
    }


def from_rpc(error: grpc.RpcError, *, request_id: str, address: str) -> HiBug2Error:
    """The error that a failed call to `address` carries in its status and status details."""
    from google.rpc import error_details_pb2, status_pb2

    call: Any = error
    code, message = call.code().name, call.details() or ""
    reason, metadata, violations = "", {}, []
    for key, value in call.trailing_metadata() or ():
        if key != _DETAILS:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                bad = error_details_pb2.BadRequest.FromString(detail.value)
                violations += [Violation(v.field, v.description) for v in bad.field_violations]
    if code == "UNAVAILABLE" and not reason:
        # Without details the status is the channel's own: no server was reached.
        reason = "UNREACHABLE"
        message = (
            f"no gateway answers at {address}: start the local one with `make up`, or name yours with "
            f"HIBUG2_ADDRESS or --address; one with TLS is https://host:port, and HIBUG2_TLS_CA_FILE says who signed "
            f"its certificate ({message})"
        )
    elif code == "DEADLINE_EXCEEDED" and not reason:
        message = (
            f"{address} did not answer in time; try again, or call it from Python with a longer `timeout_s` ({message})"
        )
    return HiBug2Error(
        message or code,
        code=code,
        reason=reason or code,
        violations=violations,
        metadata=metadata,
        request_id=request_id,
    )
