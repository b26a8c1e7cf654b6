from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from services.attribute.comparison import choose_pairs
from services.attribute.difficulty import confusable_pairs


@st.composite
def instances(draw: st.DrawFn) -> tuple[list[str], np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 40))
    labels = draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    values = draw(arrays.arrays(float, (n, draw(st.integers(0, 3))), elements=st.floats(allow_nan=True, width=64)))
    scores = draw(arrays.arrays(float, n, elements=st.sampled_from([0.0, 0.3, 1.0, np.nan])))
    return labels, values, scores


@settings(deadline=None)
@given(instances(), st.integers(1, 30), st.integers(0, 9))
def test_pairs_are_of_one_class_contrast_and_take_turns(given_, count, seed):
    labels, values, scores = given_
    pairs = choose_pairs(labels, values, scores, count, seed)
    assert pairs.shape == (len(pairs), 2)
    assert len(set(pairs.ravel().tolist())) == pairs.size  # no instance twice
    assert all(labels[a] == labels[b] for a, b in pairs)
    halves = {label: n // 2 for label, n in Counter(labels).items()}
    assert len(pairs) == min(count, sum(halves.values()))
    by_class = Counter(labels[a] for a, _ in pairs)
    most = max(by_class.values(), default=0)
    assert all(by_class[label] >= min(half, most - 1) for label, half in halves.items())
    # As many as there can be are of one that does worse than its class with one that does better.
    for label in by_class:
        known = [s for s, name in zip(scores, labels, strict=True) if name == label and np.isfinite(s)]
        mean = np.mean(known) if known else 0.0
        possible = min(sum(s < mean for s in known), sum(s > mean for s in known), by_class[label])
        contrasting = sum(scores[a] < mean < scores[b] for a, b in pairs if labels[a] == label)
        assert contrasting >= possible
    assert choose_pairs(labels, values, scores, count, seed).tolist() == pairs.tolist()


def test_without_scores_pairs_are_far_apart_in_what_was_measured():
    rng = np.random.default_rng(0)
    small, large = rng.normal(0, 1, (20, 2)), rng.normal(50, 1, (20, 2))
    values = np.vstack([small, large]) * [1, 1e6]  # no measure outweighs another by its unit
    pairs = choose_pairs(["a"] * 40, values, np.full(40, np.nan), 20, 1)
    assert len(pairs) == 20
    assert all((a < 20) != (b < 20) for a, b in pairs)


def test_nothing_that_is_unknown_makes_a_difference():
    values = np.array([[0.0, np.nan], [0.1, 5.0], [9.0, np.nan], [0.0, np.inf]])
    pairs = choose_pairs(["a"] * 4, values, np.full(4, np.nan), 1, 0)
    assert 2 in pairs[0]


cells = st.sampled_from(["bear", "cat", "dog", None, ""])


@given(st.lists(st.tuples(cells, cells), max_size=40), st.integers(1, 5))
def test_confusable_pairs_are_the_largest_off_the_diagonal(rows, count):
    found = confusable_pairs([label for label, _ in rows], [said for _, said in rows], count)
    times = Counter((label, said) for label, said in rows if label and said and label != said)
    assert len(found) == min(count, len(times))
    assert len(set(found)) == len(found)
    assert [times[pair] for pair in found] == sorted(times.values(), reverse=True)[: len(found)]
