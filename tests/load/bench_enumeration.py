"""Times the enumeration against other tools and the paper's algorithms; writes the figures to docs/results.md.

    python -m tests.load.bench_enumeration [--quick]

--quick runs small tables for a minute and prints the page instead of writing it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from services.enumeration.allocator import keep_freed_memory
from services.enumeration.engine import enumerate_slices, error_slices
from services.enumeration.lattice import enumerate_slices as algorithm_3
from services.enumeration.warm import warm
from tests.load import samples
from tests.load.contest import AGAIN_S, STEADY_S, Outcome, contest
from tests.load.found import Found, keys_of
from tests.load.machine import limits, peak_of, written
from tests.load.page import made_by, seconds, table, write_section
from tests.load.rivals import OURS, RIVALS
from tests.load.shapes import Table, binary_table, paper_table

MIN_COUNT = 10
MARGIN = 0.2
TOP = 10_000
NO_LIMIT = 10**9
NUMPY = ("paper's Algorithm 3, numpy", "one-hot matmul a parent, numpy")
COMMAND = "make bench"


@dataclass(frozen=True)
class Shape:
    """A table and the depth it is enumerated to."""

    title: str
    make: Callable[[], tuple[Any, Any, Any]]
    max_depth: int


@dataclass(frozen=True)
class Plan:
    """How much is measured. The first shape also decides which rivals are worth starting on the later ones."""

    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    attributes: tuple[int, ...]
    ablation_attributes: int
    ablation_rows: int
    limit_s: float
    hopeless_s: float
    rounds: int
    enough_s: float


FULL = Plan(
    shapes=(
        Shape("Paper's size", paper_table, 3),
        Shape("Paper's size", paper_table, 4),
        Shape("Many rows", lambda: paper_table(50_000, 40), 3),
        Shape("A million rows", lambda: paper_table(1_000_000, 30), 3),
        Shape("Mostly binary", binary_table, 4),
    ),
    rows=(5_000, 10_000, 20_000, 50_000, 100_000),
    attributes=(8, 16, 24, 32, 40, 48, 56, 64, 72),
    ablation_attributes=47,
    ablation_rows=7_057,
    limit_s=150.0,
    hopeless_s=250.0,
    rounds=5,
    enough_s=8.0,
)
QUICK = Plan(
    shapes=(
        Shape("Paper's size, cut", lambda: paper_table(1_000, 12), 3),
        Shape("Paper's size, cut", lambda: paper_table(1_000, 12), 4),
        Shape("Mostly binary, cut", lambda: binary_table(2_000), 3),
    ),
    rows=(500, 1_000),
    attributes=(6, 12),
    ablation_attributes=12,
    ablation_rows=1_000,
    limit_s=10.0,
    hopeless_s=10.0,
    rounds=2,
    enough_s=1.0,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small tables, printed and not written")
    quick = parser.parse_args().quick
    text = "\n\n".join(_page(QUICK if quick else FULL))
    print(text)
    if not quick:
        write_section("enumeration", text)


def _page(plan: Plan) -> list[str]:
    distributions = list(
        dict.fromkeys(["numpy", "numba", *(r.distribution for r in RIVALS.values() if r.distribution)])
    )
    parts = [
        "## Enumeration",
        made_by(COMMAND, distributions),
        f"Every slice with at least {MIN_COUNT} instances and at most D pairs. Seconds are medians; rivals and ours "
        f"take turns, each in its own process, up to {plan.rounds} times until {plan.enough_s:.0f} s are used. Ours "
        "runs through the service's entry point and includes sums and output arrays; making a rival's input and "
        "reading its result are not counted, Python's garbage collector is off while it runs, and all processes keep "
        "some of the memory that they free, as the service does. A run of "
        f"less than {AGAIN_S:.0f} s is made again at once, and again until {STEADY_S} s are used, and the median of "
        "these is its time, for everybody: this machine gives pages that are free for two seconds back to its host, "
        "and has them again at forty times the price, and its cores are slow when they were idle. Tools marked * "
        "use one core and are slow: they run once, after the others, two at a time. Whoever takes more than "
        f"{plan.limit_s:.0f} s is stopped. "
        '"Same" says that all slices and counts (and sums, where it gives them) equal ours.',
    ]
    first: dict[str, tuple[float | None, int, int]] = {}
    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in plan.shapes:
            _say(f"{shape.title}, D = {shape.max_depth}")
            given = Table(*shape.make())
            names = [OURS.name]
            hopeless: dict[str, str] = {}
            n_slices = len(_ours(given, shape.max_depth))
            work = given.row_sets(shape.max_depth), n_slices
            for name in list(RIVALS)[1:]:
                reason = _hopeless(name, first.get(name), work, plan)
                if reason:
                    hopeless[name] = reason
                else:
                    names.append(name)
            outcomes = contest(
                given,
                names,
                Path(scratch),
                min_count=MIN_COUNT,
                max_depth=shape.max_depth,
                limit_s=plan.limit_s,
                rounds=plan.rounds,
                enough_s=plan.enough_s,
            )
            if not first:
                first = {o.name: (o.median, *work) for o in outcomes}
            scaled = _scaled(given, shape.max_depth) if shape.title == plan.shapes[0].title else []
            parts += _shape_part(shape, given, n_slices, outcomes, hopeless, scaled)
            _say("memory")
            path = Path(scratch) / "table.npz"
            peak = peak_of(_enumerated_bytes, (path, None), (path, shape.max_depth))
            peaks.append((_name(shape, given), f"{peak.output / 1e6:,.0f}", f"{peak.above_start / 1e6:,.0f}"))
            for what, top in (("error slices alone", None), (f"the worst {TOP:,} error slices", TOP)):
                peak = peak_of(_error_bytes, (path, None, top), (path, shape.max_depth, top))
                peaks.append((f"… {what}", f"{peak.output / 1e6:,.1f}", f"{peak.above_start / 1e6:,.0f}"))
    parts += [
        "### Memory",
        "Megabytes that the process takes above its start (kernels loaded, table in memory), at the highest.",
        table(("table", "output", "peak above start"), peaks),
    ]
    parts += _ablations(plan)
    return parts


def _hopeless(name: str, before: tuple[float | None, int, int] | None, work: tuple[int, int], plan: Plan) -> str | None:
    """Why a rival is not started: what the first table took, scaled by what has grown the most; or None.

    The estimate is high for most, so that some are started that it says are late; not the slow ones.
    """
    if before is None:
        return None
    took, *first_work = before
    grown = max(now / then for now, then in zip(work, first_work, strict=True))
    if took is None:
        return (
            f"not started: the first table was not finished, this is {grown:.0f} times the work" if grown > 2 else None
        )
    late = took * grown > (plan.limit_s if RIVALS[name].slow else plan.hopeless_s)
    return f"not started: the first table took {seconds(took)} s, this is {grown:.0f} times the work" if late else None


def _shape_part(
    shape: Shape,
    given: Table,
    n_slices: int,
    outcomes: Sequence[Outcome],
    hopeless: dict[str, str],
    scaled: list[tuple[str, float, int]],
) -> list[str]:
    ours = outcomes[0].median
    assert ours is not None
    rows: list[Sequence[object]] = []
    for outcome in sorted(outcomes, key=lambda o: o.median or np.inf):
        if outcome.median is None:
            continue
        rival = RIVALS[outcome.name]
        same = "all" if rival.lists_all else "those it gives"
        rows.append(
            (
                outcome.name + (" *" if rival.slow else ""),
                seconds(outcome.median),
                len(outcome.seconds),
                f"{outcome.median / ours:,.1f}",
                rival.gives,
                "" if outcome.name == OURS.name else same,
            )
        )
    rows += [
        (name, seconds(value), "scaled", f"{value / ours:,.0f}", "counts, sums", f"{checked:,} checked")
        for name, value, checked in scaled
    ]
    parts = [
        f"### {_name(shape, given)}",
        f"{int(given.tag_counts.sum())} tags, {n_slices:,} slices.",
        table(("what", "seconds", "runs", "times ours", "gives", "same"), rows),
    ]
    missing = [f"{o.name}: {o.problem}" for o in outcomes if o.problem] + [f"{n}: {r}" for n, r in hopeless.items()]
    if missing:
        parts.append("Without a figure: " + "; ".join(missing) + ".")
    peers = [o for o in outcomes if o.median and RIVALS[o.name].lists_all and o.name not in (OURS.name, *NUMPY)]
    if peers:
        best = min(peers, key=lambda o: o.median or np.inf)
        parts.append(
            f"The fastest library that lists the slices, {best.name}, takes {best.median / ours:.1f} times ours."
        )
    speed, n_bytes = limits(), _output_bytes(n_slices, shape.max_depth)
    row_sets, written_s = given.row_sets(shape.max_depth), written(n_bytes)
    parts.append(
        f"What bounds it: there are {row_sets / 1e9:,.1f} billion (row, attribute set) pairs, and ours covers "
        f"{row_sets / ours / 1e9:,.1f} billion a second. Adding them one by one to a table in cache takes "
        f"{speed.update_s * 1e9:.2f} ns a core here, {row_sets * speed.update_s / _cores():.3f} s on {_cores()} cores: "
        "whatever is faster counts several sets with one addition. "
        f"The output is {n_bytes / 1e6:,.0f} MB, and only to write so much to new memory takes one core "
        f"{written_s:.3f} s, {written_s / ours:.0%} of ours (to copy it to memory that was used before, "
        f"{n_bytes / speed.copied_bytes_per_s:.3f} s)."
    )
    return parts


def _ours(given: Table, max_depth: int) -> Any:
    return enumerate_slices(
        given.codes, given.tag_counts, given.scores, min_count=MIN_COUNT, max_depth=max_depth, max_slices=NO_LIMIT
    )


def _scaled(given: Table, max_depth: int) -> list[tuple[str, float, int]]:
    """Algorithms 1 and 2: name, scaled seconds (median of three samples) and slices checked against ours."""
    slices = _ours(given, max_depth)
    found = Found(
        keys_of(slices.items, int(given.offsets[-1])), slices.count, np.rint(slices.total[:, 0]).astype(np.int64)
    )
    known, out = samples.Known(given, slices.items, found), []
    for name, method in (
        ("paper's Algorithm 1 (naive)", samples.naive),
        ("Algorithm 2 (tree, no pruning)", samples.tree),
    ):
        _say(name)
        runs = [method(known, MIN_COUNT, seed) for seed in range(3)]
        out.append((name, statistics.median(s for s, _ in runs), sum(checked for _, checked in runs)))
    return out


def _enumerated_bytes(path: Path, max_depth: int | None) -> int:
    """Bytes of the output of one enumeration; None: only what it needs is loaded."""
    given = _loaded(path)
    if max_depth is None:
        return 0
    slices = _ours(given, max_depth)
    return sum(int(column.nbytes) for column in (slices.items, slices.count, slices.total))


def _error_bytes(path: Path, max_depth: int | None, top: int | None) -> int:
    """As `_enumerated_bytes`, where only error slices are kept."""
    given = _loaded(path)
    if max_depth is None:
        return 0
    found = error_slices(
        given.codes, given.tag_counts, given.scores,
        min_count=MIN_COUNT, max_depth=max_depth, margin=MARGIN, top=top, max_slices=NO_LIMIT,
    )  # fmt: skip
    return sum(int(a.nbytes) for a in (found.slices.items, found.slices.count, found.slices.total, found.lowest))


@cache
def _loaded(path: Path) -> Table:
    """The table and, in memory as well, every kernel."""
    keep_freed_memory()
    warm()
    return Table.load(path)


def _ablations(plan: Plan) -> list[str]:
    _say("ablations")
    keep_freed_memory()
    by_rows = [(f"{n:,}", paper_table(n, plan.ablation_attributes)) for n in plan.rows]
    by_attributes = [(f"{a}", paper_table(plan.ablation_rows, a)) for a in plan.attributes]
    return [
        "### How it grows",
        f"D = 3, ours and the paper's Algorithm 3 in numpy, medians of 3. By instances ({plan.ablation_attributes} "
        "attributes):",
        _ablation("instances", by_rows),
        f"By attributes ({plan.ablation_rows:,} instances):",
        _ablation("attributes", by_attributes),
    ]


def _ablation(what: str, tables: Sequence[tuple[str, tuple[Any, Any, Any]]]) -> str:
    rows = []
    for label, arrays in tables:
        given, times = Table(*arrays), {"ours": [], "numpy": []}
        for _ in range(3):
            for name, method in (("ours", enumerate_slices), ("numpy", algorithm_3)):
                start = time.perf_counter()
                slices = method(
                    given.codes, given.tag_counts, given.scores, min_count=MIN_COUNT, max_depth=3, max_slices=NO_LIMIT
                )
                times[name].append(time.perf_counter() - start)
        ours, reference = (statistics.median(t) for t in times.values())
        rows.append((label, f"{len(slices):,}", seconds(ours), seconds(reference), f"{reference / ours:.1f}"))
    return table((what, "slices", "ours, s", "Algorithm 3, s", "times ours"), rows)


def _name(shape: Shape, given: Table) -> str:
    n_rows, n_attributes = given.codes.shape
    return f"{shape.title}: {n_rows:,} x {n_attributes}, D = {shape.max_depth}"


def _output_bytes(n_slices: int, max_depth: int) -> int:
    """Bytes of items, count and one sum."""
    return n_slices * (2 * max_depth + 4 + 8)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
