from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidInput
from shared.rpc.paging import DEFAULT, LIMIT, page, page_bounds


@given(st.integers(0, 3000), st.integers(0, LIMIT))
def test_the_pages_hold_each_item_once_in_order(total, size):
    items, seen, token = list(range(total)), [], ""
    while True:
        found, token = page(items, size, token)
        assert len(found) <= (size or DEFAULT)
        seen += found
        if not token:
            break
        assert found
    assert seen == items


@pytest.mark.parametrize(
    ("size", "token", "field"),
    [(-1, "", "page_size"), (LIMIT + 1, "", "page_size"), (0, "x", "page_token"), (0, "-1", "page_token"),
     (0, "1.5", "page_token"), (0, "٣", "page_token"), (0, "9" * 40, "page_token")],
)  # fmt: skip
def test_what_this_list_did_not_give_out_is_refused(size, token, field):
    with pytest.raises(InvalidInput, match=field):
        page_bounds(10, size, token)


def test_a_token_past_the_end_finds_nothing_more():
    assert page([1, 2, 3], 10, "7") == ([], "")
