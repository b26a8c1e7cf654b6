"""The ways to pick from a pool: by error slices, and the rivals to compare them with (paper 4.1, 5.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from services.repair.diversity import Distinct, k_center
from services.repair.selection import Accept, Pool, in_order, in_turn, random_order, select, take_first
from services.repair.uncertainty import confidence, margin, negative_entropy, probability_rows
from shared.errors import Precondition, invalid

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


class Method(StrEnum):
    LOWEST_MEAN = "lowest_mean"
    RANDOM = "random"
    DROP_SUPPORT = "drop_support"
    P_VALUE = "p_value"
    SINGLE_ATTRIBUTE = "single_attribute"
    SLICES_AND_MARGIN = "slices_and_margin"
    LEAST_CONFIDENCE = "least_confidence"
    MARGIN = "margin"
    ENTROPY = "entropy"
    K_CENTER = "k_center"


class Stopped(Exception):
    """The picks are not wanted any more."""


BY_SLICES = frozenset(
    {Method.LOWEST_MEAN, Method.DROP_SUPPORT, Method.P_VALUE, Method.SINGLE_ATTRIBUTE, Method.SLICES_AND_MARGIN}
)


@dataclass(frozen=True)
class ErrorSlices:
    """E error slices in rank order: items (E, D) padded with -1, and of each its mean, its drop below the overall mean,
    its instances, its p-value, and the rank of the slice that tells its family (0: not grouped)."""

    items: NDArray[np.int32]
    mean: Floats
    drop: Floats
    count: NDArray[np.int64]
    p_value: Floats
    family: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def overall_mean(self) -> float:
        return float(self.mean[0] + self.drop[0])

    @property
    def leads(self) -> NDArray[np.bool_]:
        """(E,) whether a slice stands for itself."""
        return np.asarray((self.family == 0) | (self.family == np.arange(len(self)) + 1))


@dataclass(frozen=True)
class Units:
    """What is picked: instances, or images with all their instances.

    ids: of each unit. of: (N,) the unit of each instance of the pool.
    """

    ids: list[str]
    of: NDArray[np.int64]

    @property
    def single(self) -> bool:
        """Whether each unit is one instance, and in their order."""
        return len(self.ids) == len(self.of)

    def mean(self, values: Floats) -> Floats:
        """(units,) the mean of the values (N,) of each unit's instances, NaN where none is known."""
        known = np.flatnonzero(~np.isnan(values))
        known = known[np.argsort(values[known], kind="stable")]  # added up alike in whatever order the instances come
        count = np.bincount(self.of[known], minlength=len(self.ids))
        total = np.bincount(self.of[known], values[known], minlength=len(self.ids))
        mean: Floats = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
        return mean


@dataclass(frozen=True)
class Rules:
    """What a selection may hold, and how its slices are asked.

    quota: most picks of one class, 0 for no limit. excluded: (N,) instances that are never picked. open_image: opens
    the image of a unit, to tell near-copies. spread: slices take one instance each, in turn. one_per_family: only
    slices that stand for themselves are asked.
    """

    quota: int = 0
    excluded: NDArray[np.bool_] | None = None
    open_image: Callable[[int], NDArray[np.uint8]] | None = None  # given where near-copies are left out
    spread: bool = False
    one_per_family: bool = False
    cancelled: Callable[[], bool] = lambda: False  # asked before each pick of the methods that take long


@dataclass(frozen=True)
class Picks:
    """n picks in order. unit, slice: (n,), -1 where no slice asked. value: (n,) by what the method ordered."""

    unit: Rows
    slice: Rows
    value: Floats
    copies: int = 0
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.unit)


@dataclass(frozen=True)
class Question:
    """All that the methods look at; rows of everything are the pool's instances, N.

    class_column: the column of the pool's codes that holds the class, as the model predicts it; None without one.
    confidences and probabilities: as the scores hold them. vectors: makes (N, D) of the pool and (L, D) of what the
    model knows.
    """

    pool: Pool
    units: Units
    errors: ErrorSlices
    class_column: int | None
    confidences: pa.Array
    probabilities: pa.Array
    vectors: Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]

    @cached_property
    def first_slices(self) -> tuple[Rows, NDArray[np.int64]]:
        """(N,) the worst error slice that each instance matches, -1 for none; (E,) instances that match each."""
        first = np.full(len(self.pool.ids), -1)
        if not len(self.errors):
            return first, np.empty(0, np.int64)
        found = select(self.pool, self.errors.items, len(first))
        first[found.index] = found.slice
        return first, found.matched

    @cached_property
    def margins(self) -> Floats:
        return margin(probability_rows(self.probabilities))


def pick(question: Question, method: Method, budget: int, rules: Rules, *, seed: int = 0) -> Picks:
    """At most `budget` units by `method`; a smaller budget picks the head of a larger one.

    No error slices ask for nothing: no picks by the methods that go by slices. Raises InvalidInput (a rule that does
    not suit the task), Precondition (no probabilities where the method needs them) and Stopped.
    """
    _check(question, method, rules)
    distinct = Distinct(rules.open_image) if rules.open_image is not None else None
    accept = _accept(question, rules, distinct)
    if method is Method.SLICES_AND_MARGIN:
        found = _slices_and_margin(question, budget, accept or (lambda _: True))
    elif method in BY_SLICES:
        found = _by_slices(question, method, budget, rules, accept)
    elif method is Method.K_CENTER:
        unit = _k_center(question, budget, seed, accept or _unless(rules.cancelled))
        found = Picks(unit, np.full(len(unit), -1), np.full(len(unit), np.nan))
    else:
        order, value = _order(question, method, seed)
        unit = take_first(order, budget, accept)
        found = Picks(unit, np.full(len(unit), -1), value[unit])
    return replace(found, copies=distinct.copies, unreadable=distinct.unreadable) if distinct else found


def _by_slices(question: Question, method: Method, budget: int, rules: Rules, accept: Accept | None) -> Picks:
    asked = _asked(question.errors, method, rules)
    if not len(asked):
        return Picks(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    errors, pool, units = question.errors, question.pool, question.units
    items = errors.items[asked]
    if units.single:
        chosen = select(pool, items, budget, spread=rules.spread, accept=accept)
        slices = asked[chosen.slice]
        return Picks(chosen.index, slices, errors.mean[slices])
    # An image's priority is the mean over all its objects of what their slices say (paper A.5).
    every = select(pool, items, len(pool.ids))
    means = np.full(len(pool.ids), errors.overall_mean)
    means[every.index] = errors.mean[asked[every.slice]]
    value = units.mean(means)
    place = np.full(len(units.ids), len(asked))
    np.minimum.at(place, units.of[every.index], every.slice)
    order = in_order(units.ids, value)
    unit = take_first(order[place[order] < len(asked)], budget, accept)
    return Picks(unit, asked[place[unit]], value[unit])


def _slices_and_margin(question: Question, budget: int, accept: Accept) -> Picks:
    """What the margin would pick outside the error slices stays; its picks inside are shared out among the slices.

    Where the next by margin lies in an error slice, the families' slices take their turn instead, each with what the
    model is least sure of. So the slices, of which a few large ones would get nearly all, are served alike, and what
    lies outside them is not forgotten.
    """
    errors, first = question.errors, question.margins
    leads = np.flatnonzero(errors.leads)
    picks: list[tuple[int, int]] = []
    if len(leads):
        inside = question.first_slices[0] >= 0
        turns = in_turn(question.pool, errors.items[leads], first)
        seen: set[int] = set()
        for row in in_order(question.pool.ids, first).tolist():
            slice_ = -1
            if inside[row]:
                for found, at in turns:
                    seen.add(found)
                    if accept(found):
                        row, slice_ = found, int(leads[at])
                        break
            if slice_ < 0 and (row in seen or not accept(row)):
                continue
            seen.add(row)
            picks.append((row, slice_))
            if len(picks) == budget:
                break
    unit, slices = np.array(picks, np.int64).reshape(-1, 2).T
    return Picks(unit, slices, first[unit])


def _asked(errors: ErrorSlices, method: Method, rules: Rules) -> Rows:
    """Positions of the error slices that are asked, in the order in which they are."""
    order = np.arange(len(errors))
    if method is Method.DROP_SUPPORT:
        order = np.argsort(-errors.drop * errors.count, kind="stable")
    elif method is Method.P_VALUE:
        order = np.argsort(errors.p_value, kind="stable")
    elif method is Method.SINGLE_ATTRIBUTE:
        order = np.flatnonzero((errors.items >= 0).sum(axis=1) == 1)
    if rules.one_per_family:
        order = order[errors.leads[order]]
    return order


def _order(question: Question, method: Method, seed: int) -> tuple[Rows, Floats]:
    """Units in the order in which they are picked, and what each is ordered by; NaN where not known, which is last."""
    units = question.units
    if method is Method.RANDOM:
        return random_order(units.ids, seed), np.full(len(units.ids), np.nan)
    if method is Method.LEAST_CONFIDENCE:
        values = confidence(question.confidences, question.probabilities)
    elif method is Method.MARGIN:
        values = question.margins
    else:
        values = negative_entropy(probability_rows(question.probabilities))
    value = units.mean(values)
    order = in_order(units.ids, value)
    return order, -value if method is Method.ENTROPY else value


def _k_center(question: Question, budget: int, seed: int, accept: Accept) -> Rows:
    vectors, known = question.vectors()
    units = question.units
    if not units.single:
        total = np.zeros((len(units.ids), vectors.shape[1]), np.float32)
        np.add.at(total, units.of, vectors)
        total /= np.bincount(units.of, minlength=len(units.ids))[:, None]
        vectors = total
    return k_center(vectors, known, budget, random_order(units.ids, seed), accept)


def _accept(question: Question, rules: Rules, distinct: Distinct | None) -> Accept | None:
    """Whether a unit may be picked after those that were accepted before it."""
    units, excluded = question.units, None
    if rules.excluded is not None and rules.excluded.any():
        excluded = np.zeros(len(units.ids), bool)
        excluded[units.of[rules.excluded]] = True
    if excluded is None and not rules.quota and distinct is None:
        return None
    classes = question.pool.codes[:, question.class_column] if question.class_column is not None else None
    taken: dict[int, int] = {}

    go_on = _unless(rules.cancelled)

    def accept(unit: int) -> bool:
        go_on(unit)
        if excluded is not None and excluded[unit]:
            return False
        of_class = int(classes[unit]) if rules.quota and classes is not None else 0
        if rules.quota and taken.get(of_class, 0) >= rules.quota:
            return False
        if distinct is not None and not distinct.keep(unit):
            return False
        taken[of_class] = taken.get(of_class, 0) + 1
        return True

    return accept


def _unless(cancelled: Callable[[], bool]) -> Accept:
    """Accepts everything until it is `cancelled`; then it raises Stopped."""

    def accept(_: int) -> bool:
        if cancelled():
            raise Stopped
        return True

    return accept


def _check(question: Question, method: Method, rules: Rules) -> None:
    if rules.quota < 0:
        raise invalid("options.class_quota", f"is {rules.quota}; give 1 or more, or 0 for no limit")
    if rules.quota and question.class_column is None:
        raise Precondition("the schema has no main object, so no quota a class can be kept; leave the quota out")
    if question.units.single:
        return
    for wrong, field_, what in (
        (rules.quota > 0, "options.class_quota", "a quota a class"),
        (rules.spread, "options.spread", "a spread over slices"),
        (method is Method.SLICES_AND_MARGIN, "method", "slices_and_margin"),
    ):
        if wrong:
            raise invalid(field_, f"{what} is for single instances; here images are picked with all their objects")
