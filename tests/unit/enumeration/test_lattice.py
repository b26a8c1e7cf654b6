import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration import lattice
from services.enumeration.lattice import (
    Cancelled,
    check_request,
    enumerate_slices,
    estimate_slices,
    item_offsets,
    score_slices,
)
from shared.errors import InvalidInput, TooLarge
from tests.load.shapes import paper_table
from tests.unit.enumeration.references import algorithm_1, algorithm_2, algorithm_3, sums
from tests.unit.enumeration.tables import Table, tables

any_scores = tables()
correctness = tables(values=(0.0, 1.0))


@pytest.fixture(params=[10**15, -(10**15)], ids=["whole table", "block by block"])
def blocks(request, monkeypatch):
    """Both ways to lay out the work, whatever the cost says."""
    monkeypatch.setattr(lattice, "_BLOCK_COST_WORDS", request.param)


@pytest.fixture(params=[1, 1 << 16])
def chunks(request, monkeypatch):
    """One set a chunk, and the usual size."""
    monkeypatch.setattr(lattice, "_CHUNK_WORDS", request.param)


def enumerate_table(table: Table, **options):
    return enumerate_slices(
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


@pytest.mark.usefixtures("blocks", "chunks")
class TestEnumerate:
    @given(table=any_scores | correctness)
    @settings(max_examples=60, deadline=None)
    def test_finds_what_the_papers_algorithms_find(self, table):
        slices = enumerate_table(table)
        arguments = (table.codes, table.tag_counts, table.min_count, table.max_depth)
        naive = algorithm_1(*arguments)
        assert_same(slices, naive, table)
        for found in (algorithm_2(*arguments), algorithm_3(*arguments)):
            assert found.keys() == naive.keys()
            assert all(np.array_equal(found[s], naive[s]) for s in naive)

    @given(table=any_scores, seed=st.integers(0, 2**32 - 1))
    @settings(max_examples=40, deadline=None)
    def test_known_slices_in_any_order_score_as_when_enumerated(self, table, seed):
        slices = enumerate_table(table)
        order = np.random.default_rng(seed).permutation(len(slices))
        scored, total = score_slices(table.codes, table.tag_counts, slices.items[order], table.scores)
        np.testing.assert_array_equal(scored, slices.scored[order])
        np.testing.assert_array_equal(total, slices.total[order])

    @given(table=any_scores, seed=st.integers(0, 2**32 - 1))
    @settings(max_examples=40, deadline=None)
    def test_order_of_rows_changes_nothing(self, table, seed):
        order = np.random.default_rng(seed).permutation(len(table.codes))
        slices = enumerate_table(table)
        again = enumerate_table(
            Table(table.codes[order], table.tag_counts, table.scores[order], table.min_count, table.max_depth)
        )
        for name in ("items", "count", "scored", "total"):
            np.testing.assert_array_equal(getattr(again, name), getattr(slices, name))

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_wide_tag_sets(self, dtype):
        rng = np.random.default_rng(3)
        tag_counts = np.array([300, 2, 1000, 3])
        codes = (rng.beta(1, 6, (400, 4)) * np.minimum(tag_counts, np.iinfo(dtype).max)).astype(dtype)
        codes[rng.random(codes.shape) < 0.1] = np.iinfo(dtype).max  # for uint8 that is a tag of the wide attributes
        table = Table(codes, tag_counts, rng.random((400, 1)), 2, 3)
        # Algorithm 1 lists every combination, so 3 works here in its place; the two are held equal above.
        found = algorithm_3(codes, tag_counts, 2, 3)
        assert any(tag > 200 for s in found for _, tag in s)
        assert_same(enumerate_table(table), found, table)


def test_uint8_and_uint16_codes_are_the_same_table():
    codes, tag_counts, scores = paper_table(300, 8, seed=1)
    wide = codes.astype(np.uint16)
    codes[::7, 2], wide[::7, 2] = 255, 65535
    wide[3, 1], codes[3, 1] = 256 + 0, 200  # above every tag count, though its low byte is a tag
    one = enumerate_slices(codes, tag_counts, scores, min_count=3, max_depth=3)
    other = enumerate_slices(wide, tag_counts, scores, min_count=3, max_depth=3)
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.count, other.count)


def test_shapes_and_dtypes():
    codes, tag_counts, scores = paper_table(200, 3)
    slices = enumerate_slices(codes, tag_counts, np.repeat(scores, 2, axis=1), min_count=5, max_depth=6)
    assert slices.items.shape == (len(slices), 6)
    assert (slices.items[:, 3:] == -1).all()
    assert (slices.items.dtype, slices.count.dtype) == (np.int16, np.int32)
    assert (slices.scored.dtype, slices.total.dtype) == (np.int32, np.float64)
    assert slices.scored.shape == slices.total.shape == (len(slices), 2)
    bare = enumerate_slices(codes, tag_counts, None, min_count=5, max_depth=6)
    assert bare.scored.shape == bare.total.shape == (len(slices), 0)


class TestEstimate:
    @given(any_scores | correctness)
    @settings(max_examples=40, deadline=None)
    def test_is_exact_when_all_combinations_are_counted(self, table):
        estimate = estimate_slices(
            table.codes, table.tag_counts, min_count=table.min_count, max_depth=table.max_depth, seed=1
        )
        assert round(estimate, 6) == len(enumerate_table(table))

    def test_is_exact_on_sparse_joint_tables(self):
        rng = np.random.default_rng(5)
        codes, tag_counts = rng.integers(0, 1000, (500, 4)).astype(np.uint16) // 3, np.full(4, 1000)
        codes[:, 3] = codes[:, 0]
        estimate = estimate_slices(codes, tag_counts, min_count=2, max_depth=4, seed=0)
        assert round(estimate, 6) == len(enumerate_slices(codes, tag_counts, None, min_count=2, max_depth=4))

    def test_a_sample_comes_close(self):
        codes, tag_counts, _ = paper_table(2_000, 24)
        truth = len(enumerate_slices(codes, tag_counts, None, min_count=10, max_depth=3))
        for seed in range(3):
            estimate = estimate_slices(codes, tag_counts, min_count=10, max_depth=3, seed=seed)
            assert 0.8 * truth < estimate < 1.25 * truth
            assert estimate == estimate_slices(codes, tag_counts, min_count=10, max_depth=3, seed=seed)


class TestLimits:
    codes, tag_counts, scores = paper_table(1_000, 12)

    def run(self, **options):
        return enumerate_slices(self.codes, self.tag_counts, self.scores, min_count=5, max_depth=3, **options)

    def test_as_many_as_allowed_pass_and_one_fewer_does_not(self):
        found = len(self.run())
        assert len(self.run(max_slices=found)) == found
        with pytest.raises(TooLarge, match="raise min_count or lower max_depth") as caught:
            self.run(max_slices=found - 1)
        assert caught.value.metadata == {"estimate": str(found), "limit": str(found - 1)}

    def test_a_low_estimate_does_not_let_more_through(self, monkeypatch):
        monkeypatch.setattr(lattice, "_estimate", lambda *_: 1.0)
        for limit in (3, 200, len(self.run()) - 1):
            with pytest.raises(TooLarge) as caught:
                self.run(max_slices=limit)
            assert int(caught.value.metadata["estimate"]) > limit

    def test_cancelling_stops_the_work_at_any_moment(self, monkeypatch):
        monkeypatch.setattr(lattice, "_REPORT_SECONDS", 0.0)
        monkeypatch.setattr(lattice, "_CHUNK_WORDS", 1 << 12)
        asked = 0

        def count() -> bool:
            nonlocal asked
            asked += 1
            return False

        self.run(cancelled=count)
        assert asked > 20
        for stop in (1, 2, asked // 2, asked):
            left = iter([False] * (stop - 1) + [True])
            with pytest.raises(Cancelled):
                self.run(cancelled=lambda left=left: next(left))

    def test_progress_rises_to_its_total(self, monkeypatch):
        monkeypatch.setattr(lattice, "_REPORT_SECONDS", 0.0)
        seen = []
        self.run(on_progress=lambda done, total: seen.append((done, total)))
        assert len(seen) > 3
        assert all(0 <= done <= total for done, total in seen)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1]


class TestRefusals:
    codes, tag_counts, scores = paper_table(50, 3)

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"min_count": 0}, "min_count"),
            ({"max_depth": 0}, "max_depth"),
            ({"codes": np.zeros((50, 3), dtype=np.int64)}, "codes"),
            ({"codes": np.zeros(50, dtype=np.uint8)}, "codes"),
            ({"tag_counts": [2, 2]}, "tag_counts"),
            ({"scores": np.full((50, 1), 1.5)}, "scores"),
            ({"scores": np.full((50, 1), -0.1)}, "scores"),
            ({"scores": np.zeros((49, 1))}, "scores"),
            ({"scores": np.zeros(50)}, "scores"),
        ],
    )
    def test_enumerate_names_the_field(self, change, field):
        given_ = {"codes": self.codes, "tag_counts": self.tag_counts, "scores": self.scores}
        with pytest.raises(InvalidInput) as caught:
            enumerate_slices(**{**given_, "min_count": 5, "max_depth": 2, **change})
        assert [v.field for v in caught.value.violations] == [field]

    @pytest.mark.parametrize("items", [[[0, 99]], [[-2, 0]], [[3, 1]], [[-1, 2]], [[1, 1]], [0, 1], [[0.0, 1.0]]])
    def test_items_that_are_no_slice(self, items):
        with pytest.raises(InvalidInput, match="items"):
            score_slices(self.codes, self.tag_counts, np.array(items), self.scores)

    @pytest.mark.parametrize(
        ("request_", "fields"),
        [
            ((10, 3, 1, 3, 0.0), []),
            ((10, 3, 1, 1, 1.0), []),
            ((10, 3, 11, 1, 0.2), []),  # M above N finds nothing, which is an answer
            ((0, 3, 10, 3, 0.2), ["instances"]),
            ((10, 0, 10, 3, 0.2), ["attributes"]),
            ((10, 3, 0, 3, 0.2), ["min_count"]),
            ((10, 3, 10, 0, 0.2), ["max_depth"]),
            ((10, 3, 10, 4, 0.2), ["max_depth"]),
            ((10, 3, 10, 3, -0.1), ["margin"]),
            ((10, 3, 10, 3, 1.1), ["margin"]),
            ((10, 3, 10, 3, float("nan")), ["margin"]),
            ((10, 3, -1, 9, 2.0), ["min_count", "max_depth", "margin"]),
        ],
    )
    def test_check_request(self, request_, fields):
        if not fields:
            check_request(*request_)
            return
        with pytest.raises(InvalidInput) as caught:
            check_request(*request_)
        assert [v.field for v in caught.value.violations] == fields
