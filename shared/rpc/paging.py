"""Pages: `page_size` and `page_token` as every List call has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from shared.errors import invalid

DEFAULT = 50
LIMIT = 1000
T = TypeVar("T")


def page_bounds(total: int, page_size: int, page_token: str) -> tuple[int, int, str]:
    """(first, end, next token) of the page of a list of `total`; the token is empty after the last page."""
    if page_size < 0 or page_size > LIMIT:
        raise invalid("page_size", f"is {page_size}; give 0 to {LIMIT} (0 takes {DEFAULT})")
    if page_token and not (page_token.isascii() and page_token.isdigit() and len(page_token) < 19):
        raise invalid("page_token", "is not one that this list gave out")
    first = min(int(page_token or 0), total)
    end = min(first + (page_size or DEFAULT), total)
    return first, end, str(end) if end < total else ""


def page(values: Sequence[T], page_size: int, page_token: str) -> tuple[Sequence[T], str]:
    """The page of `values` and the token of the next one."""
    first, end, token = page_bounds(len(values), page_size, page_token)
    return values[first:end], token
