"""The methods that our slices are compared with list what they should."""

from __future__ import annotations

import numpy as np
import pytest

from services.enumeration.engine import enumerate_slices
from tests.load.bench_slices import DIVEXPLORER_T, _methods, _tree_nodes, divexplorer_slices
from tests.load.planted import Planted, plant, recovery
from tests.load.shapes import paper_table


def _planted(rows: int = 3_000, attributes: int = 10) -> tuple[Planted, np.ndarray]:
    codes, tag_counts, _ = paper_table(rows, attributes, seed=5)
    rng = np.random.default_rng(1)
    return plant(codes, tag_counts, rng, conjunctions=1, tags=2, base_error=0.2, raised_by=0.6, noise=0.0), tag_counts


def test_divexplorer_is_ranked_as_it_ranks_itself() -> None:
    """With three attributes its own mining ends, and its limit on the depth, which it lacks, makes no difference."""
    pandas = pytest.importorskip("pandas")
    explorer = pytest.importorskip("divexplorer.divexplorer")
    codes, tag_counts, scores = paper_table(600, 3, seed=2)
    slices = enumerate_slices(codes, tag_counts, scores, min_count=10, max_depth=3)
    index, t = divexplorer_slices(slices, scores[:, 0])

    frame = pandas.DataFrame({f"a{a}": column for a, column in enumerate(codes.T)})
    frame["wrong"] = 1 - scores[:, 0].astype(int)
    own = explorer.DivergenceExplorer(frame).get_pattern_divergence(
        min_support=9.5 / 600, boolean_outcomes=["wrong"], attributes=["a0", "a1", "a2"]
    )
    own = own[(own["wrong_div"] > 0) & (own["wrong_t"] >= DIVEXPLORER_T)]
    attribute = np.repeat(np.arange(3), tag_counts)
    first = np.concatenate(([0], np.cumsum(tag_counts)))[attribute]
    named = [frozenset(f"a{attribute[i]}={i - first[i]}" for i in items[items >= 0]) for items in slices.items[index]]
    theirs = dict(zip(own["itemset"], own["wrong_t"], strict=True))
    assert len(named) == len(theirs) > 0
    np.testing.assert_allclose(t, [theirs[name] for name in named], rtol=1e-9)


def test_every_method_lists_and_a_strong_fault_is_found() -> None:
    pytest.importorskip("divexplorer")
    planted, tag_counts = _planted()
    found = {name: recovery(listed, planted) for name, listed in _methods(planted, tag_counts, seed=0)}
    by_p = next(r for name, r in found.items() if name.endswith("by p-value"))
    assert by_p.exact == 1.0
    assert by_p.first_hit == 1
    assert found["random slices"].near_in_10 == 0.0


def test_nodes_of_the_tree_fail_more_than_all_and_come_worst_first() -> None:
    planted, tag_counts = _planted()
    listed = _tree_nodes(planted, tag_counts)
    assert (listed.count >= 10).all()
    assert (listed.shared <= np.minimum(listed.count[:, None], planted.member.sum(axis=0))).all()
    assert recovery(listed, planted).first_hit is not None
