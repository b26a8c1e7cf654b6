from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.enumeration import families as module
from services.enumeration.error_slices import find_error_slices
from services.enumeration.families import extents_of, families, greedy_cover, tag_blame
from services.enumeration.lattice import enumerate_slices
from shared.errors import TooLarge
from tests.load.shapes import paper_table
from tests.unit.enumeration.references import slice_rows
from tests.unit.enumeration.tables import tables

correctness = tables(values=(0.0, 1.0), max_rows=80)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=[3, 256])
def blocks(request, monkeypatch):
    """A few slices at a time, and the usual number."""
    monkeypatch.setattr(module, "_BLOCK", request.param)
    monkeypatch.setattr(module, "_CHUNK_WORDS", request.param)


def enumerated(table):
    return enumerate_slices(
        table.codes, table.tag_counts, table.scores, min_count=table.min_count, max_depth=min(table.max_depth, 3)
    )


def shuffled_slices(table, seed, at_most=60):
    """Some slices of the table in an arbitrary rank order."""
    slices = enumerated(table)
    order = np.random.default_rng(seed).permutation(len(slices))[:at_most]
    return slices.items[order]


def sets_of(table, items):
    return [set(slice_rows(table.codes, table.tag_counts, row).tolist()) for row in items]


def naive_families(sets, items, similarity):
    """By the definition: the clearest first, each to the first representative that is near enough."""
    pairs = [int((row >= 0).sum()) for row in items]
    order = sorted(range(len(sets)), key=lambda e: (pairs[e], -len(sets[e]), e))
    representative, alike, leaders = list(range(len(sets))), [1.0] * len(sets), []
    for e in order:
        for leader in leaders:
            jaccard = len(sets[e] & sets[leader]) / len(sets[e] | sets[leader])
            if jaccard >= similarity:
                representative[e], alike[e] = leader, jaccard
                break
        else:
            leaders.append(e)
    return representative, alike


@given(table=correctness, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_extents_are_the_rows(table, seed):
    items = shuffled_slices(table, seed)
    extents = extents_of(table.codes, table.tag_counts, items)
    assert len(extents) == len(items)
    for e, rows in enumerate(sets_of(table, items)):
        assert extents.of(e).tolist() == sorted(rows)
    if len(items):
        some = np.random.default_rng(seed).integers(0, len(items), 5)
        again = extents_of(table.codes, table.tag_counts, items[some])
        for name in ("words", "rows", "starts", "n_rows"):
            np.testing.assert_array_equal(getattr(extents.at(some), name), getattr(again, name))


@pytest.mark.usefixtures("blocks")
@given(table=correctness, seed=seeds, similarity=st.sampled_from((0.3, 0.5, 0.8, 1.0)))
@settings(max_examples=80, deadline=None)
def test_families_are_those_of_the_definition(table, seed, similarity):
    items = shuffled_slices(table, seed)
    found = families(extents_of(table.codes, table.tag_counts, items), items, similarity=similarity)
    representative, alike = naive_families(sets_of(table, items), items, similarity)
    assert found.representative.tolist() == representative
    np.testing.assert_allclose(found.similarity, alike, rtol=1e-12)
    firsts = {r: min(e for e, x in enumerate(representative) if x == r) for r in set(representative)}
    assert found.leaders.tolist() == sorted(firsts, key=firsts.get)


@given(table=correctness, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_equal_extents_are_one_family(table, seed):
    table_twice = np.column_stack((table.codes, table.codes))
    tag_counts = np.concatenate((table.tag_counts, table.tag_counts))
    slices = enumerate_slices(table_twice, tag_counts, None, min_count=2, max_depth=2)
    items = slices.items[np.random.default_rng(seed).permutation(len(slices))[:80]]
    extents = extents_of(table_twice, tag_counts, items)
    found = families(extents, items)
    by_extent = {}
    for e in range(len(items)):
        by_extent.setdefault(extents.words[e].tobytes(), set()).add(int(found.representative[e]))
    assert all(len(representatives) == 1 for representatives in by_extent.values())


def test_many_extents_of_every_size_and_nearness():
    """Larger sets than hypothesis makes: near-copies around a few sets, some at the very threshold."""
    rng = np.random.default_rng(0)
    n_rows = 1_000
    codes = np.zeros((n_rows, 120), dtype=np.uint8)
    for a in range(120):
        if a % 4 == 0:
            base = rng.random(n_rows) < rng.uniform(0.02, 0.6)
        codes[:, a] = base ^ (rng.random(n_rows) < rng.choice([0.0, 0.02, 0.1]))
    codes[:, 0], codes[:, 1] = np.arange(n_rows) < 100, np.arange(n_rows) < 80  # 80 of 100: exactly 0.8
    tag_counts = np.full(120, 2)
    items = (2 * rng.permutation(120)[:, None] + 1).astype(np.int32)
    extents = extents_of(codes, tag_counts, items)
    found = families(extents, items)
    sets = [set(extents.of(e).tolist()) for e in range(len(extents))]
    assert found.representative.tolist() == naive_families(sets, items, 0.8)[0]
    place = {int(item): e for e, (item,) in enumerate(items)}
    assert found.representative[place[3]] == place[1]
    assert 20 < len(found.leaders) < 100


def test_what_would_not_fit_is_refused(monkeypatch):
    codes, tag_counts, _ = paper_table(500, 4)
    items = enumerate_slices(codes, tag_counts, None, min_count=5, max_depth=2).items
    size = 8 * 8 * len(items) + 4 * len(extents_of(codes, tag_counts, items).rows)
    monkeypatch.setattr(module, "MAX_BYTES", size)
    extents_of(codes, tag_counts, items)
    monkeypatch.setattr(module, "MAX_BYTES", size - 1)
    with pytest.raises(TooLarge, match="give fewer slices"):
        extents_of(codes, tag_counts, items)


def test_no_slices_no_families():
    items = np.zeros((0, 3), dtype=np.int32)
    extents = extents_of(np.zeros((5, 2), dtype=np.uint8), [2, 2], items)
    assert families(extents, items).leaders.tolist() == []
    cover = greedy_cover(extents, np.zeros(5))
    assert (cover.order.tolist(), cover.share.tolist()) == ([], [])


@given(table=tables(values=(0.0, 0.25, 1.0), max_rows=80), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_each_step_of_the_cover_takes_the_most_that_is_left(table, seed):
    items = shuffled_slices(table, seed)
    scores = table.scores[:, 0]
    loss = np.nan_to_num(1 - scores, nan=0.0)
    cover = greedy_cover(extents_of(table.codes, table.tag_counts, items), scores)
    sets, left, held = sets_of(table, items), loss.copy(), 0.0
    for chosen, share in zip(cover.order, cover.share, strict=True):
        gains = [left[list(rows)].sum() for rows in sets]
        assert chosen == int(np.argmax(gains))
        left[list(sets[chosen])] = 0
        held += gains[chosen] / loss.sum()
        assert share == pytest.approx(held)
    assert max((left[list(rows)].sum() for rows in sets), default=0.0) < 1e-9
    assert max(cover.share, default=0.0) <= 1 + 1e-9


@given(tables())
@settings(max_examples=40, deadline=None)
def test_blame_is_the_mean_over_all_orders_of_adding_pairs(table):
    slices = enumerated(table)
    scores = table.scores[:, 0]
    if np.isnan(scores).all():
        return
    overall = float(np.nanmean(scores))
    index = np.flatnonzero(slices.scored[:, 0] > 0)[-40:]
    blame = tag_blame(slices, 0, overall, index)
    for line, position in enumerate(index):
        items = [int(i) for i in slices.items[position] if i >= 0]
        expected = np.zeros(slices.items.shape[1])
        orders = list(permutations(range(len(items))))
        for order in orders:
            before = overall
            for step in range(1, len(order) + 1):
                rows = slice_rows(table.codes, table.tag_counts, [items[i] for i in order[:step]])
                after = float(np.nanmean(scores[rows]))
                expected[order[step - 1]] += (before - after) / len(orders)
                before = after
        np.testing.assert_allclose(blame[line], expected, atol=1e-8)
        mean = slices.total[position, 0] / slices.scored[position, 0]
        assert blame[line].sum() == pytest.approx(overall - mean, abs=1e-12)


def test_blame_falls_on_the_tag_that_does_it():
    codes, tag_counts, _ = paper_table(4_000, 8)
    rng = np.random.default_rng(0)
    scores = (rng.random(4_000) < np.where(codes[:, 2] == 0, 0.3, 0.95)).astype(float)[:, None]
    slices = enumerate_slices(codes, tag_counts, scores, min_count=50, max_depth=6)
    guilty = int(tag_counts[:2].sum())
    index = find_error_slices(slices, 0, float(scores.mean()), 1.0, margin=0.2).index
    blame = tag_blame(slices, 0, float(scores.mean()), index)
    holds = (slices.items[index] == guilty).any(axis=1)
    assert holds.sum() > 5
    assert (slices.items[index][holds, blame[holds].argmax(axis=1)] == guilty).mean() > 0.95
