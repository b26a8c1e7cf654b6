"""The lattice of slices, depth by depth, by compiled kernels.

The slices of d pairs are the frequent cells of joint counts, one for each slice of d - 2 pairs (the prefix), over the
items of later attributes. Prefixes in order give slices in order, so results stream, and nothing is kept but the
slices of d - 2 pairs. Which kernel counts is chosen for each depth by what it would cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.enumeration.allocator import from_arrow
from services.enumeration.bitset_kernel import BitSets
from services.enumeration.emission import Empty, Lines
from services.enumeration.encoding import Encoded, encode
from services.enumeration.joint_kernel import JointTables
from services.enumeration.lattice import Codes, Counts, Slices, estimate_slices, item_type
from services.enumeration.level import Level, level_of
from services.enumeration.row_list_kernel import RowLists
from services.enumeration.selection import holding, take
from services.enumeration.streaming import STREAMED_BYTES, stream
from services.enumeration.work_units import Crew, Idle, Watch, cut, looking
from shared.errors import TooLarge, invalid

CHUNK_SLICES = 1 << 17  # about as many slices as one piece of work yields at most, where they are read in pieces
LEAST_NANOSECONDS, MOST_NANOSECONDS = 4e5, 20e6  # that it takes, about
NO_ITEM = np.zeros(2, dtype=np.int64)
Prefixes = tuple[NDArray[np.int32], NDArray[Any]]  # positions of items (P, d), and rows of each


class Kernel(Protocol):
    """Counts the slices below prefixes."""

    name: str

    def can(self) -> bool: ...
    def cost(self, level: Level) -> NDArray[np.float64]: ...
    def together(self, level: Level) -> NDArray[np.int64] | None: ...
    def prepare(self) -> None:
        """Encode the table, on all cores; to be done before threads fill."""

    def fill(self, level: Level, unit: NDArray[np.int64], lines: Lines) -> int: ...


class Judge(Protocol):
    """Looks at slices as they are made."""

    def begin(self, depth: int) -> None:
        """All slices of fewer pairs have been handed out."""

    def of(self, depth: int, chunk: Slices) -> Any:
        """What to hand out with `chunk`."""


KERNELS: tuple[Callable[[Encoded, int], Kernel], ...] = (BitSets, JointTables, RowLists)


@dataclass(frozen=True)
class Made:
    """What came of one piece: slices, what the judge says of them, and what gives their arrays back."""

    chunk: Slices
    verdict: Any
    give: Callable[[], None]


@dataclass(frozen=True)
class Depth:
    """The work of one depth, in pieces; what is made of each is admitted in their order."""

    pieces: list[NDArray[np.int64]]
    work: Callable[[NDArray[np.int64]], Made]
    admit: Callable[[Slices], Slices]


class Walk:
    """One request: checked, estimated, encoded."""

    def __init__(
        self,
        codes: Codes,
        tag_counts: ArrayLike,
        scores: NDArray[np.float64] | None,
        min_count: int,
        max_depth: int,
        must_hold: int | None,
        max_slices: int,
        watch: Watch,
    ) -> None:
        if min_count < 1:
            raise invalid("min_count", f"is {min_count}; a slice needs at least 1 instance")
        if max_depth < 1:
            raise invalid("max_depth", f"is {max_depth}; a slice needs at least 1 pair")
        watch.look()
        self.table = encode(codes, tag_counts, scores, min_count)
        n_attributes = len(self.table.widths)
        if must_hold is not None and not 0 <= must_hold < n_attributes:
            raise invalid("must_hold", f"is {must_hold}; the table has attributes 0 to {n_attributes - 1}")
        self._min_count = min_count
        self.width = max_depth
        self.depth = min(max_depth, n_attributes)
        self._max_slices = max_slices
        self._watch = watch
        self._must_hold, self._tag_counts = must_hold, tag_counts
        self._must = None if must_hold is None else self.table.firsts[must_hold : must_hold + 2]
        if self._must is not None and self._must[0] == self._must[1]:
            self.depth = 0  # no slice holds it
        self._most = _most_slices(self.table.widths, self.depth, self.table.n_rows // min_count)
        self._estimate = 0.0
        if self._most.sum() > max_slices and must_hold is None:
            self._estimate = looking(
                watch.look,
                partial(estimate_slices, codes, tag_counts, min_count=min_count, max_depth=max_depth, seed=0),
            )
            if self._estimate > max_slices:
                raise self._too_large(self._estimate)
        self._rooms: dict[int, Idle[Lines]] = {}
        self._kernels: list[Kernel] = [k for k in (kind(self.table, self.depth) for kind in KERNELS) if k.can()]

    def all(self, threads: int) -> Slices:
        """All slices in one piece."""
        gathered = Gathered(self, from_arrow)
        crew = Crew(threads, self._watch)
        for depth in self._depths(threads, None, 2 * CHUNK_SLICES):

            def place(made: Made, depth: Depth = depth) -> Callable[[], None]:
                return gathered.adding(depth.admit(made.chunk), made.give)

            crew.place(depth.pieces, depth.work, place)
        return gathered.slices()

    def borrowed(self, threads: int, judge: Judge | None = None) -> Iterator[tuple[Slices, Any]]:
        """Chunks of slices in canonical order, each with what `judge`, asked by the thread that made it, says of it.

        The arrays of a chunk are written over once the next is asked for. A judge sees every slice, also those
        without the attribute that must be there, but for the last depth.
        """
        crew = Crew(threads, self._watch)
        # Where few are kept, those that are not are most of what memory holds.
        most_slices = CHUNK_SLICES if judge is None else CHUNK_SLICES // 2
        for depth in self._depths(threads, judge, most_slices):
            for made in crew.each(depth.pieces, depth.work):
                chunk = depth.admit(made.chunk)
                if len(chunk):
                    yield chunk, made.verdict
                made.give()

    def _depths(self, threads: int, judge: Judge | None, most_slices: int) -> Iterator[Depth]:
        """The work of each depth, that of the next made of what is admitted of it."""
        found = 0
        prefixes = [self._root(), self._root()]
        for depth in range(1, self.depth + 1):
            if judge is not None:
                judge.begin(depth)
            is_prefix = 1 < depth <= self.depth - 2
            whole = depth < self.depth if judge is not None else depth <= self.depth - 2
            made: list[tuple[NDArray[np.int32], Counts]] = []

            def admit(chunk: Slices, depth: int = depth, is_prefix: bool = is_prefix, made: Any = made) -> Slices:
                nonlocal found
                self._watch.done += 1
                if is_prefix:
                    made.append((self.table.position[chunk.items[:, :depth]], chunk.count.copy()))
                if judge is None and self._must_hold is not None:
                    chunk = take(chunk, self.holds(chunk))
                found += len(chunk)
                if found > self._max_slices:
                    raise self._too_large(max(self._estimate, found))
                return chunk

            pieces, work = self._work_of(threads, depth, prefixes[depth - 2], whole, judge, most_slices)
            self._watch.total += len(pieces)
            yield Depth(pieces, work, admit)
            if depth == 1:
                prefixes[1] = self._items_as_prefixes()
            elif is_prefix:
                items = [items for items, _ in made] or [np.zeros((0, depth), dtype=np.int32)]
                counts = [count for _, count in made] or [np.zeros(0, dtype=np.int32)]
                prefixes.append((np.ascontiguousarray(np.concatenate(items)), np.concatenate(counts)))
        self._watch.finish()

    def most_lines(self, depth: int) -> int:
        """An upper bound of the slices of at most `depth` pairs, of a walk that is not refused."""
        return int(min(self._most[: max(depth, 0)].sum(), self._max_slices))

    def lines(self, capacity: int, empty: Empty) -> Lines:
        """Room for so many slices of this walk."""
        return Lines(capacity, *self._kind_of_lines, empty)

    def _room(self, capacity: int) -> Idle[Lines]:
        """Rooms for so many slices; those of one depth serve the next."""
        if capacity not in self._rooms:
            self._rooms[capacity] = Idle(partial(Lines, capacity, *self._kind_of_lines))
        return self._rooms[capacity]

    @property
    def _kind_of_lines(self) -> tuple[int, int, int, bool]:
        return self.width, len(self.table.position), len(self.table.columns), self.table.any_unscored

    def _root(self) -> Prefixes:
        return np.zeros((1, 0), dtype=np.int32), np.array([self.table.n_rows])

    def _work_of(
        self, threads: int, depth: int, prefixes: Prefixes, whole: bool, judge: Judge | None, most_slices: int
    ) -> tuple[list[NDArray[np.int64]], Callable[[NDArray[np.int64]], Made]]:
        """Pieces of the slices of `depth` pairs and what makes them; unless `whole` only those with the attribute that
        must be there.
        """
        table = self.table

        def judged(chunk: Slices) -> Any:
            return judge.of(depth, chunk) if judge is not None else None

        if depth == 1:
            single = self._single()
            return [NO_ITEM], lambda _: Made(single, judged(single), lambda: None)
        level = self._level(depth, prefixes, whole)
        most = level.most_slices
        if not most.any():
            return [], lambda _: Made(self._single(), None, lambda: None)
        # Two pairs are counted as three will be, so that the table is encoded for one kernel.
        decides = self._level(3, self._items_as_prefixes(), whole=True) if depth == 2 < self.depth else level
        kernel = min(self._kernels, key=lambda kernel: float(kernel.cost(decides).sum()))
        kernel.prepare()
        cost = kernel.cost(level)
        share = float(cost.sum()) / (4 * threads)
        together = kernel.together(level)
        pieces = cut(
            most,
            cost,
            lambda p: level.by_row(table, p, float(cost[p])),
            together,
            most_slices=most_slices,
            most_cost=min(max(share, LEAST_NANOSECONDS), MOST_NANOSECONDS),
        )
        largest = 0 if together is None else math.ceil(np.add.reduceat(most, together[:-1]).max())
        room = self._room(max(2 * CHUNK_SLICES, table.n_items, largest))

        def work(piece: NDArray[np.int64]) -> Made:
            lines = room.take()
            chunk = _first(lines, kernel.fill(level, piece, lines), table.any_unscored)
            return Made(chunk, judged(chunk), partial(room.give, lines))

        return pieces, work

    def _level(self, depth: int, prefixes: Prefixes, whole: bool) -> Level:
        must = NO_ITEM if whole or self._must is None else self._must
        return level_of(self.table, depth, *prefixes, self._min_count, must)

    def _items_as_prefixes(self) -> Prefixes:
        return np.arange(self.table.n_items, dtype=np.int32)[:, None], self.table.item_count

    def _single(self) -> Slices:
        """The slices of one pair."""
        table = self.table
        items = np.full((table.n_items, self.width), -1, dtype=item_type(len(table.position)))
        items[:, 0] = table.item_ids
        scored = np.array(table.item_scored, dtype=np.int32).reshape(len(table.columns), table.n_items)
        total = np.zeros((table.n_items, len(table.columns)))
        for k, column in enumerate(table.columns):
            for part, sums in zip(column.parts, table.item_sums[k], strict=True):
                total[:, k] += sums * part.weight
        return Slices(items, table.item_count.astype(np.int32), np.ascontiguousarray(scored.T), total)

    def holds(self, chunk: Slices) -> NDArray[np.bool_]:
        """Which slices of `chunk` have the attribute that must be there."""
        return holding(chunk, self._tag_counts, self._must_hold)

    def no_room(self) -> TooLarge:
        """The system gives no memory for the most slices that there may be."""
        return TooLarge(
            f"up to {self.most_lines(self.depth):,} slices with min_count {self._min_count} and max_depth "
            f"{self.width} would not fit in memory; raise min_count, lower max_depth, or allow fewer slices",
            metadata={"limit": str(self._max_slices)},
        )

    def _too_large(self, estimate: float) -> TooLarge:
        return TooLarge(
            f"about {math.ceil(estimate):,} slices or more with min_count {self._min_count} and max_depth "
            f"{self.width}, but at most {self._max_slices:,} are allowed; raise min_count or lower max_depth",
            metadata={"estimate": str(math.ceil(estimate)), "limit": str(self._max_slices)},
        )


class Gathered:
    """Slices of a walk in one piece, as they come."""

    def __init__(self, walk: Walk, empty: Empty) -> None:
        self._any_unscored = walk.table.any_unscored
        # Pages that are never written to take no memory, so there is room for the most there can be.
        try:
            self._lines = walk.lines(walk.most_lines(walk.depth), empty)
            self.beside = empty((len(self._lines.count),), np.float64)  # for what is told of each
        except MemoryError:
            raise walk.no_room() from None
        self.found = 0
        self._put = stream if self._lines.nbytes > STREAMED_BYTES else _copy

    def add(self, chunk: Slices) -> None:
        self.adding(chunk, lambda: None)()

    def adding(self, chunk: Slices, then: Callable[[], None]) -> Callable[[], None]:
        """Give `chunk` its place; what is returned copies it there."""
        lines, here = self._lines, slice(self.found, self.found + len(chunk))
        self.found += len(chunk)

        def copy() -> None:
            for source, target in ((chunk.items, lines.items), (chunk.count, lines.count), (chunk.total, lines.total)):
                self._put(source, target, here.start)
            if self._any_unscored:
                self._put(chunk.scored, lines.scored, here.start)
            then()

        return copy

    def slices(self) -> Slices:
        """Those that were added; views."""
        return _first(self._lines, self.found, self._any_unscored)


def _copy(source: NDArray[Any], target: NDArray[Any], first: int) -> None:
    target[first : first + len(source)] = source


def _most_slices(widths: NDArray[np.int64], max_depth: int, full: int) -> NDArray[np.float64]:
    """An upper bound of the slices of each number of pairs, 1 to `max_depth` (D,): combinations of frequent items, and
    at most `full` a combination of attributes."""
    by_depth = [1.0] + [0.0] * max_depth
    for width in widths.tolist():
        for d in range(max_depth, 0, -1):
            by_depth[d] += by_depth[d - 1] * width
    attributes = int((widths > 0).sum())
    return np.array([float(min(by_depth[d], math.comb(attributes, d) * full)) for d in range(1, max_depth + 1)])


def _first(lines: Lines, n: int, any_unscored: bool) -> Slices:
    """The first `n` lines; where every row has a score, the counts are the scored counts."""
    count, total = lines.count[:n], lines.total[:n]
    scored = lines.scored[:n] if any_unscored else np.broadcast_to(count[:, None], total.shape)
    return Slices(lines.items[:n], count, scored, total)
