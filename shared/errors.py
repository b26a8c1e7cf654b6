"""The one error base of the platform.

Domain code raises these; `shared.rpc.status` turns them into a `google.rpc.Status` with `ErrorInfo` and
`BadRequest` details, and the client turns that back into an exception. A message says what was wrong,
where, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

DOMAIN = "hibug2"


@dataclass(frozen=True)
class Violation:
    """One thing wrong with one field of a request."""

    field: str
    description: str


@dataclass
class HiBug2Error(Exception):
    """Base of every error that may reach a user. `code` is a canonical gRPC code name."""

    message: str
    metadata: dict[str, str] = field(default_factory=dict)

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"

    def __str__(self) -> str:
        return self.message


@dataclass
class InvalidInput(HiBug2Error):
    """The request is wrong whatever the state of the system; `violations` name the fields."""

    violations: tuple[Violation, ...] = ()

    code: ClassVar[str] = "INVALID_ARGUMENT"
    reason: ClassVar[str] = "INVALID_INPUT"


class NotFound(HiBug2Error):
    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class AlreadyExists(HiBug2Error):
    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class Precondition(HiBug2Error):
    """The request is sound but the system is not in a state to serve it (a step is missing, a budget is spent)."""

    code = "FAILED_PRECONDITION"
    reason = "PRECONDITION"


class PermissionDenied(HiBug2Error):
    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class TooLarge(HiBug2Error):
    """Served by nobody at this size; `metadata` carries the estimate and the limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_LARGE"


@dataclass
class Busy(HiBug2Error):
    """Too much waits already; may work when tried again after `retry_s` seconds."""

    retry_s: float = 30.0

    code: ClassVar[str] = "RESOURCE_EXHAUSTED"
    reason: ClassVar[str] = "BUSY"


class Unavailable(HiBug2Error):
    """May work when tried again."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class DataLoss(HiBug2Error):
    """A stored artifact cannot be read as what it claims to be."""

    code = "DATA_LOSS"
    reason = "DATA_LOSS"


def invalid(field_name: str, description: str) -> InvalidInput:
    """An `InvalidInput` about one field."""
    return InvalidInput(f"{field_name}: {description}", violations=(Violation(field_name, description),))


def refuse(violations: Iterable[Violation]) -> None:
    """Raise one `InvalidInput` that carries every violation, or return when there is none."""
    found = tuple(violations)
    if found:
        shown = "; ".join(f"{v.field}: {v.description}" for v in found[:5])
        more = f" (and {len(found) - 5} more)" if len(found) > 5 else ""
        raise InvalidInput(shown + more, violations=found[:100])
