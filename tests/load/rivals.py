"""The tools that list the same slices as ours, each in the fastest setting of its own that was found.

A rival turns a table into what its library wants (not timed), then runs (timed), then its result is read into keys
(not timed). Libraries are imported where they are used: a run without one of them says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.load.found import Found, ascending, keys_of
from tests.load.shapes import Table

Prepared = tuple[Callable[[], Any], Callable[[Any], Found]]
Matrix = NDArray[np.float32]
Part = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]

_NO_LIMIT = 10**9
_BATCH = 200  # attribute combinations a query engine is given at once
_GROUPING_SETS = 50
_TOP = 20
_PIECE = 1_000_000


@dataclass(frozen=True)
class Rival:
    """`prepare(table, min_count, max_depth)` returns what to time and how to read its result.

    distribution: where the version is looked up. gives: what it yields besides the slices.
    lists_all: False for a tool that searches for the best few only. slow: takes a minute and more, on one core.
    """

    name: str
    prepare: Callable[[Table, int, int], Prepared]
    distribution: str | None
    gives: str
    lists_all: bool = True
    slow: bool = False


def _ours(table: Table, min_count: int, max_depth: int) -> Prepared:
    from services.enumeration.engine import enumerate_slices

    return _service(enumerate_slices, table, min_count, max_depth)


def _algorithm_3(table: Table, min_count: int, max_depth: int) -> Prepared:
    from services.enumeration.lattice import enumerate_slices

    return _service(enumerate_slices, table, min_count, max_depth)


def _service(enumerate_slices: Callable[..., Any], table: Table, min_count: int, max_depth: int) -> Prepared:
    def run() -> Any:
        return enumerate_slices(
            table.codes,
            table.tag_counts,
            table.scores,
            min_count=min_count,
            max_depth=max_depth,
            max_slices=_NO_LIMIT,
        )

    def read(slices: Any) -> Found:
        keys = keys_of(slices.items, int(table.offsets[-1]))
        return Found(keys, slices.count, np.rint(slices.total[:, 0]).astype(np.int64))

    return run, read


def _gram(table: Table, min_count: int, max_depth: int) -> Prepared:
    """One-hot columns of each parent's rows, multiplied with themselves: counts and sums of all its pairs at once.

    The product is symmetric, so that BLAS does half of it. The sums are the same product over the rows that score 1,
    which is quicker than weighing the rows, and exact.
    """
    n_items = int(table.offsets[-1])
    attribute = np.repeat(np.arange(len(table.tag_counts)), table.tag_counts)
    one_hot = np.zeros((len(table.codes), n_items), dtype=np.float32)
    one_hot[np.arange(len(table.codes))[:, None], table.codes + table.offsets[:-1]] = 1.0
    scores_1 = table.scores[:, 0] == 1.0

    def below(prefix: list[int], rows: Matrix, right: Matrix, columns: NDArray[np.int64]) -> Iterator[Part]:
        """All below `prefix`; `rows` are its rows, `right` those of them that score 1, over the items `columns`."""
        frequent = np.flatnonzero(rows.sum(axis=0) >= min_count)
        if len(frequent) < len(columns):
            rows, right, columns = rows[:, frequent], right[:, frequent], columns[frequent]
        counts, totals = rows.T @ rows, right.T @ right
        later = attribute[columns][:, None] < attribute[columns]
        first, second = np.nonzero((counts >= min_count) & later)
        heads = np.tile(np.array(prefix, dtype=np.int64), (len(first), 1))
        yield np.column_stack((heads, columns[first], columns[second])), counts[first, second], totals[first, second]
        if len(prefix) + 2 < max_depth:
            for at, item in enumerate(columns.tolist()):
                start = int(np.searchsorted(attribute[columns], attribute[item], side="right"))
                if start < len(columns):
                    mine, mine_right = np.flatnonzero(rows[:, at]), np.flatnonzero(right[:, at])
                    yield from below([*prefix, item], rows[mine, start:], right[mine_right, start:], columns[start:])

    def run() -> list[Part]:
        right = one_hot[scores_1]
        count, total = one_hot.sum(axis=0), right.sum(axis=0)
        kept = np.flatnonzero(count >= min_count)
        parts: list[Part] = [(kept[:, None], count[kept], total[kept])]
        if max_depth >= 2:
            parts += below([], one_hot, right, np.arange(n_items))
        return parts

    return run, lambda parts: _joined(parts, n_items, max_depth)


def _pyfim(miner: str, **options: Any) -> Callable[[Table, int, int], Prepared]:
    """Borgelt's C code. Bit vectors are its fastest here; perfect extensions, which it looks for first, are rare."""

    def prepare(table: Table, min_count: int, max_depth: int) -> Prepared:
        import fim

        rows = [tuple(row) for row in (table.codes + table.offsets[:-1]).tolist()]

        def run() -> Any:
            return getattr(fim, miner)(rows, target="s", supp=-min_count, zmin=1, zmax=max_depth, report="a", **options)

        return run, lambda sets: _from_sets(sets, int(table.offsets[-1]), max_depth)

    return prepare


def _mlxtend(table: Table, min_count: int, max_depth: int) -> Prepared:
    """Its apriori; its FP-growth took a hundred times as long on these tables."""
    from mlxtend.frequent_patterns import apriori

    frame = _one_hot_frame(table)
    support = (min_count - 0.5) / len(frame)  # half a row less, so that rounding drops no slice

    def run() -> Any:
        return apriori(frame, min_support=support, max_len=max_depth, low_memory=True)

    def read(found: Any) -> Found:
        counts = np.rint(found["support"].to_numpy() * len(frame)).astype(np.int64)
        return _from_sets(zip(found["itemsets"], counts.tolist(), strict=True), int(table.offsets[-1]), max_depth)

    return run, read


def _divexplorer(table: Table, min_count: int, max_depth: int) -> Prepared:
    """Its pattern mining itself: the class around it cannot limit the depth and so would not end."""
    import pandas as pd
    from divexplorer.utils_FPgrowth import fpgrowth_cm

    frame = _one_hot_frame(table)
    outcome = pd.DataFrame({"right": table.scores[:, 0].astype(int), "wrong": 1 - table.scores[:, 0].astype(int)})
    support = (min_count - 0.5) / len(frame)

    def run() -> Any:
        return fpgrowth_cm(
            frame, outcome, min_support=support, columns_accumulate=list(outcome.columns), max_len=max_depth
        )

    def read(found: Any) -> Found:
        right = found["right"].to_numpy().astype(np.int64)
        counts = right + found["wrong"].to_numpy().astype(np.int64)
        sets = zip(found["itemset"], counts.tolist(), strict=True)
        read_sets = _from_sets(sets, int(table.offsets[-1]), max_depth)
        return Found(read_sets.keys, read_sets.count, right)

    return run, read


def _pysubgroup(table: Table, min_count: int, max_depth: int) -> Prepared:
    """Its apriori, the quickest of its searches that list everything here."""
    import pandas as pd
    import pysubgroup

    frame = pd.DataFrame({str(a): column.astype(str) for a, column in enumerate(table.codes.T)})

    def run() -> Any:
        task = pysubgroup.SubgroupDiscoveryTask(
            frame,
            pysubgroup.FITarget(),
            pysubgroup.create_nominal_selectors(frame),
            pysubgroup.CountQF(),
            result_set_size=_NO_LIMIT,
            depth=max_depth,
            constraints=[pysubgroup.MinSupportConstraint(min_count)],
        )
        return pysubgroup.Apriori(use_numba=False).execute(task)

    def read(found: Any) -> Found:
        def items(group: Any) -> list[int]:
            pairs = ((int(s.attribute_name), int(s.attribute_value)) for s in group.selectors)
            return [int(table.offsets[a]) + tag for a, tag in pairs]

        sets = ((items(group), int(quality)) for quality, group, _ in found.results if group.selectors)
        return _from_sets(sets, int(table.offsets[-1]), max_depth)

    return run, read


def _sliceline(table: Table, min_count: int, max_depth: int) -> Prepared:
    """It keeps the best 20 by its own score and prunes by that, so it does not list the slices."""
    from sliceline.slicefinder import Slicefinder

    codes, errors = table.codes.astype(np.int64), 1.0 - table.scores[:, 0]

    def run() -> Any:
        finder = Slicefinder(alpha=0.95, k=_TOP, max_l=max_depth, min_sup=min_count, verbose=False)
        return finder.fit(codes, errors)

    def read(finder: Any) -> Found:
        counts = np.array([s["slice_size"] for s in finder.top_slices_statistics_], dtype=np.int64)
        wrong = np.array([s["sum_slice_error"] for s in finder.top_slices_statistics_])
        items = [
            [int(table.offsets[a]) + int(tag) for a, tag in enumerate(line) if tag is not None]
            for line in finder.top_slices_
        ]
        found = _from_sets(zip(items, counts.tolist(), strict=True), int(table.offsets[-1]), max_depth)
        return Found(found.keys, found.count, counts - np.rint(wrong).astype(np.int64))

    return run, read


def _polars(table: Table, min_count: int, max_depth: int) -> Prepared:
    """One grouping for each attribute combination, by one number made of its codes, many handed over at once."""
    import polars as pl

    frame = pl.DataFrame({f"a{a}": column for a, column in enumerate(table.codes.T)} | {"s": table.scores[:, 0]})
    combined = list(chain.from_iterable(combinations(range(table.codes.shape[1]), d) for d in range(1, max_depth + 1)))

    def grouped(attributes: tuple[int, ...]) -> Any:
        wide = pl.UInt16 if np.prod(table.tag_counts[list(attributes)]) <= 1 << 16 else pl.UInt32
        code = pl.col(f"a{attributes[0]}").cast(wide)
        for a in attributes[1:]:
            code = code * int(table.tag_counts[a]) + pl.col(f"a{a}")
        groups = frame.lazy().select(code.cast(wide).alias("code"), "s").group_by("code")
        return groups.agg(pl.len().alias("n"), pl.col("s").sum()).filter(pl.col("n") >= min_count)

    def run() -> list[Any]:
        found = []
        for at in range(0, len(combined), _BATCH):
            found += pl.collect_all([grouped(attributes) for attributes in combined[at : at + _BATCH]])
        return found

    def read(found: list[Any]) -> Found:
        parts = []
        for attributes, groups in zip(combined, found, strict=True):
            code = groups["code"].to_numpy().astype(np.int64)
            tags = np.unravel_index(code, table.tag_counts[list(attributes)])
            items = np.column_stack([table.offsets[a] + tag for a, tag in zip(attributes, tags, strict=True)])
            parts.append((items, groups["n"].to_numpy(), groups["s"].to_numpy()))
        return _joined(parts, int(table.offsets[-1]), max_depth)

    return run, read


def _duckdb(table: Table, min_count: int, max_depth: int) -> Prepared:
    """GROUPING SETS, so that one scan serves many attribute combinations."""
    import duckdb
    import pyarrow as pa

    connection = duckdb.connect()
    columns = {f"a{a}": column for a, column in enumerate(table.codes.T)} | {"s": table.scores[:, 0]}
    connection.register("given", pa.table(columns))
    connection.execute("CREATE TABLE tags AS SELECT * FROM given")
    every = list(chain.from_iterable(combinations(range(table.codes.shape[1]), d) for d in range(1, max_depth + 1)))
    batches = [every[at : at + _GROUPING_SETS] for at in range(0, len(every), _GROUPING_SETS)]

    def run() -> list[Any]:
        found = []
        for batch in batches:
            names = ", ".join(f"a{a}" for a in sorted(set(chain.from_iterable(batch))))
            sets = ", ".join("(" + ", ".join(f"a{a}" for a in attributes) + ")" for attributes in batch)
            query = (
                f"SELECT {names}, count(*) AS n, sum(s) AS s FROM tags "
                f"GROUP BY GROUPING SETS ({sets}) HAVING count(*) >= {min_count}"
            )
            found.append(connection.execute(query).fetchnumpy())
        return found

    def read(found: list[Any]) -> Found:
        parts = []
        for groups in found:
            named = [c for c in groups if c not in ("n", "s")]
            items = np.column_stack(
                [np.ma.filled(np.ma.asarray(groups[c]).astype(np.int64) + table.offsets[int(c[1:])], -1) for c in named]
            )
            padded = np.sort(items, axis=1)[:, ::-1][:, :max_depth]  # the pairs first; the rest is padding
            parts.append((padded, np.asarray(groups["n"]), np.asarray(groups["s"])))
        return _joined(parts, int(table.offsets[-1]), max_depth)

    return run, read


def _one_hot_frame(table: Table) -> Any:
    import pandas as pd

    held = np.zeros((len(table.codes), int(table.offsets[-1])), dtype=bool)
    held[np.arange(len(held))[:, None], table.codes + table.offsets[:-1]] = True
    return pd.DataFrame(held)


def _from_sets(sets: Iterable[tuple[Iterable[int], int]], n_items: int, max_depth: int) -> Found:
    """Pairs (items, count) of Python objects as columns, a piece at a time: there may be tens of millions."""
    sets, parts = iter(sets), []
    while some := list(itertools.islice(sets, _PIECE)):
        lengths = np.fromiter((len(items) for items, _ in some), dtype=np.int64, count=len(some))
        flat = np.fromiter(chain.from_iterable(items for items, _ in some), dtype=np.int64, count=int(lengths.sum()))
        padded = np.full((len(some), max_depth), -1, dtype=np.int64)
        padded[np.arange(max_depth) < lengths[:, None]] = flat
        parts.append((padded, np.fromiter((n for _, n in some), dtype=np.int64, count=len(some)), None))
    return _joined(parts, n_items, max_depth)


def _joined(parts: Sequence[Part], n_items: int, max_depth: int) -> Found:
    """Parts of items (m, d) in any order within a line, padded with -1, with their counts and sums, as one."""
    by_width: dict[int, list[Part]] = {}
    for part in parts:
        by_width.setdefault(part[0].shape[1], []).append(part)
    keys, counts, totals = [], [], []
    for width, same in by_width.items():
        items = np.concatenate([items for items, _, _ in same])
        padded = np.full((len(items), max_depth), -1, dtype=np.int64)
        padded[:, :width] = items
        keys.append(keys_of(ascending(padded), n_items))
        counts += [count for _, count, _ in same]
        totals += [total for _, _, total in same if total is not None]
    total = np.rint(np.concatenate(totals)).astype(np.int64) if totals else None
    return Found(np.concatenate(keys), np.concatenate(counts).astype(np.int64), total)


OURS = Rival("HiBug2", _ours, None, "counts, sums")
RIVALS = {
    rival.name: rival
    for rival in (
        OURS,
        Rival("paper's Algorithm 3, numpy", _algorithm_3, "numpy", "counts, sums"),
        Rival("one-hot matmul a parent, numpy", _gram, "numpy", "counts, sums"),
        Rival("pyfim eclat, bit vectors", _pyfim("eclat", algo="b", mode="x"), "pyfim", "counts"),
        Rival("pyfim apriori", _pyfim("apriori"), "pyfim", "counts"),
        Rival("pyfim eclat, as it comes", _pyfim("eclat"), "pyfim", "counts", slow=True),
        Rival("polars, a grouping each", _polars, "polars", "counts, sums"),
        Rival("duckdb, grouping sets", _duckdb, "duckdb", "counts, sums"),
        Rival("pysubgroup apriori", _pysubgroup, "pysubgroup", "counts", slow=True),
        Rival("mlxtend apriori", _mlxtend, "mlxtend", "counts", slow=True),
        Rival("DivExplorer", _divexplorer, "DivExplorer", "counts, sums", slow=True),
        Rival("sliceline, best 20 only", _sliceline, "sliceline", "counts, sums", lists_all=False, slow=True),
    )
}
