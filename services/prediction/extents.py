"""Which instances hold a combination of tags."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.prediction.items import attribute_of_items
from shared.schema import Schema

Codes = NDArray[np.uint16]


class Extents:
    """The rows that hold each item, as bits, made when first asked for.

    codes (N, A) uint16 in the order of `schema`; other values than tags are unknown.
    """

    def __init__(self, schema: Schema, codes: Codes) -> None:
        self._codes = codes
        self._attribute_of = attribute_of_items(schema)
        self._first = np.searchsorted(self._attribute_of, np.arange(len(schema.attributes)))
        self._bits: dict[int, NDArray[np.uint8]] = {}

    def count(self, items: Sequence[int]) -> int:
        """Rows that hold all of `items`, at least one."""
        return int(np.bitwise_count(self._meet(items)).sum(dtype=np.int64))

    def rows(self, items: Sequence[int]) -> NDArray[np.int64]:
        """Their positions, ascending."""
        return np.flatnonzero(np.unpackbits(self._meet(items), count=len(self._codes)))

    def _meet(self, items: Sequence[int]) -> NDArray[np.uint8]:
        meet = self._item(items[0])
        for item in items[1:]:
            meet = meet & self._item(item)
        return meet

    def _item(self, item: int) -> NDArray[np.uint8]:
        if item not in self._bits:
            attribute = self._attribute_of[item]
            self._bits[item] = np.packbits(self._codes[:, attribute] == item - self._first[attribute])
        return self._bits[item]
