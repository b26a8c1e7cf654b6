from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.prediction.items import row_keys, within_caps


@given(
    st.integers(1, 72_000),
    st.integers(1, 6).flatmap(
        lambda d: st.lists(st.lists(st.integers(-1, 71_999), min_size=d, max_size=d), max_size=20)
    ),
)
def test_row_keys_order_rows_at_any_width(n_items, rows):
    rows = [[min(i, n_items - 1) for i in row] for row in rows]
    items = np.array(rows, np.int32).reshape(len(rows), -1 if rows else 3)
    keys = row_keys(items, n_items)
    assert (keys >= 0).all()
    by_key = sorted(range(len(rows)), key=lambda i: (keys[i], i))
    assert by_key == sorted(range(len(rows)), key=lambda i: (rows[i], i))
    assert len(set(keys.tolist())) == len(set(map(tuple, rows)))


@given(st.lists(st.integers(-1, 3), max_size=40), st.integers(1, 5), st.integers(1, 20))
def test_the_first_of_each_class_are_kept_and_those_of_no_class_are_one_more(classes, per_class, most):
    seen: dict[int, int] = {}
    expected = []
    for i, of_it in enumerate(classes):
        seen[of_it] = seen.get(of_it, 0) + 1
        if seen[of_it] <= per_class:
            expected.append(i)
    assert within_caps(np.array(classes, np.int64), per_class, most).tolist() == expected[:most]
