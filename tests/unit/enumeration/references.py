"""The paper's Algorithms 1, 2 and 3 (A.7) and its error slice rule, written to be read, not to be fast.

A slice is a tuple of (attribute, tag) pairs by attribute; each function returns {slice: rows that match}.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np

Pair = tuple[int, int]
Found = dict[tuple[Pair, ...], np.ndarray]


def search(codes: np.ndarray, tag_counts: Any, attributes: tuple[int, ...], min_count: int) -> Found:
    """The step of Algorithm 1: every combination of tags of `attributes`, each looked for in the whole table."""
    found: Found = {}
    for tags in product(*(range(int(tag_counts[a])) for a in attributes)):
        member = np.ones(len(codes), dtype=bool)
        for a, t in zip(attributes, tags, strict=True):
            member &= codes[:, a] == t
        rows = np.flatnonzero(member)
        if len(rows) >= min_count:
            found[tuple(zip(attributes, tags, strict=True))] = rows
    return found


def algorithm_1(codes: np.ndarray, tag_counts: Any, min_count: int, max_depth: int) -> Found:
    """Naive: list every combination of tags and search the whole table for each."""
    found: Found = {}
    for depth in range(1, min(max_depth, codes.shape[1]) + 1):
        for attributes in combinations(range(codes.shape[1]), depth):
            found.update(search(codes, tag_counts, attributes, min_count))
    return found


def children(codes: np.ndarray, tag_counts: Any, parent: tuple[Pair, ...], rows: np.ndarray) -> Found:
    """The step of Algorithm 2: `parent` with one pair of a later attribute more, searched among its `rows` only."""
    layer: Found = {}
    for a in range(parent[-1][0] + 1 if parent else 0, codes.shape[1]):
        for t in range(int(tag_counts[a])):
            layer[(*parent, (a, t))] = rows[codes[rows, a] == t]
    return layer


def algorithm_2(codes: np.ndarray, tag_counts: Any, min_count: int, max_depth: int) -> Found:
    """Tree: a child searches its parent's rows only; small slices are dropped at the end."""
    layers: list[Found] = [{(): np.arange(len(codes))}]
    for _ in range(max_depth):
        layers.append({})
        for parent, rows in layers[-2].items():
            layers[-1].update(children(codes, tag_counts, parent, rows))
    return {s: rows for layer in layers[1:] for s, rows in layer.items() if len(rows) >= min_count}


def algorithm_3(codes: np.ndarray, tag_counts: Any, min_count: int, max_depth: int) -> Found:
    """Tree with pruning, children made by joining surviving slices that share all but their last pair."""
    layer: Found = {}
    for a in range(codes.shape[1]):
        for t in range(int(tag_counts[a])):
            rows = np.flatnonzero(codes[:, a] == t)
            if len(rows) >= min_count:
                layer[((a, t),)] = rows
    found = dict(layer)
    for _ in range(1, max_depth):
        families: dict[tuple[Pair, ...], list[Pair]] = {}
        for s in layer:
            families.setdefault(s[:-1], []).append(s[-1])
        joined: Found = {}
        for head, lasts in families.items():
            for left, right in combinations(lasts, 2):
                if left[0] != right[0]:
                    rows = layer[(*head, left)]
                    rows = rows[codes[rows, right[0]] == right[1]]
                    if len(rows) >= min_count:
                        joined[(*head, left, right)] = rows
        layer = joined
        found.update(layer)
    return found


def slice_rows(codes: np.ndarray, tag_counts: Any, items: Any) -> np.ndarray:
    """The rows that hold every one of `items`, offset of the attribute + tag; -1 is padding."""
    offsets = np.cumsum([0, *tag_counts])
    member = np.ones(len(codes), dtype=bool)
    for item in items:
        if item >= 0:
            attribute = int(np.searchsorted(offsets, item, side="right")) - 1
            member &= codes[:, attribute] == item - offsets[attribute]
    return np.flatnonzero(member)


def sums(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scored rows and sum of scores of each column over `rows`."""
    inside = scores[rows]
    return (~np.isnan(inside)).sum(axis=0), np.nansum(inside, axis=0)


def error_slices(found: Found, scores: np.ndarray, margin: float) -> list[tuple[Pair, ...]]:
    """The paper's rule for one column of scores (N,), worst first."""

    def mean(rows: np.ndarray) -> float:
        inside = scores[rows][~np.isnan(scores[rows])]
        return inside.sum() / len(inside) if len(inside) else np.nan

    overall = mean(np.arange(len(scores)))
    means = {s: mean(rows) for s, rows in found.items()}
    bad = []
    for s in found:
        parents = [means[s[:i] + s[i + 1 :]] if len(s) > 1 else overall for i in range(len(s))]
        if means[s] < overall - margin and all(means[s] < p for p in parents):
            bad.append(s)
    return sorted(bad, key=lambda s: (means[s], -len(found[s]), len(s), s))
