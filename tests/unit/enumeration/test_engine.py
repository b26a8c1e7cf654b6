from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration import engine, lattice, walk
from services.enumeration.bitset_kernel import BitSets
from services.enumeration.error_slices import find_error_slices
from services.enumeration.joint_kernel import JointTables
from services.enumeration.lattice import Cancelled, item_offsets
from services.enumeration.level import Plan
from services.enumeration.row_list_kernel import RowLists
from shared.errors import InvalidInput, TooLarge
from tests.load.shapes import paper_table
from tests.unit.enumeration.references import algorithm_1, algorithm_3, slice_rows, sums
from tests.unit.enumeration.tables import Table, tables

NAMES = ("items", "count", "scored", "total")
any_scores = tables() | tables(values=(0.0, 1.0)) | tables(values=(0.0, 0.25, 1.0))


class OneByOne(BitSets):
    """Bit sets that count each prefix by itself, whatever the cost says."""

    def _all_tags(self, level):
        return []


class AllTags(BitSets):
    """Bit sets that count all tags of an attribute together wherever these fit."""

    def _one_by_one(self, level):
        return Plan(None, super()._one_by_one(level).cost * 1e9)


@pytest.fixture(params=[OneByOne, AllTags, JointTables, RowLists])
def kernel(request, monkeypatch):
    """Each kernel alone, whatever the cost says."""
    monkeypatch.setattr(walk, "KERNELS", (request.param,))
    return request.param


@pytest.fixture(params=["small pieces", "usual pieces"])
def pieces(request, monkeypatch):
    if request.param == "small pieces":  # a row of a joint count each
        monkeypatch.setattr(walk, "CHUNK_SLICES", 1)


@pytest.fixture(params=["numba", "no numba"])
def install(request, monkeypatch):
    monkeypatch.setattr(engine, "_COMPILED", request.param == "numba")


def enumerate_table(table: Table, **options):
    return engine.enumerate_slices(
        table.codes, table.tag_counts, table.scores, min_count=table.min_count, max_depth=table.max_depth, **options
    )


def pairs_of(items, tag_counts):
    offsets = item_offsets(tag_counts)
    out = []
    for row in items:
        attributes = np.searchsorted(offsets, row[row >= 0], side="right") - 1
        out.append(tuple((int(a), int(i - offsets[a])) for a, i in zip(attributes, row, strict=False)))
    return out


def assert_same(slices, found, table):
    """`slices` are the slices `found`, in canonical order, with their counts and sums."""
    got = pairs_of(slices.items, table.tag_counts)
    assert got == sorted(found, key=lambda s: (len(s), s))
    for i, pairs in enumerate(got):
        assert slices.count[i] == len(found[pairs])
        scored, total = sums(found[pairs], table.scores)
        np.testing.assert_array_equal(slices.scored[i], scored)
        np.testing.assert_allclose(slices.total[i], total, rtol=0, atol=1e-9)


def assert_equal(one, other, lines=slice(None)):
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name)[lines], err_msg=name)


@pytest.mark.usefixtures("kernel", "pieces")
class TestEveryKernel:
    @given(table=any_scores)
    @settings(max_examples=60, deadline=None)
    def test_finds_what_algorithm_1_finds(self, table):
        found = algorithm_1(table.codes, table.tag_counts, table.min_count, table.max_depth)
        assert_same(enumerate_table(table), found, table)

    @given(table=any_scores, attribute=st.integers(0, 4))
    @settings(max_examples=60, deadline=None)
    def test_slices_that_must_hold_an_attribute(self, table, attribute):
        attribute %= len(table.tag_counts)
        everything = enumerate_table(table)
        first, end = item_offsets(table.tag_counts)[attribute : attribute + 2]
        held = ((everything.items >= first) & (everything.items < end)).any(axis=1)
        assert_equal(enumerate_table(table, must_hold=attribute), everything, held)

    @given(table=any_scores, seed=st.integers(0, 2**32 - 1), threads=st.sampled_from((1, 2, 5)))
    @settings(max_examples=30, deadline=None)
    def test_neither_threads_nor_order_of_rows_change_anything(self, table, seed, threads):
        order = np.random.default_rng(seed).permutation(len(table.codes))
        shuffled = replace(table, codes=table.codes[order], scores=table.scores[order])
        assert_equal(enumerate_table(shuffled, threads=threads), enumerate_table(table, threads=1))


@pytest.mark.usefixtures("kernel")
class TestShapes:
    @pytest.mark.parametrize("kind", ["0/1", "real", "not scored"])
    def test_the_papers_shape_is_that_of_the_lattice(self, kind):
        codes, tag_counts, scores = paper_table(1_500, 16)
        rng = np.random.default_rng(2)
        if kind != "0/1":
            scores = np.column_stack((scores, rng.random((1_500, 2)), rng.random((1_500, 1)) * 0.999))
        if kind == "not scored":
            scores[rng.random(scores.shape) < 0.1] = np.nan
        for max_depth in (1, 2, 3, 4, 5):
            request = {"min_count": 12, "max_depth": max_depth}
            expected = lattice.enumerate_slices(codes, tag_counts, scores, **request)
            found = engine.enumerate_slices(codes, tag_counts, scores, **request)
            for name in ("items", "count", "scored"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
            np.testing.assert_allclose(found.total, expected.total, rtol=0, atol=1e-9)

    def test_many_rows(self):
        """More than the joint tables gather at once, and more than the rounded sum of one word holds to 1e-9."""
        codes, tag_counts, _ = paper_table(70_000, 6)
        scores = np.full((70_000, 2), 0.3)
        scores[:, 1] = np.random.default_rng(1).random(70_000)
        found = engine.enumerate_slices(codes, tag_counts, scores, min_count=10, max_depth=3)
        np.testing.assert_allclose(found.total[:, 0], 0.3 * found.count, rtol=0, atol=1e-9)
        for line in range(0, len(found), 97):
            rows = slice_rows(codes, tag_counts, found.items[line])
            assert len(rows) == found.count[line]
            assert abs(float(np.sum(scores[rows, 1].astype(np.longdouble)) - found.total[line, 1])) < 1e-9

    def test_tables_that_are_filled_some_at_a_time(self, monkeypatch, kernel):
        """Joint tables too large to stay in cache together, and passes over the rows by several threads."""
        rng = np.random.default_rng(4)
        codes, tag_counts = rng.integers(0, 6, (40_000, 8)).astype(np.uint8), [6] * 8
        scores = rng.integers(0, 2, (40_000, 1)).astype(float)
        request = {"min_count": 20, "max_depth": 3}
        found = engine.enumerate_slices(codes, tag_counts, scores, **request)
        monkeypatch.setattr("services.enumeration.work_units._ROWS_FOR_ONE", 100)
        assert_equal(engine.enumerate_slices(codes, tag_counts, scores, **request), found)
        monkeypatch.setattr(walk, "KERNELS", (BitSets if kernel is JointTables else JointTables,))
        assert_equal(engine.enumerate_slices(codes, tag_counts, scores, **request), found)

    def test_many_score_columns(self):
        codes, tag_counts, _ = paper_table(600, 8)
        scores = np.random.default_rng(3).integers(0, 2, (600, 40)).astype(float)
        expected = lattice.enumerate_slices(codes, tag_counts, scores, min_count=5, max_depth=3)
        assert_equal(engine.enumerate_slices(codes, tag_counts, scores, min_count=5, max_depth=3), expected)


@pytest.mark.parametrize("kind", [BitSets, RowLists])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_wide_tag_sets(kind, dtype, monkeypatch):
    monkeypatch.setattr(walk, "KERNELS", (kind,))
    rng = np.random.default_rng(3)
    tag_counts = np.array([300, 2, 1000, 3])
    codes = (rng.beta(1, 6, (400, 4)) * np.minimum(tag_counts, np.iinfo(dtype).max)).astype(dtype)
    codes[rng.random(codes.shape) < 0.1] = np.iinfo(dtype).max  # for uint8 that is a tag of the wide attributes
    table = Table(codes, tag_counts, rng.random((400, 1)), 2, 3)
    found = algorithm_3(codes, tag_counts, 2, 3)
    assert any(tag > 200 for s in found for _, tag in s)
    assert_same(enumerate_table(table), found, table)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("n_rows", [(1 << 16) - 1, 1 << 16])
@pytest.mark.parametrize("right", [0.0, 0.7, 1.0, None])
@pytest.mark.parametrize("max_depth", [3, 5])
def test_counts_and_sums_that_just_fit_half_a_cell_and_do_not(n_rows, right, max_depth):
    rng = np.random.default_rng(5)
    codes = (rng.random((n_rows, 5)) < (0.0, 0.001, 0.1, 0.5, 0.9)).astype(np.uint8)
    scores = None if right is None else (rng.random((n_rows, 1)) < right).astype(float)
    request = {"min_count": 40, "max_depth": max_depth}
    expected = lattice.enumerate_slices(codes, [2] * 5, scores, **request)
    assert expected.count.max() == n_rows
    assert_equal(engine.enumerate_slices(codes, [2] * 5, scores, **request), expected)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("n_items", "kind"), [(1 << 15, np.int16), ((1 << 15) + 1, np.int32)])
@pytest.mark.parametrize("values", [2, 100])
def test_items_are_as_narrow_as_their_number_allows(n_items, kind, values):
    rng = np.random.default_rng(3)
    tag_counts = np.array([3, n_items - 6, 3])
    codes = rng.integers(0, 3, (200, 3)).astype(np.uint16)
    codes[codes[:, 1] == 2, 1] = n_items - 7  # the last tag, and its items are followed by the largest of all
    table = Table(codes, tag_counts, rng.integers(0, values, (200, 1)) / (values - 1), 2, 3)
    slices = enumerate_table(table)
    assert slices.items.dtype == kind
    assert slices.items.max() == n_items - 1
    assert_same(slices, algorithm_3(codes, tag_counts, 2, 3), table)
    on_numpy = lattice.enumerate_slices(codes, tag_counts, table.scores, min_count=2, max_depth=3)
    assert [getattr(on_numpy, name).dtype for name in NAMES] == [getattr(slices, name).dtype for name in NAMES]


def test_the_cheapest_kernel_is_taken(monkeypatch):
    """0/1 scores go to bit sets, real scores to joint tables, wide tag sets to row lists."""
    used = set()
    for kind in walk.KERNELS:
        fill = kind.fill

        def noted(self, *arguments, fill=fill):
            used.add(self.name)
            return fill(self, *arguments)

        monkeypatch.setattr(kind, "fill", noted)
    rng = np.random.default_rng(0)
    codes, tag_counts, scores = paper_table(3_000, 12)
    wide = (rng.random((3_000, 6)) * 1_000).astype(np.uint16)
    for table, column, name in (
        ((codes, tag_counts), scores, "bit sets"),
        ((codes, tag_counts), rng.random((3_000, 1)), "joint tables"),
        ((wide, [1_000] * 6), rng.random((3_000, 1)), "row lists"),
    ):
        used.clear()
        engine.enumerate_slices(*table, column, min_count=2, max_depth=3)
        assert used == {name}


@given(table=any_scores)
@settings(max_examples=30, deadline=None)
def test_chunks_are_the_slices_and_stay_as_they_were(table):
    arguments = (table.codes, table.tag_counts, table.scores)
    request = {"min_count": table.min_count, "max_depth": table.max_depth}
    chunks = list(engine.stream_slices(*arguments, **request))
    everything = engine.enumerate_slices(*arguments, **request)
    for name in NAMES:
        parts = [getattr(chunk, name) for chunk in chunks]
        whole = getattr(everything, name)
        np.testing.assert_array_equal(np.concatenate(parts) if parts else whole[:0], whole)


def test_shapes_and_dtypes():
    codes, tag_counts, scores = paper_table(200, 3)
    slices = engine.enumerate_slices(codes, tag_counts, np.repeat(scores, 2, axis=1), min_count=5, max_depth=6)
    assert slices.items.shape == (len(slices), 6)
    assert (slices.items[:, 3:] == -1).all()
    assert (slices.items.dtype, slices.count.dtype) == (np.int16, np.int32)
    assert (slices.scored.dtype, slices.total.dtype) == (np.int32, np.float64)
    assert slices.scored.shape == slices.total.shape == (len(slices), 2)
    bare = engine.enumerate_slices(codes, tag_counts, None, min_count=5, max_depth=6)
    assert bare.scored.shape == bare.total.shape == (len(slices), 0)


@pytest.mark.usefixtures("install")
class TestErrorSlices:
    @given(
        table=any_scores,
        margin=st.sampled_from((0.0, 0.125, 0.2)),
        top=st.sampled_from((None, 0, 1, 4)),
        must_hold=st.sampled_from((None, 0, 1)),
    )
    @settings(max_examples=100, deadline=None)
    def test_are_those_among_all_slices(self, table, margin, top, must_hold):
        if must_hold is not None:
            must_hold %= len(table.tag_counts)
        request = {"min_count": table.min_count, "max_depth": table.max_depth}
        everything = enumerate_table(table)
        for column in range(table.scores.shape[1]):
            known = table.scores[:, column][~np.isnan(table.scores[:, column])]
            if not len(known):
                continue
            expected = find_error_slices(
                everything, column, float(known.mean()), float((1 - known).sum()), margin=margin
            )
            held = np.ones(len(expected), dtype=bool)
            if must_hold is not None:
                first, end = item_offsets(table.tag_counts)[must_hold : must_hold + 2]
                items = everything.items[expected.index]
                held = ((items >= first) & (items < end)).any(axis=1)
            found = engine.error_slices(
                table.codes, table.tag_counts, table.scores, **request,
                margin=margin, column=column, top=top, must_hold=must_hold,
            )  # fmt: skip
            np.testing.assert_array_equal(found.slices.items, everything.items[expected.index[held]][:top])
            np.testing.assert_array_equal(found.slices.count, everything.count[expected.index[held]][:top])
            assert found.errors().index.tolist() == list(range(len(found.slices)))
            for name in ("mean", "drop", "parent_drop", "error_share", "interval_low", "interval_high"):
                np.testing.assert_allclose(
                    getattr(found.errors(), name), getattr(expected, name)[held][:top], rtol=0, atol=1e-9
                )
            if must_hold is None:
                assert found.candidates == len(everything)

    def test_refuses_a_column_without_a_score(self):
        codes, tag_counts, scores = paper_table(50, 3)
        request = {"min_count": 5, "max_depth": 2, "margin": 0.2}
        with pytest.raises(InvalidInput, match="scores"):
            engine.error_slices(codes, tag_counts, np.full((50, 1), np.nan), **request)
        with pytest.raises(InvalidInput, match="column"):
            engine.error_slices(codes, tag_counts, scores, column=1, **request)


def test_many_error_slices_are_cut_to_the_top_as_they_come(monkeypatch):
    codes, tag_counts, scores = paper_table(2_000, 16)
    request = {"min_count": 10, "max_depth": 4, "margin": 0.1}
    everything = engine.error_slices(codes, tag_counts, scores, **request)
    assert len(everything.slices) > 10_100
    few = engine.error_slices(codes, tag_counts, scores, top=20, **request)
    assert_equal(few.slices, everything.slices, slice(20))
    np.testing.assert_array_equal(few.lowest, everything.lowest[:20])


class TestLimits:
    codes, tag_counts, scores = paper_table(1_000, 12)

    def run(self, **options):
        return engine.enumerate_slices(self.codes, self.tag_counts, self.scores, min_count=5, max_depth=3, **options)

    def test_as_many_as_allowed_pass_and_one_fewer_does_not(self):
        found = len(self.run())
        assert len(self.run(max_slices=found)) == found
        with pytest.raises(TooLarge, match="raise min_count or lower max_depth") as caught:
            self.run(max_slices=found - 1)
        assert caught.value.metadata == {"estimate": str(found), "limit": str(found - 1)}

    def test_a_low_estimate_does_not_let_more_through(self, monkeypatch):
        monkeypatch.setattr(walk, "estimate_slices", lambda *_, **__: 1.0)
        for limit in (3, 200, len(self.run()) - 1):
            with pytest.raises(TooLarge) as caught:
                self.run(max_slices=limit)
            assert int(caught.value.metadata["estimate"]) > limit

    def test_a_limit_that_no_memory_holds_is_told_as_one(self, monkeypatch):
        def no_room(*_):
            raise MemoryError

        monkeypatch.setattr(walk, "Lines", no_room)
        with pytest.raises(TooLarge, match="would not fit in memory"):
            self.run()
        with pytest.raises(TooLarge, match="would not fit in memory"):
            engine.error_slices(self.codes, self.tag_counts, self.scores, min_count=5, max_depth=3, margin=0.2)

    def test_the_bound_that_spares_an_estimate_is_one(self):
        for max_depth in (1, 2, 3):
            bound = walk.Walk(self.codes, self.tag_counts, None, 5, max_depth, None, 10**9, walk.Watch(None, None))
            found = engine.enumerate_slices(self.codes, self.tag_counts, None, min_count=5, max_depth=max_depth)
            for depth in range(max_depth + 1):
                assert bound.most_lines(depth) >= ((found.items >= 0).sum(axis=1) <= depth).sum()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_cancelling_stops_the_work_at_any_moment(self, monkeypatch, threads):
        monkeypatch.setattr("services.enumeration.work_units._LOOK_SECONDS", 0.0)
        monkeypatch.setattr(walk, "CHUNK_SLICES", 1)
        asked = 0

        def count() -> bool:
            nonlocal asked
            asked += 1
            return False

        self.run(cancelled=count, threads=threads)
        assert asked > 5
        for stop in (1, 2, 5):  # how often is asked depends on the threads' pace
            left = iter([False] * (stop - 1) + [True])
            with pytest.raises(Cancelled):
                self.run(cancelled=lambda left=left: next(left), threads=threads)

    def test_requests_at_the_same_time_share_the_threads(self, monkeypatch):
        """Also where tables are encoded in parts, and where some of the callers give up."""
        monkeypatch.setattr("services.enumeration.work_units._LOOK_SECONDS", 0.0)
        monkeypatch.setattr("services.enumeration.work_units._ROWS_FOR_ONE", 100)
        monkeypatch.setattr(walk, "CHUNK_SLICES", 1)  # so many pieces that each caller is asked often enough
        expected = self.run()

        def one(caller: int):
            left = iter([False] * (caller % 5) + [True])
            return self.run(cancelled=lambda: next(left)) if caller % 3 == 2 else self.run()

        with ThreadPoolExecutor(8) as callers:
            results = [callers.submit(one, caller) for caller in range(24)]
        for caller, result in enumerate(results):
            if caller % 3 == 2:
                with pytest.raises(Cancelled):
                    result.result()
            else:
                assert_equal(result.result(), expected)

    def test_progress_rises_to_its_total(self, monkeypatch):
        monkeypatch.setattr("services.enumeration.work_units._LOOK_SECONDS", 0.0)
        monkeypatch.setattr(walk, "CHUNK_SLICES", 1)
        seen = []
        self.run(on_progress=lambda done, total: seen.append((done, total)))
        assert len(seen) > 3
        assert all(0 <= done <= total for done, total in seen)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1]


@pytest.mark.usefixtures("install")
class TestRefusals:
    codes, tag_counts, scores = paper_table(50, 3)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"min_count": 0}, "min_count"),
            ({"max_depth": 0}, "max_depth"),
            ({"must_hold": 3}, "must_hold"),
            ({"must_hold": -1}, "must_hold"),
            ({"codes": np.zeros((50, 3), dtype=np.int64)}, "codes"),
            ({"codes": np.zeros(50, dtype=np.uint8)}, "codes"),
            ({"tag_counts": [2, 2]}, "tag_counts"),
            ({"scores": np.full((50, 1), 1.5)}, "scores"),
            ({"scores": np.full((50, 1), -0.1)}, "scores"),
            ({"scores": np.zeros((49, 1))}, "scores"),
            ({"scores": np.zeros(50)}, "scores"),
        ],
    )
    def test_the_field_is_named_when_called(self, change, field):
        given_ = {"codes": self.codes, "tag_counts": self.tag_counts, "scores": self.scores}
        for call in (engine.enumerate_slices, engine.stream_slices):
            with pytest.raises(InvalidInput) as caught:
                call(**{**given_, "min_count": 5, "max_depth": 2, **change})
            assert [v.field for v in caught.value.violations] == [field]


@given(table=any_scores)
@settings(max_examples=20, deadline=None)
def test_without_numba_the_slices_are_the_same(table):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_COMPILED", False)
        slow = enumerate_table(table, must_hold=0)
    fast = enumerate_table(table, must_hold=0)
    for name in ("items", "count", "scored"):
        np.testing.assert_array_equal(getattr(slow, name), getattr(fast, name))
    np.testing.assert_allclose(slow.total, fast.total, rtol=0, atol=1e-9)
