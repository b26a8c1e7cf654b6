"""Planting faults and scoring how well a list of slices finds them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.load.planted import Listed, Planted, plant, recovery
from tests.load.shapes import paper_table


def _plant(**changed: float) -> Planted:
    codes, tag_counts, _ = paper_table(5_000, 20)
    settings = {"conjunctions": 2, "tags": 2, "base_error": 0.2, "raised_by": 0.4, "noise": 0.0} | changed
    return plant(codes, tag_counts, np.random.default_rng(3), **settings)


@pytest.mark.parametrize(("conjunctions", "tags"), [(1, 1), (3, 1), (2, 2), (3, 3)])
def test_the_error_rate_is_raised_where_a_conjunction_holds(conjunctions: int, tags: int) -> None:
    planted = _plant(conjunctions=conjunctions, tags=tags)
    assert planted.member.shape == (5_000, conjunctions)
    assert [len(items) for items in planted.conjunctions] == [tags] * conjunctions
    held = planted.member.any(axis=1)
    np.testing.assert_allclose(planted.risk, np.where(held, 0.6, 0.2))
    assert abs((1 - planted.scores[held]).mean() - 0.6) < 0.15
    assert abs((1 - planted.scores[~held]).mean() - 0.2) < 0.03


def test_noise_changes_that_part_of_the_tags_and_keeps_them_valid() -> None:
    codes, tag_counts, _ = paper_table(5_000, 20)
    planted = _plant(noise=0.2)
    assert abs((planted.codes != codes).mean() - 0.2) < 0.01
    assert (planted.codes < tag_counts).all()


def test_a_list_of_the_faults_themselves_is_a_full_recovery() -> None:
    planted = _plant()
    size = planted.member.sum(axis=0)
    shared = planted.member.T.astype(int) @ planted.member
    found = recovery(Listed(size, shared, np.full(2, 0.6)), planted)
    assert (found.exact, found.near, found.near_in_10, found.first_hit, found.false_share) == (1.0, 1.0, 1.0, 1, 0.0)


def test_near_needs_four_fifths_and_rank_counts_from_one() -> None:
    planted = _plant(conjunctions=1)
    size = int(planted.member.sum())
    too_wide, near = -(-size * 10 // 7), size * 10 // 9
    listed = Listed(np.array([too_wide, near]), np.array([[size], [size]]), np.array([0.2, 0.5]))
    found = recovery(listed, planted)
    assert (found.exact, found.near, found.first_hit, found.false_share) == (0.0, 1.0, 2, 0.5)


def test_a_hit_after_the_tenth_is_no_hit_in_ten() -> None:
    planted = _plant(conjunctions=1)
    size = int(planted.member.sum())
    shared = np.array([[0]] * 10 + [[size]])
    found = recovery(Listed(np.full(11, size), shared, np.full(11, 0.6)), planted)
    assert (found.near, found.near_in_10, found.first_hit) == (1.0, 0.0, 11)


def test_an_empty_list_finds_nothing_and_claims_nothing_false() -> None:
    planted = _plant()
    empty = Listed(np.zeros(0, dtype=int), np.zeros((0, 2), dtype=int), np.zeros(0))
    found = recovery(empty, planted)
    assert (found.listed, found.near, found.first_hit, found.false_share) == (0, 0.0, None, 0.0)


def test_faults_that_cannot_be_planted_are_said_so() -> None:
    codes, tag_counts, _ = paper_table(100, 2)
    with pytest.raises(ValueError, match="conjunctions of 2 tags"):
        plant(
            codes, tag_counts, np.random.default_rng(0), conjunctions=2, tags=2, base_error=0.2, raised_by=0.2, noise=0
        )
