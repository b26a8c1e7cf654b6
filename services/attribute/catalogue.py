"""Attributes without a model: the catalogue of measured ones, fitted to a dataset (paper 3.2.1).

The catalogue says which tags a measure is cut into, and where: at fixed edges, or at quantiles of the dataset.
Here it becomes attributes with concrete edges, less what tells nothing about this dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from shared.errors import invalid
from shared.images.measures import MEASURES
from shared.schema import Attribute, Category, Measure, Tagger, Task

LEAST_MEASURED = 0.1  # an attribute that is unknown for more than the rest says nothing about the dataset
ROUNDING = 0.01  # rounding an edge may move this share of the instances to the next tag


@dataclass(frozen=True)
class Entry:
    """One attribute of the catalogue; its fields are told in catalogue.yaml."""

    name: str
    category: Category
    measure: str
    tags: tuple[str, ...]
    description: str
    edges: tuple[float, ...] = ()
    quantiles: tuple[float, ...] = ()
    least: float = 0.0


@cache
def catalogue() -> tuple[Entry, ...]:
    """All entries, in the order of catalogue.yaml."""
    raw = yaml.safe_load(Path(__file__).with_name("catalogue.yaml").read_text(encoding="utf-8"))
    return tuple(
        Entry(
            name=item["name"],
            category=Category(item["category"]),
            measure=item["measure"],
            tags=tuple(item["tags"]),
            description=item["description"],
            edges=tuple(float(e) for e in item.get("edges", ())),
            quantiles=tuple(float(q) for q in item.get("quantiles", ())),
            least=float(item.get("least", 0)),
        )
        for item in raw
    )


def catalogue_measures(task: Task, has_boxes: bool) -> tuple[str, ...]:
    """The measures that `measured_attributes` can use for such a dataset, in the catalogue's order."""
    return tuple(entry.measure for entry in catalogue() if _applies(entry, task, has_boxes))


def measurable(values: NDArray[np.float64], names: Sequence[str]) -> tuple[str, ...]:
    """Those of the measures `names` (m,) that more than a few of the rows of `values` (n, m) float64 have."""
    known = np.isfinite(values).mean(axis=0) if len(values) else np.zeros(len(names))
    return tuple(name for name, share in zip(names, known, strict=True) if share >= LEAST_MEASURED)


def measured_attributes(
    values: NDArray[np.float64], names: Sequence[str], task: Task, has_boxes: bool
) -> tuple[Attribute, ...]:
    """The catalogue's attributes that tell the instances of a dataset apart, with concrete edges.

    `values` (n, m) float64 are measures of n instances, or of a sample of them; `names` (m,) says of which column
    each is; NaN is unknown. Left out is what was not measured, is unknown for nine tenths, or has one tag for all;
    all about the object where no box is given and the task says that an image shows several. Categorical and quantile
    attributes lose the tags that no instance has (no "purple" for grey images). May be empty. Raises InvalidInput when
    `values` and `names` do not fit.
    """
    if values.ndim != 2 or values.shape[1] != len(names):
        raise invalid("values", f"has shape {values.shape} for {len(names)} measures; give a column for each")
    columns = dict(zip(names, values.T, strict=True))
    found: list[Attribute] = []
    for entry in catalogue():
        if entry.measure not in columns or not _applies(entry, task, has_boxes):
            continue
        column = columns[entry.measure]
        known = column[np.isfinite(column)]
        if known.size == 0 or known.size < LEAST_MEASURED * column.size:
            continue
        fitted = _fit(entry, known)
        if fitted is None:
            continue
        tags, edges = fitted
        found.append(
            Attribute(
                name=entry.name,
                category=entry.category,
                tags=tags,
                tagger=Tagger.MEASURED,
                description=entry.description,
                measure=Measure(entry.measure, edges),
                sources=("catalogue",),
            )
        )
    return tuple(found)


def _applies(entry: Entry, task: Task, has_boxes: bool) -> bool:
    if MEASURES[entry.measure].needs_box:
        return has_boxes
    # images of the other tasks show several objects, so the pixels that stand out are not the one meant
    return has_boxes or task is Task.CLASSIFICATION or entry.category is not Category.MAIN_OBJECT


def _fit(entry: Entry, known: NDArray[np.float64]) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    """Tags and edges for finite values; None when they would not tell these apart."""
    if not MEASURES[entry.measure].numeric:
        used = np.unique(known).astype(int)
        return (tuple(entry.tags[i] for i in used), ()) if used.size > 1 else None
    if entry.edges:
        # all tags stay, for these edges mean the same on instances that come later
        codes = np.searchsorted(entry.edges, known, side="right")
        return (entry.tags, entry.edges) if np.unique(codes).size > 1 else None
    low, high = np.quantile(known, [0.05, 0.95])
    if high / 2 - low / 2 < entry.least / 2:  # halves, for the difference of huge values overflows
        return None
    edges = _quantile_edges(known, entry.quantiles)
    if not edges:
        return None
    used = np.unique(np.searchsorted(edges, known, side="right"))
    return tuple(entry.tags[i] for i in used), tuple(edges[i - 1] for i in used[1:])


def _quantile_edges(known: NDArray[np.float64], quantiles: Sequence[float]) -> list[float]:
    """One edge a quantile, ascending, equal ones kept; none when all values are equal.

    An edge lies above the smallest value and at most at the largest, where the share of values below it comes
    closest to the quantile. So values that are all alike go to one tag, and the smallest to the first.
    """
    distinct, counts = np.unique(known, return_counts=True)
    if distinct.size < 2:
        return []
    below = np.cumsum(counts)[:-1] / known.size  # the share of values under distinct[1:]
    ordered = np.sort(known)
    return [_rounded(float(distinct[1:][np.abs(below - q).argmin()]), ordered) for q in quantiles]


def _rounded(edge: float, ordered: NDArray[np.float64]) -> float:
    """`edge` with as few digits, 2 or more, as keep nearly all of the `ordered` values on their side of it."""
    below = np.searchsorted(ordered, edge)
    for digits in range(2, 17):
        shorter = float(f"{edge:.{digits}g}")
        moved = abs(int(np.searchsorted(ordered, shorter)) - int(below))
        if moved <= ROUNDING * ordered.size:
            return shorter
    return edge
