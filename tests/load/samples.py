"""The paper's Algorithms 1 and 2, which take too long to run whole: a sample is timed and scaled, and checked.

Both are the plain references that the unit tests use, with the sum of scores taken for each slice found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from tests.load.found import Found, keys_of
from tests.load.shapes import Table
from tests.unit.enumeration.references import Found as Slices
from tests.unit.enumeration.references import Pair, children, search

_PARENTS, _COMBINATIONS = 200, 12  # sampled at each depth


class Disagreement(Exception):
    """Two methods that must find the same slices do not."""


class Known:
    """The slices that must come out, to look up by key, by attributes and by parent; items (S, D) and their `found`."""

    def __init__(self, table: Table, items: NDArray[np.int32], found: Found) -> None:
        self.table, self._items, self._n_items = table, items, int(table.offsets[-1])
        self._order = np.argsort(found.keys)
        self._found = found
        self._depth = (items >= 0).sum(axis=1)

    @property
    def max_depth(self) -> int:
        return self._items.shape[1]

    def of_attributes(self, depth: int, sample: list[tuple[int, ...]]) -> int:
        attribute = np.repeat(np.arange(len(self.table.tag_counts)), self.table.tag_counts).astype(np.int32)
        level = attribute[self._items[self._depth == depth, :depth]]
        base = len(self.table.tag_counts)
        return int(np.isin(keys_of(level, base), keys_of(np.array(sample), base)).sum())

    def of_parents(self, depth: int, parents: list[tuple[Pair, ...]]) -> int:
        if depth == 1:
            return int((self._depth == 1).sum())
        heads = np.array([[int(self.table.offsets[a]) + t for a, t in parent] for parent in parents])
        level = self._items[self._depth == depth, : depth - 1]
        return int(np.isin(keys_of(level, self._n_items), keys_of(heads, self._n_items)).sum())

    def check(self, slices: Slices, expected: int, who: str) -> int:
        """The number of `slices`, once all are known with the same count and sum and none is missing."""
        if len(slices) != expected:
            raise Disagreement(f"{who} finds {len(slices)} slices in its sample where there should be {expected}")
        width = self._items.shape[1]
        for pairs, summed in slices.items():
            row = np.full((1, width), -1)
            row[0, : len(pairs)] = [int(self.table.offsets[a]) + t for a, t in pairs]
            key = keys_of(row, self._n_items)[0]
            at = self._order[min(np.searchsorted(self._found.keys, key, sorter=self._order), len(self._order) - 1)]
            assert self._found.total is not None
            if (self._found.keys[at], self._found.count[at], self._found.total[at]) != (key, *summed.tolist()):
                raise Disagreement(f"{who} finds {pairs} with count and sum {summed.tolist()}, which is not so")
        return len(slices)


def naive(known: Known, min_count: int, seed: int) -> tuple[float, int]:
    """Scaled seconds of Algorithm 1, and the slices checked.

    Its time goes with the combinations of tags that it looks for, so that the sample is scaled by their number.
    """
    rng, table = np.random.default_rng(seed), known.table
    n_attributes = len(table.tag_counts)
    seconds, checked = 0.0, 0
    for depth in range(1, known.max_depth + 1):
        every = list(combinations(range(n_attributes), depth))
        looked_for = np.array([np.prod(table.tag_counts[list(attributes)]) for attributes in every])
        chosen = rng.choice(len(every), min(len(every), _COMBINATIONS), replace=False)
        sample = [every[i] for i in chosen]
        slices: Slices = {}
        start = time.perf_counter()
        for attributes in sample:
            slices.update(_with_sums(search(table.codes, table.tag_counts, attributes, min_count), table))
        seconds += (time.perf_counter() - start) * int(looked_for.sum()) / int(looked_for[chosen].sum())
        checked += known.check(slices, known.of_attributes(depth, sample), "Algorithm 1")
    return seconds, checked


def tree(known: Known, min_count: int, seed: int) -> tuple[float, int]:
    """Scaled seconds of Algorithm 2, and the slices checked: every child of sampled parents."""
    rng, table = np.random.default_rng(seed), known.table
    seconds, checked = 0.0, 0
    for depth in range(1, known.max_depth + 1):
        possible, parents = _parents(table, depth - 1, rng)
        rows = [_rows(table, parent) for parent in parents]
        slices: Slices = {}
        start = time.perf_counter()
        for parent, of_parent in zip(parents, rows, strict=True):
            below = children(table.codes, table.tag_counts, parent, of_parent)
            slices.update(_with_sums({s: r for s, r in below.items() if len(r) >= min_count}, table))
        seconds += (time.perf_counter() - start) * possible / len(parents)
        checked += known.check(slices, known.of_parents(depth, parents), "Algorithm 2")
    return seconds, checked


def _with_sums(slices: Slices, table: Table) -> Slices:
    """Count and sum of scores (2,) of each slice in place of its rows."""
    return {s: np.array([len(rows), round(table.scores[rows, 0].sum())]) for s, rows in slices.items()}


def _rows(table: Table, pairs: tuple[Pair, ...]) -> NDArray[np.int64]:
    member = np.ones(len(table.codes), dtype=bool)
    for a, tag in pairs:
        member &= table.codes[:, a] == tag
    return np.flatnonzero(member)


def _parents(table: Table, depth: int, rng: np.random.Generator) -> tuple[int, list[tuple[Pair, ...]]]:
    """How many combinations of `depth` pairs there are, and a sample of them without repeats; () alone at depth 0."""
    sets = list(combinations(range(len(table.tag_counts)), depth))
    each = np.array([np.prod(table.tag_counts[list(attributes)], dtype=np.int64) for attributes in sets])
    possible = int(each.sum())
    chosen = np.sort(rng.choice(possible, min(possible, _PARENTS), replace=False))
    of_set = np.searchsorted(np.cumsum(each), chosen, side="right")
    starts = np.cumsum(each) - each
    return possible, [
        tuple(_tags(table, sets[i], number)) for i, number in zip(of_set, chosen - starts[of_set], strict=True)
    ]


def _tags(table: Table, attributes: tuple[int, ...], number: int) -> Iterator[Pair]:
    """The `number`th combination of tags of `attributes`."""
    for a in attributes:
        number, tag = divmod(int(number), int(table.tag_counts[a]))
        yield a, tag
