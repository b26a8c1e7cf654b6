"""What picking by error slices brings, beside its rivals, and how long it takes; writes to docs/results.md.

    python -m tests.load.bench_repair [--quick]

--quick takes the committed images and two seeds, and prints the page instead of writing it.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from deploy.local.demo_model import predict
from services.prediction.instruction import confusions
from services.prediction.prior import missing_slices
from services.prediction.substitution import embed_tags, substitute_tags
from services.prediction.verification import Drop
from services.repair.compare import Group, groups_of
from services.repair.methods import Method, Rules, pick
from services.repair.selection import Pool, select
from shared.errors import HiBug2Error
from shared.store.artifacts import TagTable
from shared.text.encoder import StaticEncoder
from tests.load.fashion import MARGIN, MIN_COUNT, NAMES, Images, World, committed_images, package_images
from tests.load.instructed import Shown, Spoken, speak
from tests.load.machine import peak_of
from tests.load.page import made_by, table, write_section

BUDGET = 500
WORST = 3  # error slices of each seed that are repaired alone
LEAST = 10  # pool and test images that such a slice has
ORIGINAL = "original"
BEST = Method.SLICES_AND_MARGIN
FIGURES = ("overall", "in slices", "mean of slices", "outside")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Plan:
    sizes: Mapping[str, int]
    seeds: int
    drawn_from: str
    size: tuple[int, int]  # pool instances and error slices that are timed


FULL = Plan(
    {"train": 3_000, "validation": 5_000, "pool": 15_000, "test": 10_000},
    12,
    "40,000 images (the rule of *slices and margin* was chosen on the other 30,000 of the dataset)",
    (1_000_000, 10_000),
)
QUICK = Plan(
    {"train": 2_000, "validation": 4_000, "pool": 6_000, "test": 4_000},
    2,
    "17,000 images that are committed",
    (100_000, 1_000),
)

# How each row of Table 2 is picked: its name, the method, the rules.
ROWS: dict[str, tuple[Method, Rules]] = {
    "random": (Method.RANDOM, Rules()),
    "HiBug (single attribute)": (Method.SINGLE_ATTRIBUTE, Rules()),
    "HiBug2, lowest mean (paper)": (Method.LOWEST_MEAN, Rules()),
    "… one of each family": (Method.LOWEST_MEAN, Rules(one_per_family=True)),
    "… one of each family, in turn": (Method.LOWEST_MEAN, Rules(one_per_family=True, spread=True)),
    "HiBug2, drop x support": (Method.DROP_SUPPORT, Rules()),
    "HiBug2, p-value": (Method.P_VALUE, Rules()),
    "HiBug2, slices and margin": (BEST, Rules()),
    "least confidence": (Method.LEAST_CONFIDENCE, Rules()),
    "margin": (Method.MARGIN, Rules()),
    "entropy": (Method.ENTROPY, Rules()),
    "k-center, pixels": (Method.K_CENTER, Rules()),
}
OURS = "HiBug2, slices and margin"
TRUE_CLASS = "lowest mean, matched by the true class"


@dataclass(frozen=True)
class Seed:
    """What one seed found."""

    errors: int
    failing: float  # part of the test images that lie in an error slice
    picks: Mapping[str, int]
    figures: Mapping[str, tuple[float, ...]]  # by row: FIGURES
    fixed: Sequence[Mapping[Group, tuple[float, float]]]  # of each repaired slice: means before and after
    shown: Shown
    predicted: Mapping[str, tuple[Drop, Drop]]  # by method: its slices, and random unseen ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the committed images and two seeds, printed only")
    quick = parser.parse_args().quick
    plan = QUICK if quick else FULL
    warnings.filterwarnings("ignore")
    started = time.monotonic()
    try:
        images = committed_images() if quick else package_images()
    except HiBug2Error as error:
        sys.exit(f"error: {error}")
    with ProcessPoolExecutor(2) as workers:
        found = list(workers.map(partial(_seed, images, plan), range(plan.seeds)))
    sizes = _sizes(plan)
    spoken = speak([seed.shown for seed in found], MIN_COUNT)
    made = made_by("make bench-repair", ("numpy", "scikit-learn"))
    text = "\n\n".join(
        [
            "## Repair",
            made,
            _setup(plan, found),
            *_table_2(found),
            *_table_3(found),
            *_table_1(found, spoken),
            *sizes,
            f"All of it took {(time.monotonic() - started) / 60:.0f} minutes.",
        ]
    )
    print(text)
    if not quick:
        write_section("repair", text)


def _seed(images: Images, plan: Plan, seed: int) -> Seed:
    world = World(images, plan.sizes, seed)
    members = world.members("test")
    failing = members.any(axis=0)
    rows = {name: pick(world.question, method, BUDGET, rules, seed=seed).unit for name, (method, rules) in ROWS.items()}
    true = Pool(world.question.pool.ids, world.tags("pool"), world.tag_counts)
    rows[TRUE_CLASS] = select(true, world.errors.items, BUDGET).index

    def figures(scores: Floats) -> tuple[float, ...]:
        held = members.sum(axis=1)
        of_slices = (members @ scores)[held > 0] / held[held > 0]
        return scores.mean(), scores[failing].mean(), of_slices.mean(), scores[~failing].mean()

    before = world.scores(world.model, "test")
    found = {ORIGINAL: figures(before)}
    for name, added in rows.items():
        found[name] = figures(world.scores(world.fit(added), "test"))
    shown = _shown(world, before)
    return Seed(
        errors=len(world.errors),
        failing=float(failing.mean()),
        picks={name: len(added) for name, added in rows.items()},
        figures=found,
        fixed=_fixed(world, before),
        shown=shown,
        predicted=_predicted(world, shown, seed),
    )


def _fixed(world: World, before: Floats) -> list[dict[Group, tuple[float, float]]]:
    """The worst slices that pool and test show, each repaired alone with all of the pool that match it."""
    items = world.errors.items
    test = TagTable(pa.array([str(row) for row in world.rows["test"]]), world.tags("test"), world.schema)
    found: list[dict[Group, tuple[float, float]]] = []
    for slice_ in np.flatnonzero(world.errors.leads).tolist():
        groups = groups_of(test, items, [slice_])
        matching = select(world.question.pool, items[[slice_]], BUDGET).index
        if groups[Group.MATCHING].sum() < LEAST or len(matching) < LEAST:
            continue
        after = world.scores(world.fit(matching), "test")
        found.append({g: (before[m].mean(), after[m].mean()) for g, m in groups.items() if m.any()})
        if len(found) == WORST:
            break
    return found


def _shown(world: World, before: Floats) -> Shown:
    rows = world.rows["validation"]
    said, _ = predict(world.model, world.images.pixels[rows])
    taken_for = confusions(NAMES[world.images.classes[rows]].tolist(), said, len(NAMES))
    return Shown(world.schema, world.tags("validation"), world.right, taken_for, world.tags("test"), before)


def _predicted(world: World, shown: Shown, seed: int) -> dict[str, tuple[Drop, Drop]]:
    """Table 1 on the test images: unseen slices by each method, and random unseen ones of the same numbers of pairs."""
    encoder = StaticEncoder()
    items = {
        "tag substitution": substitute_tags(
            world.schema,
            world.errors.items,
            world.errors.drop,
            world.slices.items,
            lambda main_object: embed_tags(world.schema, encoder, main_object),
        ).items,
        "missing-slice prior": missing_slices(
            world.schema, shown.codes, shown.right, min_count=MIN_COUNT, max_depth=world.errors.items.shape[1]
        ).items,
    }
    return shown.verified(items, margin=MARGIN, min_count=MIN_COUNT, seed=seed)


def _setup(plan: Plan, found: Sequence[Seed]) -> str:
    sizes = ", ".join(f"{n:,} {split}" for split, n in plan.sizes.items())
    errors = [seed.errors for seed in found]
    return (
        f"Fashion-MNIST, logistic regression on the pixels; {len(found)} seeds, each draws the images anew ({sizes}, "
        f"all apart). Error slices are found on the validation images by the paper's rule ({min(errors)} to "
        f"{max(errors)} of them, C = {MARGIN}, M = {MIN_COUNT}, D = 3), {BUDGET} pool images are picked, given their "
        "labels and added to the training images; the test images tell what that brought. The pool's class is what the "
        f"model predicts. {np.mean([seed.failing for seed in found]):.0%} of the test images lie in an error slice. "
        f"Seeds draw from the same {plan.drawn_from}, so that the intervals over seeds are a little narrow."
    )


def _table_2(found: Sequence[Seed]) -> list[str]:
    rows = []
    for name in found[0].figures:
        values = np.array([seed.figures[name] for seed in found])
        changes = values - np.array([seed.figures["random"] for seed in found])
        told = [f"{mean:.2%}" for mean in values.mean(axis=0)]
        against = [_interval(changes[:, i]) for i in range(len(FIGURES))] if name != "random" else [""] * len(FIGURES)
        picked = f"{np.mean([seed.picks[name] for seed in found]):.0f}" if name in found[0].picks else ""
        rows.append([name, picked, *(f"{a} {b}".strip() for a, b in zip(told, against, strict=True))])
    ours = np.array([seed.figures[OURS] for seed in found])
    gains = {
        name: ours - np.array([seed.figures[name] for seed in found])
        for name in found[0].figures
        if name not in (OURS, TRUE_CLASS)
    }
    duels = [[name, *(_interval(gain[:, i]).strip("()") for i in range(len(FIGURES)))] for name, gain in gains.items()]
    return [
        "### Table 2: accuracy on the test images",
        table(("picks by", "picks", *FIGURES), rows),
        "*in slices*: images in any error slice (by their true class). *mean of slices*: the mean accuracy of the "
        "error slices, each counting once, however small. *outside*: the other images. In brackets the change against "
        "random, in points, with the 95% interval of the mean over seeds (paired).",
        f"*{TRUE_CLASS}* cannot be had: a pool has no labels. It is there to show why the predicted class is taken.",
        f"*{OURS}* against each of the others, in points:",
        table(("against", *FIGURES), duels),
        f"So *{OURS}* is, by these intervals, " + "; ".join(_verdict(gains, i) for i in range(len(FIGURES))) + ".",
    ]


def _verdict(gains: Mapping[str, Floats], figure: int) -> str:
    """What the intervals of one figure say: better than these, not told apart from those, worse than the rest."""
    sides: dict[str, list[str]] = {"better than": [], "not told apart from": [], "worse than": []}
    for name, gain in gains.items():
        low, high = _bounds(gain[:, figure])
        side = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
        sides[side].append(name.removeprefix("… ").removeprefix("HiBug2, "))
    most = max(sides, key=lambda side: len(sides[side]))
    told = [f"{side} {', '.join(names)}" for side, names in sides.items() if names and side != most]
    return f"*{FIGURES[figure]}*: {', '.join([*told, f'{most} ' + ('the others' if told else 'all')])}"


def _interval(changes: Floats) -> str:
    """Mean change in points and its 95% t interval."""
    low, high = _bounds(changes)
    return f"({50 * (low + high):+.2f} ± {50 * (high - low):.2f})"


def _bounds(changes: Floats) -> tuple[float, float]:
    """The 95% t interval of the mean."""
    half = float(stats.t.ppf(0.975, len(changes) - 1) * changes.std(ddof=1) / np.sqrt(len(changes)))
    return float(changes.mean()) - half, float(changes.mean()) + half


def _table_3(found: Sequence[Seed]) -> list[str]:
    names = {
        Group.MATCHING: "match",
        Group.OVERLAPPING: "overlap",
        Group.NON_OVERLAPPING: "non-overlap",
        Group.OTHER: "in no error slice",
        Group.OVERALL: "overall",
    }
    repairs = [fixed for seed in found for fixed in seed.fixed]
    rows = []
    for group, name in names.items():
        # A seed's slices share its images: its mean is one observation.
        seeds = [np.array([fixed[group] for fixed in seed.fixed if group in fixed]) for seed in found]
        means = np.array([pairs.mean(axis=0) for pairs in seeds if len(pairs)])
        if len(means) > 1:
            before, after = means.mean(axis=0)
            rows.append([name, f"{before:.3f}", f"{after:.3f}", _interval(means[:, 1] - means[:, 0]).strip("()")])
    return [
        "### Table 3: one error slice repaired",
        table(("test images", "before", "after", "change in points"), rows),
        f"{len(repairs)} repairs: of each seed the {WORST} worst error slices with {LEAST} pool and test images or "
        "more, each repaired alone with all pool images that match it. Match: in the slice. Overlap: else in an error "
        "slice that shares a pair with it. Non-overlap: else in an error slice.",
    ]


def _table_1(found: Sequence[Seed], spoken: Spoken) -> list[str]:
    checked = {name: [seed.predicted[name] for seed in found] for name in found[0].predicted}
    named = f"instruction, {spoken.model}" if spoken.model else "instruction, no model"
    checked[named] = [
        found[seed].shown.verified({named: items}, margin=MARGIN, min_count=MIN_COUNT, seed=seed)[named]
        for seed, items in enumerate(spoken.items)
    ]
    told = sum(len(items) for items in spoken.items), sum(mine.slices for mine, _ in checked[named])
    few = f" Of the {told[0]} unseen combinations that are left, {told[1]} could be verified." if spoken.items else ""
    head = ("method", "seeds", "verified", "drop", "drop, random", "difference in points", "error slices", "random")
    rows = [[name, *_against_random(drops)] for name, drops in checked.items()]
    return [
        "### Table 1: slices that the validation images do not show",
        table(head, [row + [""] * (len(head) - len(row)) for row in rows]),
        "Predicted from the validation images, held against the test images: slices with 10 test images or more, the "
        "mean drop below the overall accuracy, and the part that are error slices there; beside them random "
        "combinations that were as unseen, with the same numbers of pairs. Means over the seeds in which any slice can "
        "be verified.",
        spoken.text + few,
    ]


def _against_random(drops: Sequence[tuple[Drop, Drop]]) -> list[str]:
    """The cells of one method: of each seed what was found, and random ones."""
    pairs = [(mine, base) for mine, base in drops if mine.slices]
    if len(pairs) < 2:
        return [str(len(pairs)), f"{sum(mine.slices for mine, _ in pairs)}"] if drops else []
    means = np.array([(mine.mean_drop, base.mean_drop) for mine, base in pairs])
    return [
        str(len(pairs)),
        f"{np.mean([mine.slices for mine, _ in pairs]):.0f}",
        f"{means[:, 0].mean():.3f}",
        f"{means[:, 1].mean():.3f}",
        _interval(means[:, 0] - means[:, 1]).strip("()"),
        f"{np.mean([mine.error_share for mine, _ in pairs]):.0%}",
        f"{np.mean([base.error_share for _, base in pairs]):.0%}",
    ]


def _sizes(plan: Plan) -> list[str]:
    n, n_slices = plan.size
    rows = []
    for what, budget, spread in (("one by one", 5_000, False), ("in turn", 5_000, True), ("one by one", n, False)):
        _pool(n, n_slices)
        begun = time.perf_counter()
        _select(n, n_slices, budget, spread)
        elapsed = time.perf_counter() - begun
        peak = peak_of(_select, (n, n_slices, 1, spread), (n, n_slices, budget, spread))
        rows.append([what, f"{budget:,}", f"{elapsed:.1f}", f"{peak.above_start / 1e6:,.0f}"])
    return [
        f"### {n:,} pool instances, {n_slices:,} error slices of three pairs",
        table(("slices are asked", "budget", "seconds", "MB beside the input"), rows),
        "47 attributes of 4 tags; one core.",
    ]


@cache
def _pool(n: int, n_slices: int) -> tuple[Pool, NDArray[np.int32]]:
    """Made once, so that only the selection is measured."""
    rng = np.random.default_rng(0)
    counts = np.full(47, 4)
    pool = Pool([f"{i:07d}" for i in range(n)], rng.integers(0, 4, (n, 47)).astype(np.uint16), counts)
    attributes = np.sort(rng.permuted(np.tile(np.arange(47), (n_slices, 1)), axis=1)[:, :3], axis=1)
    return pool, (attributes * 4 + rng.integers(0, 4, (n_slices, 3))).astype(np.int32)


def _select(n: int, n_slices: int, budget: int, spread: bool) -> int:
    pool, items = _pool(n, n_slices)
    return select(pool, items, budget, spread=spread).index.nbytes


if __name__ == "__main__":
    main()
