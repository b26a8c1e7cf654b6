"""Who asks: the team and request that a call belongs to, carried from call to call."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable
from contextvars import ContextVar

from shared import traces
from shared.errors import invalid

TEAM_KEY = "x-hibug2-team"
REQUEST_KEY = "x-request-id"
DEFAULT_TEAM = "default"

team: ContextVar[str] = ContextVar("team", default=DEFAULT_TEAM)
request_id: ContextVar[str] = ContextVar("request_id", default="")
# time.monotonic() at which the call being served must have ended; None where it may take its time.
deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

_TEAM = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


def enter(metadata: Iterable[tuple[str, str | bytes]], time_remaining: float | None) -> None:
    """Bind what a call's metadata say to this task; InvalidInput for what is no team."""
    found = {key: value for key, value in metadata if isinstance(value, str)}
    name = found.get(TEAM_KEY, DEFAULT_TEAM)
    if not _TEAM.fullmatch(name):
        raise invalid(TEAM_KEY, "a team is 1 to 40 of a-z 0-9 -")
    team.set(name)
    request_id.set(found.get(REQUEST_KEY, "")[:64] or uuid.uuid4().hex)
    deadline.set(None if time_remaining is None else time.monotonic() + time_remaining)


def outgoing() -> list[tuple[str, str]]:
    """Metadata for a call made on behalf of the one being served."""
    found = [(TEAM_KEY, team.get()), (REQUEST_KEY, request_id.get() or uuid.uuid4().hex)]
    if trace := traces.traceparent():
        found.append((traces.KEY, trace))
    return found


def time_left(limit_s: float | None) -> float | None:
    """Seconds for a call made from here: `limit_s`, or less where the caller's own deadline is nearer."""
    end = deadline.get()
    if end is None:
        return limit_s
    left = max(end - time.monotonic(), 0.001)
    return left if limit_s is None else min(left, limit_s)
