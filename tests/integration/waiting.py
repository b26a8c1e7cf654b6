"""Waiting for what must come true."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any


async def eventually(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """The first true value of `condition`, awaited where it is a coroutine; AssertionError when none comes in time."""
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"not within {timeout_s} s: {inspect.getsource(condition).strip()}"
        await asyncio.sleep(0.01)
