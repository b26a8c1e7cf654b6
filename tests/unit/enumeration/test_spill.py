"""Messages that wait in memory or in a file."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.enumeration import spill


@pytest.mark.parametrize("in_memory", [0, 7, 1 << 20])
@given(messages=st.lists(st.binary(min_size=1, max_size=40), max_size=20))
def test_messages_come_back_as_they_were(messages, in_memory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spill, "IN_MEMORY", in_memory)
        waiting = spill.Spill(iter(messages))
    assert list(waiting) == messages
    waiting.close()


def test_what_is_not_read_is_given_back():
    waiting = spill.Spill(iter([b"a", b"b"]))
    assert next(iter(waiting)) == b"a"
    waiting.close()
    with pytest.raises(ValueError, match="closed"):
        list(waiting)
