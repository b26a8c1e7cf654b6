"""What fails and may pass, how long to wait for it, and what it may have cost."""

from __future__ import annotations

import json
import random
import time
from email.utils import parsedate_to_datetime

import openai
from tenacity import RetryCallState, wait_random_exponential

from shared import logs

log = logs.get("llm")

UNREADABLE = (json.JSONDecodeError, UnicodeDecodeError)  # a body that is no JSON: cut off, or of a proxy
FILTERED = frozenset({"content_filter", "content_policy_violation", "moderation_blocked"})

_backoff = wait_random_exponential(multiplier=0.5, max=20)
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})  # of whichever HTTP library the SDK uses


def passes(error: BaseException) -> bool:
    """Whether what failed may work when tried again."""
    if isinstance(error, openai.APIStatusError):
        if error.status_code == 501 or quota_spent(error):
            return False
        return error.status_code in (408, 429) or error.status_code >= 500
    return isinstance(error, (TimeoutError, openai.APIConnectionError, *UNREADABLE))


def cost_nothing(error: BaseException) -> bool:
    """Whether a request that failed is surely not billed: it was refused, or never sent.

    A gateway that gave up waiting (504) says nothing of the model behind it.
    """
    if isinstance(error, openai.APIStatusError):
        return error.status_code != 504
    return isinstance(error, openai.APIConnectionError) and type(error.__cause__).__name__ in _NOT_SENT


def outcome(error: BaseException) -> str:
    """The word for `error` in metrics."""
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIStatusError):
        if error.code in FILTERED:
            return "refused"
        if error.status_code == 429:
            return "rate_limited"
    return "error"


def quota_spent(error: openai.APIStatusError) -> bool:
    """Whether the provider wants money before it goes on."""
    return "insufficient_quota" in (error.code, error.type)


def wait(state: RetryCallState) -> float:
    """Seconds to the next attempt: what the endpoint asks for and a little more, else jittered backoff."""
    error = state.outcome.exception() if state.outcome else None
    asked = retry_after(error) if isinstance(error, openai.APIStatusError) else None
    return _backoff(state) if asked is None else asked + random.uniform(0, 0.25)  # noqa: S311 not a secret


def retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds that the response asks to wait: a number or a date; None when it asks for nothing readable."""
    value = error.response.headers.get("retry-after", "")
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
        status=getattr(error, "status_code", None),
        attempt=state.attempt_number,
        wait_s=round(state.upcoming_sleep, 2),
    )
