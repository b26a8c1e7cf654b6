"""What the report shows, and nothing else.

Scores are in [0, 1]. A pair is (attribute, tag). Lists may be cut before they come here; the totals beside them
say how many there were, so that the page can tell what it leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from shared.schema import Task

Pair = tuple[str, str]

SIGNIFICANT = 0.05  # the q-value up to which the ranking counts a slice as holding


@dataclass(frozen=True)
class Picture:
    """A thumbnail (bytes of a PNG, JPEG or WebP file) and what the model made of it ("Shirt → Coat")."""

    data: bytes
    caption: str


@dataclass(frozen=True)
class ErrorSlice:
    """One row of the ranking; `drop` is the overall mean less the slice's, `interval` the 95% interval of the mean.

    `q` is None where the slice was not tested. `blame` is each pair's share of the drop and sums to it. `told_by` is
    the rank of the slice that stands for this one, its own rank when it stands for itself, 0 when it was not grouped.
    `doubtful` are its attributes whose tags a check found not to be relied on.
    """

    rank: int
    pairs: tuple[Pair, ...]
    count: int
    mean: float
    interval: tuple[float, float]
    drop: float
    error_share: float
    q: float | None
    blame: tuple[float, ...]
    told_by: int
    pictures: tuple[Picture, ...] = ()
    doubtful: tuple[str, ...] = ()

    @property
    def may_be_luck(self) -> bool:
        return self.q is None or self.q > SIGNIFICANT


@dataclass(frozen=True)
class Family:
    """Error slices of nearly the same instances, told by one; its pictures show errors that no family before it holds.

    `error_share` of all lost score and `instance_share` of the scored instances lie in it and the families before it.
    """

    told_by: ErrorSlice
    member_count: int
    error_share: float
    instance_share: float


@dataclass(frozen=True)
class Cover:
    """Families in the order that covers the errors soonest.

    `needed` says for some shares of the errors how many families hold them; `error_share` is what all hold together.
    """

    families: tuple[Family, ...]
    family_total: int
    needed: tuple[tuple[float, int], ...]
    error_share: float


@dataclass(frozen=True)
class Chance:
    """Error slices that shuffled scores name, and the range of 95% of the shuffles."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class TagScore:
    attribute: str
    tag: str
    count: int
    mean: float


@dataclass(frozen=True)
class Heatmap:
    """Where two attributes meet: `mean` and `count` by row tag, then column tag; mean is None where count is 0."""

    row_attribute: str
    row_tags: tuple[str, ...]
    column_attribute: str
    column_tags: tuple[str, ...]
    mean: tuple[tuple[float | None, ...], ...]
    count: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PredictedSlice:
    """A slice the data does not show; `origin` is its reason in words, `replaced` the pair it replaced.

    `doubtful` as in ErrorSlice.
    """

    rank: int
    pairs: tuple[Pair, ...]
    score: float
    origin: str
    replaced: Pair | None = None
    doubtful: tuple[str, ...] = ()


@dataclass(frozen=True)
class SlicePicks:
    """How many pool instances an error slice asked for and got."""

    rank: int
    pairs: tuple[Pair, ...]
    mean: float
    picked: int


@dataclass(frozen=True)
class Outcome:
    """Mean test scores of the model trained with one choice of extra data ("original" is trained without)."""

    method: str
    added: int
    overall: float
    in_failing_slices: float


@dataclass(frozen=True)
class Repair:
    """The selection: what was asked for, what was picked for which slice, and what came of it where that is known."""

    budget: int
    picked: int
    pool_count: int
    unmatched_slices: int
    by_slice: tuple[SlicePicks, ...]
    by_slice_total: int
    outcomes: tuple[Outcome, ...] = ()
    test_count: int = 0
    failing_test_count: int = 0


@dataclass(frozen=True)
class Parameters:
    """D, M and C of the paper, and the seed."""

    max_depth: int
    min_count: int
    margin: float
    seed: int


@dataclass(frozen=True)
class ReportData:
    """All that a page shows; `error_slices` with the surest to be bad first."""

    title: str
    dataset: str
    model: str
    task: Task
    made_at: datetime
    split: str
    instance_count: int
    overall_mean: float
    parameters: Parameters
    slice_count: int
    error_slices: tuple[ErrorSlice, ...]
    error_slice_total: int
    tested_count: int
    significant_count: int
    by_chance: Chance | None
    cover: Cover
    tag_scores: tuple[TagScore, ...]
    heatmaps: tuple[Heatmap, ...]
    predicted_slices: tuple[PredictedSlice, ...]
    predicted_slice_total: int
    repair: Repair | None
    # Name to value: hashes of the inputs, versions, anything else that says what the report was made from.
    provenance: Mapping[str, str]
