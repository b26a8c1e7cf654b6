"""What fails and may pass, how long to wait for it, and what it may have cost."""

from __future__ import annotations

import json
import random
import time
from email.utils import parsedate_to_datetime

from tenacity import RetryCallState, wait_random_exponential

from shared import logs
from shared.llm.wire import Broken, Rejected

log = logs.get("llm")

UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError)  # a body that is no JSON: cut off, or of a proxy
FILTERED = frozenset({"content_filter", "content_policy_violation", "moderation_blocked"})

_backoff = wait_random_exponential(multiplier=0.5, max=20)


def passes(error: BaseException) -> bool:
    """Whether what failed may work when tried again."""
    if isinstance(error, Rejected):
        if error.status == 501 or quota_spent(error):
            return False
        return error.status in (408, 429) or error.status >= 500
    return isinstance(error, (TimeoutError, Broken, *UNREADABLE))


def cost_nothing(error: BaseException) -> bool:
    """Whether a request that failed is surely not billed: it was refused, or never sent.

    A gateway that gave up waiting (504) says nothing of the model behind it.
    """
    if isinstance(error, Rejected):
        return error.status != 504
    return isinstance(error, Broken) and not error.sent


def outcome(error: BaseException) -> str:
    """The word for `error` in metrics."""
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, Rejected):
        if error.code in FILTERED:
            return "refused"
        if error.status == 429:
            return "rate_limited"
    return "error"


def quota_spent(error: Rejected) -> bool:
    """Whether the provider wants money before it goes on."""
    return "insufficient_quota" in (error.code, error.kind)


def wait(state: RetryCallState) -> float:
    """Seconds to the next attempt: what the endpoint asks for and a little more, else jittered backoff."""
    error = state.outcome.exception() if state.outcome else None
    asked = retry_after(error) if isinstance(error, Rejected) else None
    return _backoff(state) if asked is None else asked + random.uniform(0, 0.25)  # noqa: S311 not a secret


def retry_after(error: Rejected) -> float | None:
    """Seconds that the response asks to wait: a number or a date; None when it asks for nothing readable."""
    value = error.headers.get("retry-after", "")
    try:
        return max(0.0, float(value)) if value.strip().lower() != "nan" else None
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def log_retry(state: RetryCallState) -> None:
    """A line for each attempt that failed and is tried again."""
    error = state.outcome.exception() if state.outcome else None
    log.warning(
        "llm call failed, will be tried again",
        error=type(error).__name__,
        status=getattr(error, "status", None),
        attempt=state.attempt_number,
        wait_s=round(state.upcoming_sleep, 2),
    )
