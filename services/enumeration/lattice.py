"""Every slice of a tag table with at least M instances and at most D pairs (paper 4.1, A.7 Algorithm 3).

Breadth first: slices of d pairs are made by joining two slices of d - 1 pairs that share their first d - 2, and
those with fewer than M rows are dropped with all that would lie below them. Extents are bit sets. Nothing but the
slices found is kept: extents are made again for one chunk at a time, so memory is the result and a few megabytes.
Slices whose first pair is the same are joined as a block, on bit sets that hold only the rows with that pair.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.bitset import ScorePlanes, Words, pack, popcount, word_count
from shared.errors import HiBug2Error, TooLarge, Violation, invalid, refuse

MAX_SLICES = 5_000_000

Codes = NDArray[np.uint8] | NDArray[np.uint16]
Items = NDArray[np.signedinteger]
Counts = NDArray[np.int32]
Progress = Callable[[int, int], None]
Cancel = Callable[[], bool]

_CHUNK_WORDS = 1 << 16  # words of the sets joined at once: half a megabyte, so that they stay in cache
_MEMBER_CELLS = 1 << 24  # cells of a table compared before they are packed
_BLOCK_COST_WORDS = 150_000  # setting a block up costs as much as joining this many words
_REPORT_SECONDS = 0.2
_ESTIMATE_CELLS = 20_000_000  # cells of the table an estimate reads for each depth
_INDEXABLE = 64  # cells a row up to which a joint table is indexed rather than sorted
_ESTIMATE_COMBINATIONS = (24, 400)  # fewest and most attribute combinations it samples for each depth


class Cancelled(HiBug2Error):
    """The caller asked to stop."""

    code = "CANCELLED"
    reason = "CANCELLED"


@dataclass(frozen=True)
class Slices:
    """S slices in columns, in canonical order: by depth, then by items, lexicographically.

    items: (S, D), ascending, padded with -1; an item is offset[attribute] + tag code (`item_offsets`). int16, or int32
    where the table has more tags than that holds: there are tens of millions of slices, and memory bounds their making.
    count: (S,) int32, instances of the slice.
    scored: (S, K) int32, instances with a score in column k.
    total: (S, K) float64, sum of those scores.
    """

    items: Items
    count: Counts
    scored: Counts
    total: NDArray[np.float64]

    def __len__(self) -> int:
        return int(self.count.size)


def check_request(n_rows: int, n_attributes: int, min_count: int, max_depth: int, margin: float) -> None:
    """Raise one InvalidInput that names every field of a request that makes no sense for the table."""
    found = []
    if n_rows < 1:
        found.append(Violation("instances", "there are none; tag at least one instance"))
    if n_attributes < 1:
        found.append(Violation("attributes", "there are none; give at least one attribute"))
    if min_count < 1:
        found.append(Violation("min_count", f"is {min_count}; a slice needs at least 1 instance"))
    if max_depth < 1:
        found.append(Violation("max_depth", f"is {max_depth}; a slice needs at least 1 pair"))
    elif 1 <= n_attributes < max_depth:
        found.append(
            Violation("max_depth", f"is {max_depth} but the table has {n_attributes} attributes; give at most that")
        )
    if not 0.0 <= margin <= 1.0:
        found.append(Violation("margin", f"is {margin}; give a number from 0 to 1"))
    refuse(found)


def checked_tag_counts(codes: Codes, tag_counts: ArrayLike) -> NDArray[np.int64]:
    """`tag_counts` as (A,) int64; InvalidInput unless `codes` is (N, A) uint8 or uint16 and each attribute has one."""
    counts = np.asarray(tag_counts, dtype=np.int64)
    if codes.ndim != 2 or codes.dtype not in (np.uint8, np.uint16):
        raise invalid(
            "codes", f"is {codes.ndim}-dimensional {codes.dtype}; give (instances, attributes) of uint8 or uint16"
        )
    if counts.shape != codes.shape[1:]:
        raise invalid("tag_counts", f"has shape {counts.shape}; give one count for each of {codes.shape[1]} attributes")
    return counts


def checked_scores(scores: NDArray[np.float64], n_rows: int) -> NDArray[np.float64]:
    """`scores` as float64; InvalidInput unless they are (`n_rows`, K) in [0, 1] or NaN."""
    if scores.ndim != 2 or len(scores) != n_rows:
        raise invalid("scores", f"has shape {scores.shape}; give ({n_rows}, models)")
    outside = (scores < 0.0) | (scores > 1.0)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise invalid(
            "scores", f"row {row}, column {column} is {scores[row, column]}; scores lie in 0 to 1, NaN is not scored"
        )
    return scores.astype(np.float64, copy=False)


def item_offsets(tag_counts: ArrayLike) -> NDArray[np.int64]:
    """First item of each attribute and, last, the number of items: tag counts (A,) to (A + 1,) int64."""
    return np.concatenate(([0], np.cumsum(np.asarray(tag_counts, dtype=np.int64)))).astype(np.int64)


def item_type(n_items: int) -> type[np.int16] | type[np.int32]:
    """The type of items that there are so many of."""
    return np.int16 if n_items <= 1 << 15 else np.int32


def enumerate_slices(
    codes: Codes,
    tag_counts: ArrayLike,
    scores: NDArray[np.float64] | None,
    *,
    min_count: int,
    max_depth: int,
    max_slices: int = MAX_SLICES,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
) -> Slices:
    """All slices of at most `max_depth` pairs with at least `min_count` rows (paper 4.1, Algorithm 3).

    codes: (N, A) uint8 or uint16; a code at or above its attribute's tag count matches nothing.
    tag_counts: (A,) tags of each attribute.
    scores: (N, K) float64 in [0, 1], NaN where a row is not scored; None for no columns.
    on_progress gets (done, total) steps, and `cancelled` is asked, several times a second; the total grows until the
    last depth has begun.
    Raises InvalidInput (shapes, ranges), TooLarge (more than `max_slices`: estimated first, and counted as it goes)
    and Cancelled.
    """
    if min_count < 1:
        raise invalid("min_count", f"is {min_count}; a slice needs at least 1 instance")
    if max_depth < 1:
        raise invalid("max_depth", f"is {max_depth}; a slice needs at least 1 pair")
    table = _Table(codes, tag_counts)
    planes = None if scores is None else ScorePlanes(checked_scores(scores, table.n_rows))
    watch = _Watch(on_progress, cancelled)
    watch.look()
    estimate = 0.0
    if table.most_slices(min_count, max_depth) > max_slices:
        estimate = _estimate(table, min_count, max_depth, np.random.default_rng(0), watch)
        if estimate > max_slices:
            raise _too_large(estimate, max_slices, min_count, max_depth)

    frequent = np.flatnonzero(table.item_count >= min_count)
    made: list[list[tuple[Items, NDArray[np.int64]]]] = [
        [(frequent[:, None].astype(np.int32), table.item_count[frequent])]
    ]
    found = len(frequent)
    for depth in range(2, min(max_depth, table.n_attributes) + 1):
        parents = _stack([items for items, _ in made[-1]], depth - 1)
        made.append([])
        for chunk in _join(table, parents, min_count, watch):
            found += len(chunk[1])
            if found > max_slices:
                break
            made[-1].append(chunk)
        if found > max_slices:
            break
    if found > max_slices:
        raise _too_large(max(estimate, found), max_slices, min_count, max_depth)

    sizes = [sum(len(count) for _, count in chunks) for chunks in made]
    items, counts = _columns(made, found, max_depth, item_type(int(table.offsets[-1])), watch)
    scored, total = _no_scores(found) if planes is None else _score(table, items, sizes, planes, watch)
    watch.finish()
    return Slices(items, counts, scored.astype(np.int32), total)


def score_slices(
    codes: Codes,
    tag_counts: ArrayLike,
    items: Items,
    scores: NDArray[np.float64],
    *,
    on_progress: Progress | None = None,
    cancelled: Cancel | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Scored rows (S, K) int64 and sums of scores (S, K) float64 of slices that are known already (paper 4.1.4).

    `items` (S, D) int32 in any order, each line ascending and padded with -1; the rest as in `enumerate_slices`,
    whose sums these equal bit for bit.
    """
    table = _Table(codes, tag_counts)
    planes = ScorePlanes(checked_scores(scores, table.n_rows))
    items = table.checked_items(np.asarray(items))
    watch = _Watch(on_progress, cancelled)
    watch.look()
    depth = (items >= 0).sum(axis=1)
    order = np.lexsort((*items.T[::-1], depth))
    whole, *sizes = np.bincount(depth, minlength=items.shape[1] + 1).tolist()
    if whole:
        raise invalid("items", "a slice has at least one item")
    scored, total = _score(table, items[order], sizes, planes, watch)
    watch.finish()
    back = np.argsort(order)
    return scored[back], total[back]


def estimate_slices(codes: Codes, tag_counts: ArrayLike, *, min_count: int, max_depth: int, seed: int) -> float:
    """About how many slices `enumerate_slices` would find.

    For each depth d a sample of attribute combinations is counted, and the mean scaled by the number of
    combinations, C(A, d). Exact where the combinations are few enough to count all.
    """
    return _estimate(_Table(codes, tag_counts), min_count, max_depth, np.random.default_rng(seed), _Watch(None, None))


class _Watch:
    """Passes progress on and cancellation in, a few times a second."""

    def __init__(self, on_progress: Progress | None, cancelled: Cancel | None) -> None:
        self._on_progress = on_progress
        self._cancelled = cancelled
        self._next = 0.0
        self.done = 0
        self.total = 0

    def step(self, steps: int) -> None:
        self.done += steps
        if time.monotonic() >= self._next:
            self.look()

    def look(self) -> None:
        self._next = time.monotonic() + _REPORT_SECONDS
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("the enumeration was cancelled")
        if self._on_progress is not None and self.total:
            self._on_progress(self.done, self.total)

    def finish(self) -> None:
        if self._on_progress is not None:
            self._on_progress(max(self.total, 1), max(self.total, 1))


class _Table:
    """The tag table by attribute, with its items."""

    def __init__(self, codes: Codes, tag_counts: ArrayLike) -> None:
        self.tag_counts = checked_tag_counts(codes, tag_counts)
        self.n_rows, self.n_attributes = codes.shape
        self.offsets = item_offsets(self.tag_counts)
        n_items = int(self.offsets[-1])
        self.attribute = np.repeat(np.arange(self.n_attributes), self.tag_counts)
        # Bytes where they do: half the traffic. 255 is then free to mean "no tag".
        narrow = bool((self.tag_counts <= 255).all())
        if narrow and codes.dtype != np.uint8:
            codes = np.where(codes < self.tag_counts, codes, 255)
        self.columns = np.ascontiguousarray(codes.T, dtype=np.uint8 if narrow else np.uint16)
        self._tag = (np.arange(n_items) - self.offsets[self.attribute]).astype(self.columns.dtype)
        self.item_count = np.zeros(n_items, dtype=np.int64)
        for a, column in enumerate(self.columns):
            start, stop = self.offsets[a], self.offsets[a + 1]
            self.item_count[start:stop] = np.bincount(column, minlength=stop - start)[: stop - start]

    def most_slices(self, min_count: int, max_depth: int) -> float:
        """An upper bound on the number of slices that needs no look at the table."""
        widest = int(self.tag_counts.max(initial=0))
        full = self.n_rows // min_count
        return float(sum(math.comb(self.n_attributes, d) * min(widest**d, full) for d in range(1, max_depth + 1)))

    def rows_with(self, item: int) -> NDArray[np.int64]:
        """Rows (n,) that hold `item`."""
        return np.flatnonzero(self.columns[self.attribute[item]] == self._tag[item])

    def extents(self, items: NDArray[np.int64], rows: NDArray[np.int64] | None) -> Words:
        """The rows of each item (m,) as bit sets over `rows`, or over all rows when None."""
        columns = self.columns if rows is None else np.take(self.columns, rows, axis=1)
        step = max(1, _MEMBER_CELLS // max(1, columns.shape[1]))
        parts = [np.zeros((0, word_count(columns.shape[1])), dtype=np.uint64)]
        for start in range(0, len(items), step):
            part = items[start : start + step]
            parts.append(pack(columns[self.attribute[part]] == self._tag[part][:, None]))
        return np.concatenate(parts) if len(parts) > 2 else parts[-1]

    def checked_items(self, items: NDArray[Any]) -> Items:
        """`items` when it is (S, D) items of this table, each line ascending with -1 at its end."""
        if items.ndim != 2 or not np.issubdtype(items.dtype, np.integer):
            raise invalid("items", f"is {items.ndim}-dimensional {items.dtype}; give (slices, depth) integers")
        if items.size and (items.min() < -1 or items.max() >= self.offsets[-1]):
            raise invalid("items", f"must lie in -1 to {self.offsets[-1] - 1}, the items of the table")
        before, after = items[:, :-1], items[:, 1:]
        if not (((before >= 0) & (before < after)) | (after == -1)).all():
            raise invalid("items", "each slice must list its items ascending, with -1 only at the end")
        return items.astype(np.int32, copy=False)


def _stack(chunks: list[Items], depth: int) -> Items:
    return np.concatenate([np.zeros((0, depth), dtype=np.int32), *chunks])


def _columns(
    made: list[list[tuple[Items, NDArray[np.int64]]]],
    found: int,
    max_depth: int,
    kind: type[np.int16] | type[np.int32],
    watch: _Watch,
) -> tuple[Items, Counts]:
    """The chunks of each depth as items (found, max_depth) and count (found,); empties `made` as it goes."""
    items = np.empty((found, max_depth), dtype=kind)
    count = np.empty(found, dtype=np.int32)
    at = 0
    for depth, chunks in enumerate(made, start=1):
        chunks.reverse()
        while chunks:
            some, their_count = chunks.pop()
            lines = slice(at, at + len(some))
            items[lines, :depth], items[lines, depth:], count[lines] = some, -1, their_count
            at = lines.stop
            watch.step(0)
    return items, count


def _no_scores(n_slices: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.zeros((n_slices, 0), dtype=np.int64), np.zeros((n_slices, 0))


def _too_large(estimate: float, limit: int, min_count: int, max_depth: int) -> TooLarge:
    return TooLarge(
        f"about {math.ceil(estimate):,} slices or more with min_count {min_count} and max_depth {max_depth}, "
        f"but at most {limit:,} are allowed; raise min_count or lower max_depth",
        metadata={"estimate": str(math.ceil(estimate)), "limit": str(limit)},
    )


def _estimate(table: _Table, min_count: int, max_depth: int, rng: np.random.Generator, watch: _Watch) -> float:
    few, many = _ESTIMATE_COMBINATIONS
    n_attributes, found = table.n_attributes, 0.0
    for depth in range(1, min(max_depth, n_attributes) + 1):
        combinations = math.comb(n_attributes, depth)
        wanted = max(few, min(many, _ESTIMATE_CELLS // max(1, table.n_rows * depth)))
        if combinations <= wanted:
            chosen = [np.array(c) for c in itertools.combinations(range(n_attributes), depth)]
        else:
            chosen = [np.sort(rng.choice(n_attributes, depth, replace=False)) for _ in range(wanted)]
        full = 0
        for attributes in chosen:
            full += _frequent_cells(table, attributes, min_count)
            watch.step(0)
        found += full / len(chosen) * combinations
    return found


def _frequent_cells(table: _Table, attributes: NDArray[np.int64], min_count: int) -> int:
    """Cells of the joint table of `attributes` with at least `min_count` rows."""
    known = np.ones(table.n_rows, dtype=np.bool_)
    for a in attributes:
        known &= table.columns[a] < table.tag_counts[a]
    key, cells = np.zeros(int(known.sum()), dtype=np.int64), 1
    for a in attributes:
        width = int(table.tag_counts[a])
        if cells * width > _INDEXABLE * max(1, len(key)):  # too sparse to index: number the cells that occur
            used, key = np.unique(key, return_inverse=True)
            cells = len(used)
        key = key * width + table.columns[a][known]
        cells *= width
    sparse = cells > _INDEXABLE * max(1, len(key))
    counts = np.unique(key, return_counts=True)[1] if sparse else np.bincount(key, minlength=cells)
    return int((counts >= min_count).sum())


@dataclass(frozen=True)
class _Block:
    """Lines [start, stop) of a list of slices, and the rows their bit sets cover: those with `prefix`, or all."""

    start: int
    stop: int
    prefix: int | None


def _blocks(table: _Table, items: Items, ends: NDArray[np.int64] | None = None) -> list[_Block]:
    """Cut slices (S, d), sorted, into blocks: by first item where that saves more than it costs, else one block.

    `ends` (S + 1,) numbers the sets that are made from each slice; one each when None.
    """
    whole = [_Block(0, len(items), None)]
    if len(items) == 0:
        return whole
    first = items[:, 0]
    starts = np.concatenate(([0], np.flatnonzero(first[1:] != first[:-1]) + 1, [len(items)]))
    sets = np.diff(starts if ends is None else ends[starts])
    together = float(sets.sum()) * word_count(table.n_rows)
    words = -(-table.item_count[first[starts[:-1]]] // 64)
    apart = float(sets @ words) + len(sets) * float(_BLOCK_COST_WORDS)
    if together <= apart:
        return whole
    return [_Block(int(a), int(b), int(first[a])) for a, b in itertools.pairwise(starts)]


class _Sets:
    """Bit sets of items over the rows of one block."""

    def __init__(self, table: _Table, prefix: int | None, needed: NDArray[np.int64]) -> None:
        self.rows = None if prefix is None else table.rows_with(prefix)
        self.n_rows = table.n_rows if self.rows is None else len(self.rows)
        self._line = np.empty(len(table.item_count), dtype=np.intp)
        self._line[needed] = np.arange(len(needed))
        self._words = table.extents(needed, self.rows)
        self.chunk = max(1, _CHUNK_WORDS // max(1, word_count(self.n_rows)))

    def of(self, items: Items) -> Words:
        """(m,) items to (m, w) words."""
        return np.take(self._words, self._line[items], axis=0)

    def meet(self, items: Items) -> Words:
        """Rows that hold all items of a line: (m, c) to (m, w) words; every row where c is 0."""
        if items.shape[1] == 0:
            return np.repeat(pack(np.ones((1, self.n_rows), dtype=np.bool_)), len(items), axis=0)
        words = self.of(items[:, 0])
        for column in range(1, items.shape[1]):
            words &= self.of(items[:, column])
        return words


def _join(table: _Table, parents: Items, min_count: int, watch: _Watch) -> Iterator[tuple[Items, NDArray[np.int64]]]:
    """Slices with one pair more than `parents` (P, d - 1), sorted, in chunks of items (m, d) and count (m,)."""
    if len(parents) == 0:
        return
    last = parents[:, -1]
    # Partners of a slice: the later ones that share all but their last item, which is of a later attribute.
    changes = (parents[1:, :-1] != parents[:-1, :-1]).any(axis=1)
    end = _run_ends(changes)
    first = _run_ends(changes | (table.attribute[last[1:]] != table.attribute[last[:-1]]))
    partners = end - first
    starts = np.concatenate(([0], np.cumsum(partners)))
    watch.total += int(starts[-1])
    for block in _blocks(table, parents, starts):
        low, high = int(starts[block.start]), int(starts[block.stop])
        if low == high:
            continue
        inside = slice(block.start, block.stop)
        own = parents[inside, 0 if block.prefix is None else 1 :]
        sets = _Sets(
            table,
            block.prefix,
            np.unique(np.concatenate((own.ravel(), last[first[inside].min() : end[inside].max()]))),
        )
        for at in range(low, high, sets.chunk):
            numbers = np.arange(at, min(at + sets.chunk, high))
            left = np.searchsorted(starts, numbers, side="right") - 1
            right = first[left] + numbers - starts[left]
            words = sets.of(last[right])
            mine = own[left[0] - block.start : left[-1] + 1 - block.start]
            if mine.shape[1]:
                words &= np.take(sets.meet(mine), left - left[0], axis=0)
            count = popcount(words)
            keep = np.flatnonzero(count >= min_count)
            yield np.column_stack((parents[left[keep]], last[right[keep]])), count[keep]
            watch.step(len(numbers))


def _run_ends(changes: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each line the end of its run, where `changes` (P - 1,) says that line i + 1 starts another."""
    edges = np.append(np.flatnonzero(changes) + 1, len(changes) + 1)
    return np.repeat(edges, np.diff(edges, prepend=0))


def _score(
    table: _Table, items: Items, sizes: list[int], planes: ScorePlanes, watch: _Watch
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Scored rows and sums of scores, (S, K) each, of slices (S, D) in canonical order, `sizes[d - 1]` with d pairs."""
    columns = planes.on(None)
    scored = np.zeros((len(items), len(columns)), dtype=np.int64)
    total = np.zeros((len(items), len(columns)))
    watch.total += len(items)
    begin = 0
    for depth, size in enumerate(sizes, start=1):
        level = items[begin : begin + size, :depth]
        for block in _blocks(table, level):
            rest = level[block.start : block.stop, 0 if block.prefix is None else 1 :]
            sets = _Sets(table, block.prefix, np.unique(rest))
            block_columns = columns if sets.rows is None else planes.on(sets.rows)
            for at in range(0, len(rest), sets.chunk):
                words = sets.meet(rest[at : at + sets.chunk])
                counts = popcount(words)
                lines = slice(begin + block.start + at, begin + block.start + at + len(words))
                for k, column in enumerate(block_columns):
                    scored[lines, k] = column.count(words, counts)
                    total[lines, k] = column.total(words)
                watch.step(len(words))
        begin += size
    return scored, total
