"""Times the enumeration against the paper's baselines and writes the figures to docs/results.md.

    python -m tests.load.bench_enumeration

The naive method and the tree without pruning take too long to run whole, so a seeded sample of their work is timed
and scaled; every slice that a sample yields must be among ours with the same count and sum.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np

from services.enumeration.lattice import Slices, enumerate_slices, item_offsets, score_slices
from tests.load.shapes import paper_table
from tests.unit.enumeration.references import Found, children, search

RESULTS = Path(__file__).parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- enumeration: begin -->", "<!-- enumeration: end -->"
ROUNDS = 5
MIN_COUNT, MAX_DEPTH = 10, 3
NAIVE_SAMPLE, TREE_SAMPLE = 100, 400


def main() -> None:
    codes, tag_counts, scores = paper_table()
    n_rows, n_attributes = codes.shape
    seconds: dict[str, list[float]] = {}
    ours = enumerate_slices(codes, tag_counts, scores, min_count=MIN_COUNT, max_depth=MAX_DEPTH)
    known = _by_pairs(ours, tag_counts)
    real = np.random.default_rng(1).random((n_rows, 1))
    checked = 0
    for seed in range(ROUNDS):
        for name, baseline in (("naive (Algorithm 1)", _naive), ("tree, no pruning (Algorithm 2)", _tree)):
            elapsed, found, expected = baseline(codes, tag_counts, scores, known, np.random.default_rng(seed))
            seconds.setdefault(name, []).append(elapsed)
            if len(found) != expected:
                raise SystemExit(f"{name} yields {len(found)} slices where ours has {expected}")
            for pairs, (rows, total) in found.items():
                if known.get(pairs) != (len(rows), total):
                    raise SystemExit(
                        f"{name} finds {pairs} with {len(rows)} rows, sum {total}; ours {known.get(pairs)}"
                    )
            checked += len(found)
        _timed(
            seconds,
            "ours",
            lambda: enumerate_slices(codes, tag_counts, scores, min_count=MIN_COUNT, max_depth=MAX_DEPTH),
        )
        _timed(
            seconds,
            "ours, counts only",
            lambda: enumerate_slices(codes, tag_counts, None, min_count=MIN_COUNT, max_depth=MAX_DEPTH),
        )
        _timed(
            seconds,
            "another model on known slices, 0/1 scores",
            lambda: score_slices(codes, tag_counts, ours.items, scores),
        )
        _timed(
            seconds,
            "another model on known slices, real scores",
            lambda: score_slices(codes, tag_counts, ours.items, real),
        )

    median = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        "## Enumeration",
        "",
        f"{n_rows:,} instances, {n_attributes} attributes of 2 to 6 tags ({int(np.sum(tag_counts))} in all), "
        f"min_count {MIN_COUNT}, max_depth {MAX_DEPTH}: {len(ours):,} slices. One process, one 0/1 score column, "
        f"medians of {ROUNDS} alternating rounds; Python {platform.python_version()}, numpy {np.__version__}, "
        f"{os.cpu_count()} cores ({_processor()}).",
        "",
        "| what | seconds | times ours |",
        "|---|---:|---:|",
        *(f"| {name} | {value:,.2f} | {value / median['ours']:,.1f} |" for name, value in median.items()),
        "",
        f"Algorithms 1 and 2 are scaled from samples (of {NAIVE_SAMPLE} attribute combinations a depth, and of the "
        f"children of {TREE_SAMPLE} two-pair slices), counts and sums included; the {checked:,} slices they yielded "
        "have our counts and sums.",
    ]
    _write("\n".join(lines))
    print("\n".join(lines))


Known = dict[tuple[tuple[int, int], ...], tuple[int, float]]
Summed = dict[tuple[tuple[int, int], ...], tuple[np.ndarray, float]]


def _by_pairs(slices: Slices, tag_counts: np.ndarray) -> Known:
    offsets = item_offsets(tag_counts)
    attribute = np.repeat(np.arange(len(tag_counts)), tag_counts).tolist()
    pair = [(a, i - int(offsets[a])) for i, a in enumerate(attribute)]
    lines = zip(slices.items.tolist(), slices.count.tolist(), slices.total[:, 0].tolist(), strict=True)
    return {tuple(pair[i] for i in items if i >= 0): (count, total) for items, count, total in lines}


def _summed(found: Found, scores: np.ndarray) -> Summed:
    return {pairs: (rows, float(scores[rows, 0].sum())) for pairs, rows in found.items()}


def _naive(
    codes: np.ndarray, tag_counts: np.ndarray, scores: np.ndarray, known: Known, rng: np.random.Generator
) -> tuple[float, Summed, int]:
    """Scaled seconds of Algorithm 1, the slices of its sample, and how many ours has there."""
    seconds, found, chosen = 0.0, {}, set()
    for depth in range(1, MAX_DEPTH + 1):
        every = list(combinations(range(codes.shape[1]), depth))
        sample = [every[i] for i in rng.permutation(len(every))[:NAIVE_SAMPLE]]
        chosen.update(sample)
        start = time.perf_counter()
        for attributes in sample:
            found.update(_summed(search(codes, tag_counts, attributes, MIN_COUNT), scores))
        seconds += (time.perf_counter() - start) * comb(codes.shape[1], depth) / len(sample)
    return seconds, found, sum(tuple(a for a, _ in pairs) in chosen for pairs in known)


def _tree(
    codes: np.ndarray, tag_counts: np.ndarray, scores: np.ndarray, known: Known, rng: np.random.Generator
) -> tuple[float, Summed, int]:
    """Scaled seconds of Algorithm 2, the slices of its sample, and how many ours has there."""
    start = time.perf_counter()
    found: Summed = {}
    layer: Found = {(): np.arange(len(codes))}
    for _ in range(MAX_DEPTH - 1):
        layer = {
            s: rows
            for parent, of_parent in layer.items()
            for s, rows in children(codes, tag_counts, parent, of_parent).items()
        }
        found.update(_summed({s: rows for s, rows in layer.items() if len(rows) >= MIN_COUNT}, scores))
    seconds = time.perf_counter() - start
    parents = list(layer)
    sample = [parents[i] for i in rng.permutation(len(parents))[:TREE_SAMPLE]]
    start = time.perf_counter()
    for parent in sample:
        last = children(codes, tag_counts, parent, layer[parent])
        found.update(_summed({s: rows for s, rows in last.items() if len(rows) >= MIN_COUNT}, scores))
    seconds += (time.perf_counter() - start) * len(parents) / len(sample)
    chosen = set(sample)
    return seconds, found, sum(len(pairs) < MAX_DEPTH or pairs[:-1] in chosen for pairs in known)


def _timed(seconds: dict[str, list[float]], name: str, work: Callable[[], object]) -> None:
    start = time.perf_counter()
    work()
    seconds.setdefault(name, []).append(time.perf_counter() - start)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


def _write(section: str) -> None:
    """Put `section` between its markers, or at the end of the page where it has none yet."""
    page = RESULTS.read_text() if RESULTS.exists() else "# Measured results\n"
    block = f"{BEGIN}\n{section}\n{END}"
    if BEGIN in page and END in page:
        before, rest = page.split(BEGIN, 1)
        page = before + block + rest.split(END, 1)[1]
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(page)


if __name__ == "__main__":
    main()
