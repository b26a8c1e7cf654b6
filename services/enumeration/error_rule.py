"""The paper's rule for error slices, asked of each slice as it is made, so that no others are kept (paper 4.1.4).

A slice's parents have one pair fewer, so their means are known when it is made. They lie in a trie: the slices of
each depth in canonical order, those that continue a slice side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.allocator import as_it_fills
from services.enumeration.compiled import compiled
from services.enumeration.lattice import Slices, item_type
from services.enumeration.selection import rank_order, reordered, take
from services.enumeration.walk import Gathered, Walk


@compiled
def _find(line: Any, depth: int, left_out: int, first: Any, last: Any, children: Any) -> int:
    """Where the slice of line[:depth] without line[left_out] lies in the trie; -1 when it is not there.

    first: (items,) place of the slices of one pair; last: (S,) last item of each slice; children: (S + 1,) place of
    the first that continues each, which is also where those of the one before end.
    """
    at, pairs = -1, 0
    for q in range(depth):
        if q == left_out:
            continue
        pairs += 1
        if pairs == 1:
            at = first[line[q]]
        else:
            low, high = children[at], children[at + 1]
            end = high
            while low < high:
                middle = (low + high) >> 1
                if last[middle] < line[q]:
                    low = middle + 1
                else:
                    high = middle
            at = low if low < end and last[low] == line[q] else -1
        if at < 0:
            return -1
    return at


@compiled
def _judge(
    items: Any, depth: int, scored: Any, total: Any, overall: float, margin: float,
    first: Any, last: Any, children: Any, mean: Any, chosen: Any, lowest: Any,
) -> int:  # fmt: skip
    """Lines of error slices to chosen, the lowest mean of their parents to lowest; how many."""
    found = 0
    for s in range(len(items)):
        if scored[s] == 0:
            continue
        own = total[s] / scored[s]
        if not (own < overall - margin and own < overall):
            continue
        least = overall
        if depth > 1:
            least = np.inf
            for back in range(depth):
                at = _find(items[s], depth, depth - 1 - back, first, last, children)
                least = min(least, mean[at])
                if own >= least:
                    break
        if own < least:
            chosen[found] = s
            lowest[found] = least
            found += 1
    return found


@compiled
def _count_children(items: Any, depth: int, first: Any, last: Any, children: Any, start: int, out: Any) -> None:
    """Count lines of `depth` pairs for the slice that each continues; those of depth - 1 pairs begin at `start`."""
    at = 0
    for s in range(len(items)):
        same = s > 0
        for q in range(depth - 1):
            same = same and items[s, q] == items[s - 1, q]
        if not same:
            at = _find(items[s], depth, depth - 1, first, last, children)
        out[at - start] += 1


class ErrorRule:
    """Judges slices of a walk by their mean in one column; keeps the last item and mean of all but the deepest."""

    def __init__(self, walk: Walk, column: int, overall: float, margin: float) -> None:
        n_items = len(walk.table.position)
        self._column, self._overall, self._margin = column, overall, margin
        self._max_depth = walk.depth
        self._first = np.full(n_items, -1, dtype=np.int64)
        self._starts = np.zeros(walk.depth + 2, dtype=np.int64)  # where the slices of so many pairs begin
        self._n = 0
        # Pages that are never written to take no memory, so there is room for the most there can be.
        try:
            self._last = as_it_fills((walk.most_lines(walk.depth - 1),), item_type(n_items))
            self._mean = as_it_fills(self._last.shape, np.float64)
            self._children = np.zeros(walk.most_lines(walk.depth - 2) + 1, dtype=np.int64)
        except MemoryError:
            raise walk.no_room() from None

    def begin(self, depth: int) -> None:
        """Build the slices of depth - 1 pairs, all of which have been added, into the trie."""
        if depth > 2:  # the children of those of depth - 2 pairs, counted so far, end where their running count does
            some = self._children[self._starts[depth - 2] : self._starts[depth - 1] + 1]
            some[0] = self._starts[depth - 1]
            np.cumsum(some, out=some)
        self._starts[depth] = self._n
        if depth == 2:
            self._first[self._last[: self._n]] = np.arange(self._n)

    def add(self, depth: int, chunk: Slices) -> None:
        """Take note of slices that others may be judged by, in canonical order."""
        if depth == self._max_depth:
            return
        here = slice(self._n, self._n + len(chunk))
        self._n = here.stop
        scored, mean = chunk.scored[:, self._column], self._mean[here]
        self._last[here] = chunk.items[:, depth - 1]
        mean[:] = np.inf
        np.divide(chunk.total[:, self._column], scored, out=mean, where=scored > 0)
        if depth > 1:
            start = int(self._starts[depth - 1])
            _count_children(
                chunk.items, depth, self._first, self._last, self._children, start, self._children[start + 1 :]
            )

    def of(self, depth: int, chunk: Slices) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Lines of the error slices of `chunk`, and the lowest mean of the parents of each."""
        chosen, lowest = np.empty(len(chunk), dtype=np.int64), np.empty(len(chunk))
        scored = np.ascontiguousarray(chunk.scored[:, self._column])
        total = np.ascontiguousarray(chunk.total[:, self._column])
        found = _judge(
            chunk.items, depth, scored, total, self._overall, self._margin, self._first, self._last,
            self._children, self._mean, chosen, lowest,
        )  # fmt: skip
        return chosen[:found].copy(), lowest[:found].copy()


def judged_slices(
    walk: Walk, column: int, overall: float, margin: float, top: int | None, threads: int
) -> tuple[Slices, NDArray[np.float64], int]:
    """Error slices of `walk` in canonical order, the lowest mean of each one's parents, and how many were looked at.

    With `top`, at least the first `top` by rank and not many more.
    """
    rule = ErrorRule(walk, column, overall, margin)
    kept = Gathered(walk, as_it_fills)
    looked_at = 0
    for chunk, (lines, lowest) in walk.borrowed(threads, rule):
        rule.add(int((chunk.items[0] >= 0).sum()), chunk)
        looked_at += len(chunk)
        if len(lines) == 0:
            continue
        some = take(chunk, lines)
        held = walk.holds(some)
        before = kept.found
        kept.add(take(some, held))
        kept.beside[before : kept.found] = lowest[held]
        if top is not None and kept.found > 4 * top + 10_000:
            best = np.sort(rank_order(kept.slices(), column)[:top])
            reordered(kept.slices(), kept.beside, best)
            kept.found = len(best)
    return kept.slices(), kept.beside[: kept.found], looked_at
