"""Whether found slices are to be believed: shuffled scores and planted faults; writes to docs/results.md.

    python -m tests.load.bench_slices [--quick]

--quick takes small tables and few seeds, and prints the page instead of writing it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.enumeration.engine import enumerate_slices
from services.enumeration.error_slices import find_error_slices
from services.enumeration.families import extents_of, families
from services.enumeration.lattice import Slices
from services.enumeration.statistics import permuted_scores, slice_significance
from tests.load.page import made_by, table, write_section
from tests.load.planted import Listed, Planted, Recovery, plant, recovery
from tests.load.shapes import paper_table

MIN_COUNT, MAX_DEPTH, MARGIN, LEVEL = 10, 3, 0.2, 0.05
SMALL_MARGIN = 0.05
BASE_ERROR = 0.2
TREE_DEPTH = 6
DIVEXPLORER_T = 2.0
COLUMNS_AT_ONCE = 10
NO_LIMIT = 10**9
RECOVERY_COLUMNS = (
    "method",
    "listed (median)",
    "exactly",
    "nearly",
    "in the first 10",
    "first hit at",
    "tables with a hit",
    "false",
)


@dataclass(frozen=True)
class Plan:
    null_rows: int
    null_attributes: int
    null_seeds: int
    attributes: int
    rows: tuple[int, ...]
    conjunctions: tuple[int, ...]
    tags: tuple[int, ...]
    raised_by: tuple[float, ...]
    noise: tuple[float, ...]
    seeds: int


FULL = Plan(7_057, 47, 200, 20, (2_000, 10_000, 50_000), (1, 2, 3), (1, 2, 3), (0.1, 0.2, 0.4), (0, 0.05, 0.1, 0.2), 3)
QUICK = Plan(1_000, 12, 20, 14, (2_000,), (2,), (2,), (0.2, 0.4), (0, 0.1), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tables and few seeds, printed and not written")
    quick = parser.parse_args().quick
    plan = QUICK if quick else FULL
    head = "## Slices worth believing"
    made = made_by("make bench-slices", ("numpy", "scipy", "scikit-learn", "DivExplorer"))
    text = "\n\n".join([head, made, *_null_part(plan), *_planted_part(plan)])
    print(text)
    if not quick:
        write_section("slices", text)


def _null_part(plan: Plan) -> list[str]:
    codes, tag_counts, scores = paper_table(plan.null_rows, plan.null_attributes)
    shuffled = permuted_scores(scores[:, 0], plan.null_seeds, seed=1)
    overall, loss = float(scores.mean()), float((1 - scores).sum())
    named: list[int] = []
    kept: list[int] = []
    any_candidate: list[bool] = []
    smallest: list[float] = []
    n_slices = 0
    for at in range(0, plan.null_seeds, COLUMNS_AT_ONCE):
        _say(f"shuffled scores {at} of {plan.null_seeds}")
        columns = shuffled[:, at : at + COLUMNS_AT_ONCE]
        slices = _enumerate(codes, tag_counts, columns)
        n_slices = len(slices)
        for k in range(columns.shape[1]):
            errors = find_error_slices(slices, k, overall, loss, margin=MARGIN)
            p, q = slice_significance(slices, k, columns[:, k], min_scored=MIN_COUNT)
            named.append(len(errors))
            kept.append(int((q[errors.index] <= LEVEL).sum()))
            any_candidate.append(bool((q <= LEVEL).any()))
            smallest.append(float(np.nanmin(p)))
    real = _enumerate(codes, tag_counts, scores)
    errors = find_error_slices(real, 0, overall, loss, margin=MARGIN)
    _, q = slice_significance(real, 0, scores[:, 0], min_scored=MIN_COUNT)
    found = len(errors), int((q[errors.index] <= LEVEL).sum())
    rows: list[list[str]] = [["runs that name an error slice"], ["error slices a run, mean"], ["their 2.5% and 97.5%"]]
    rows.append(["with the scores as they are"])
    for counts, real_count in zip((named, kept), found, strict=True):
        low, high = np.quantile(counts, [0.025, 0.975])
        cells = _share(np.mean(np.array(counts) > 0)), f"{np.mean(counts):,.2f}", f"{low:,.0f} to {high:,.0f}"
        for row, cell in zip(rows, (*cells, f"{real_count:,}"), strict=True):
            row.append(cell)
    share, noise = float(np.mean(any_candidate)), 1.96 * (LEVEL * (1 - LEVEL) / plan.null_seeds) ** 0.5
    return [
        "### Nothing to find",
        f"{plan.null_rows:,} x {plan.null_attributes}, D = {MAX_DEPTH}, M = {MIN_COUNT}, C = {MARGIN}: {n_slices:,} "
        f"slices, each a candidate; the scores are shuffled {plan.null_seeds} times, so that there is nothing to find.",
        table(("", "the paper's rule alone", f"and q <= {LEVEL}"), rows),
        f"Any candidate at all, error slice or not, has q <= {LEVEL} in {_share(share)} of the runs; an exact test at "
        f"{LEVEL:.0%} would have at most {LEVEL + noise:.1%} in 95 of 100 such experiments. The smallest p-value of a "
        f"run is {statistics.median(smallest):.1g} in the middle.",
    ]


def _planted_part(plan: Plan) -> list[str]:
    settings = list(
        itertools.product(plan.rows, plan.conjunctions, plan.tags, plan.raised_by, plan.noise, range(plan.seeds))
    )
    results: dict[str, list[tuple[tuple[float, ...], Recovery]]] = {}
    bases: dict[tuple[int, int], Any] = {}
    for number, setting in enumerate(settings):
        n_rows, conjunctions, tags, raised_by, noise, seed = setting
        if (n_rows, seed) not in bases:
            _say(f"planted {number} of {len(settings)}")
            bases[n_rows, seed] = paper_table(n_rows, plan.attributes, seed)
        codes, tag_counts, _ = bases[n_rows, seed]
        planted = plant(
            codes,
            tag_counts,
            np.random.default_rng((seed, number)),
            conjunctions=conjunctions,
            tags=tags,
            base_error=BASE_ERROR,
            raised_by=raised_by,
            noise=noise,
        )
        for name, listed in _methods(planted, tag_counts, seed):
            results.setdefault(name, []).append((setting, recovery(listed, planted)))
    factors = {
        "raised by": (3, plan.raised_by),
        "noise": (4, plan.noise),
        "instances": (0, plan.rows),
        "tags": (2, plan.tags),
    }
    head = ["method"] + [f"{what} {value:,}" for what, (_, values) in factors.items() for value in values]
    by_factor = [
        [name]
        + [
            _share(np.mean([r.near for setting, r in runs if setting[place] == value]))
            for place, values in factors.values()
            for value in values
        ]
        for name, runs in results.items()
    ]
    return [
        "### Planted faults",
        f"{len(settings)} tables of {plan.attributes} attributes (2 to 6 correlated tags): every combination of "
        f"{_list(plan.rows)} instances, {_list(plan.conjunctions)} conjunctions of {_list(plan.tags)} tags on 2 to 8% "
        f"of the instances each, an error rate of {BASE_ERROR:.0%} raised by {_list(plan.raised_by)} there, and "
        f"{_list(plan.noise)} of the tags wrong; {plan.seeds} seeds. Found exactly: a listed slice has the very rows; "
        "nearly: Jaccard at least 0.8; in the first 10: nearly, among the first ten listed. False: listed slices whose "
        "rows are, by the true error rates, no likelier to fail than all rows. Means over the tables; the rank is the "
        "median of the tables with a hit; an empty list has nothing false.",
        table(
            RECOVERY_COLUMNS,
            [(name, *_summary([r for _, r in runs])) for name, runs in results.items()],
        ),
        "Found nearly, by what was planted:",
        table(head, by_factor),
        f"All list slices of at least {MIN_COUNT} instances and at most {MAX_DEPTH} pairs, the worst mean first unless "
        "the name says otherwise. q counts every candidate: the promise of at most 5% false holds for all slices with "
        "a small q (the row without a rule); the few that a rule then picks from these can hold a larger part of the "
        "false ones. Families are told by one slice each. DivExplorer: its divergence and its t, by its own "
        f"functions, over the same slices (its own mining is too slow for this), t at least {DIVEXPLORER_T:.0f}. "
        f"Decision tree: scikit-learn, depth {TREE_DEPTH}, all its nodes (not its leaves alone) of at least "
        f"{MIN_COUNT} rows that fail more than all; they hold negations too. Random: as many slices as "
        f"C = {SMALL_MARGIN} with q finds, at least 10.",
    ]


def _methods(planted: Planted, tag_counts: NDArray[np.int64], seed: int) -> Iterator[tuple[str, Listed]]:
    # Counts shared with each fault and the true error rate ride along as further columns of the enumeration.
    columns = np.column_stack((planted.scores, planted.risk, planted.member))
    slices = _enumerate(planted.codes, tag_counts, columns)
    overall, loss = float(planted.scores.mean()), float((1 - planted.scores).sum())
    p, q = slice_significance(slices, 0, planted.scores, min_scored=MIN_COUNT)

    def listed(index: NDArray[np.int64]) -> Listed:
        shared = np.rint(slices.total[index, 2:]).astype(np.int64)
        return Listed(slices.count[index], shared, slices.total[index, 1] / slices.count[index])

    rule = find_error_slices(slices, 0, overall, loss, margin=MARGIN).index
    yield f"the paper's rule, C = {MARGIN}", listed(rule)
    yield "… by p-value, as people are shown them", listed(rule[np.argsort(p[rule], kind="stable")])
    yield f"… and q <= {LEVEL}", listed(rule[q[rule] <= LEVEL])
    everything = np.flatnonzero(q <= LEVEL)
    yield f"q <= {LEVEL}, no rule", listed(everything[np.argsort(p[everything], kind="stable")])
    small = find_error_slices(slices, 0, overall, loss, margin=SMALL_MARGIN).index
    believed = small[q[small] <= LEVEL]
    yield f"C = {SMALL_MARGIN} and q <= {LEVEL}", listed(believed)
    yield "… by p-value", listed(believed[np.argsort(p[believed], kind="stable")])
    leaders = families(extents_of(planted.codes, tag_counts, slices.items[believed]), slices.items[believed]).leaders
    told = believed[leaders]
    yield "… by p-value, one of each family", listed(told[np.argsort(p[told], kind="stable")])
    diverging, t = divexplorer_slices(slices, planted.scores)
    yield "DivExplorer", listed(diverging)
    yield "DivExplorer, by t", listed(diverging[np.argsort(-t, kind="stable")])
    yield "decision tree", _tree_nodes(planted, tag_counts)
    at_random = np.random.default_rng(seed).permutation(len(slices))
    yield "random slices", listed(at_random[: max(10, len(believed))])


def divexplorer_slices(slices: Slices, scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Slices (L,) whose error rate diverges upwards with t of at least 2, the largest divergence first, and their t.

    The outcome is an error, as in its own examples; column 0 of `slices` holds the sums of `scores`, 0/1.
    """
    from divexplorer.divexplorer import get_t_value_bayesian

    right = slices.total[:, 0]
    wrong = slices.scored[:, 0] - right
    # Its first entry is the whole dataset, which the others are compared with.
    every_wrong, every_right = np.append((1 - scores).sum(), wrong), np.append(scores.sum(), right)
    t = np.asarray(get_t_value_bayesian(every_wrong, every_right, 0))[1:]
    divergence = wrong / slices.scored[:, 0] - (1 - scores).mean()
    kept = np.flatnonzero((divergence > 0) & (t >= DIVEXPLORER_T))
    kept = kept[np.argsort(-divergence[kept], kind="stable")]
    return kept, t[kept]


def _tree_nodes(planted: Planted, tag_counts: NDArray[np.int64]) -> Listed:
    """All nodes below the root of a decision tree that fail more than all rows, the highest error rate first."""
    from sklearn.tree import DecisionTreeClassifier

    offsets = np.concatenate(([0], np.cumsum(tag_counts)))
    held = np.zeros((len(planted.codes), int(offsets[-1])), dtype=np.float32)
    held[np.arange(len(held))[:, None], planted.codes + offsets[:-1]] = 1.0
    wrong = 1.0 - planted.scores
    tree = DecisionTreeClassifier(max_depth=TREE_DEPTH, min_samples_leaf=MIN_COUNT, random_state=0).fit(held, wrong)
    of_node = tree.decision_path(held)[:, 1:].T.astype(np.float64)
    count = np.asarray(of_node.sum(axis=1)).ravel()
    rate = of_node @ wrong / count
    order = np.argsort(-rate, kind="stable")
    order = order[rate[order] > wrong.mean()]
    shared = np.rint(of_node @ planted.member.astype(np.float64)).astype(np.int64)
    return Listed(count[order].astype(np.int64), shared[order], (of_node @ planted.risk / count)[order])


def _summary(runs: list[Recovery]) -> tuple[str, ...]:
    hits = [r.first_hit for r in runs if r.first_hit is not None]
    return (
        f"{statistics.median(r.listed for r in runs):,.0f}",
        _share(np.mean([r.exact for r in runs])),
        _share(np.mean([r.near for r in runs])),
        _share(np.mean([r.near_in_10 for r in runs])),
        f"{statistics.median(hits):,.0f}" if hits else "-",
        _share(len(hits) / len(runs)),
        _share(np.mean([r.false_share for r in runs])),
    )


def _enumerate(codes: NDArray[np.uint8], tag_counts: NDArray[np.int64], columns: NDArray[np.float64]) -> Slices:
    return enumerate_slices(codes, tag_counts, columns, min_count=MIN_COUNT, max_depth=MAX_DEPTH, max_slices=NO_LIMIT)


def _share(value: Any) -> str:
    return f"{float(value):.1%}"


def _list(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
