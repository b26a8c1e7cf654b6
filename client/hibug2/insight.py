"""What a run found, and how models differ: slices, families, a slice that is typed in, models side by side."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from hibug2 import messages
from hibug2.connection import PAGE, Connection, RunLike, gather
from hibug2.errors import UserError
from hibug2.v1 import run_pb2, slice_pb2, types_pb2


@dataclass(frozen=True)
class Comparison:
    """Models side by side, in the order of `runs`.

    `overlaps` has a row a pair: first, second (names of runs) and share, of the worst tenth of the slices;
    `average_overlap` is the mean of the shares. With two runs the first is the earlier version: `worse` are the
    slices on which the second does worse beyond the overall difference; `changes` counts the error slices that are
    fixed (no more below the margin), regressed (below it in both, and lower now), new, and kept, and `versions` shows
    the most telling of each. Columns of both tables: tags, count,
    paired_count, first_mean, second_mean, difference (second less first), p_value, q_value, change,
    doubtful.
    """

    runs: tuple[run_pb2.Run, ...]
    average_overlap: float
    overlaps: pa.Table
    changes: dict[str, int]
    worse: pa.Table
    versions: pa.Table


class Insight(Connection):
    """The calls of `Client` that read what was found."""

    def slices(
        self,
        run: RunLike,
        *,
        filter: str | None = None,
        order_by: str | None = None,
        limit: int | None = None,
    ) -> pa.Table:
        """The error slices of a run, or all slices of a ranking or enumeration named `datasets/…`.

        `filter` joins terms by AND over rank, depth, count, mean, drop, parent_drop, error_share, p_value, q_value,
        family (< <= > >= =) and attribute, tag, class (=): 'q_value <= 0.05 AND tag = "dark"'. `order_by` is a
        field, then "desc" for largest first; by rank, the lowest mean first, when None. Among the very lowest means
        many are luck: "p_value" brings the slices first that are surest to be bad.
        Columns: rank, tags (list of struct attribute, tag), count, scored_count, mean, drop, parent_drop,
        error_share, interval_low, interval_high, p_value, q_value, family (rank of the slice that stands for this
        one; 0 beyond those that are grouped), blame (list of struct attribute, tag, drop: each tag's part of the
        drop), doubtful (its attributes whose tags a check found not to be relied on; the filter counts them:
        doubtful = 0). Slices of an enumeration have null in all that a model's scores would say.
        """
        parent = self._slices_of(run)
        if order_by is None and limit is None:
            request = slice_pb2.ReadSlicesRequest(parent=parent, filter=filter or "")
            with self._arrow(self._slices.ReadSlices, request) as reader:
                return _slice_columns(reader.read_all())
        size = _page_size(limit)
        pages = self._pages(
            lambda token: slice_pb2.ListSlicesRequest(
                parent=parent, page_size=size, page_token=token, filter=filter or "", order_by=order_by or ""
            ),
            self._slices.ListSlices,
        )
        return gather((messages.slices_batch(page.slices) for page in pages), messages.SLICES, limit)

    def slice_instances(self, run: RunLike, tags: Mapping[str, str]) -> list[str]:
        """The ids of the instances that have all of `tags` (attribute to tag)."""
        parent = self._slices_of(run)
        pairs = attribute_tags(tags)
        return self._all(
            lambda token: slice_pb2.ListSliceInstancesRequest(
                parent=parent, tags=pairs, page_size=PAGE, page_token=token
            ),
            self._slices.ListSliceInstances,
            lambda response: response.instance_ids,
        )

    def families(self, run: RunLike, *, limit: int | None = None) -> pa.Table:
        """The error slices of a run (or ranking) grouped by their instances, those that cover the errors soonest first.

        Columns: rank, tags, count, mean, drop, q_value, error_share, doubtful of the slice that stands for the family,
        member_ranks (its own first), cover_rank (0 for a family that adds nothing to those before it), covered_share
        (of all errors, by the families so far).
        """
        parent = self._slices_of(run)
        size = _page_size(limit)
        pages = self._pages(
            lambda token: slice_pb2.ListFamiliesRequest(parent=parent, page_size=size, page_token=token),
            self._slices.ListFamilies,
        )
        return gather((messages.families_batch(page.families) for page in pages), messages.FAMILIES, limit)

    def hypothesis(self, run: RunLike, tags: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
        """What the run's model does on the instances that hold a tag, or any of several, of each attribute.

        For instance {"pose": ["sitting", "lying"], "color": "white"}. Keys: count, scored_count, and mean, drop,
        error_share, interval_low, interval_high, p_value, which are None where no instance is scored. The p-value is
        that of one test: who tries many combinations must count them.
        """
        terms = [
            slice_pb2.AnyOf(attribute=attribute, tags=[wanted] if isinstance(wanted, str) else wanted)
            for attribute, wanted in tags.items()
        ]
        request = slice_pb2.EvaluateHypothesisRequest(parent=self._slices_of(run), terms=terms)
        return messages.hypothesis_row(self._call(self._slices.EvaluateHypothesis, request))

    def confirm(self, run: RunLike, *, seed: int = 0, limit: int | None = None) -> pa.Table:
        """Error slices found on one half of the run's instances and tested on the other, which was not looked at.

        Columns: tags, found_count, found_mean, held_count, held_mean, p_value, q_value, doubtful; those of the held
        half are null where it has no scored instance. `seed` chooses the halves.
        """
        parent = self._slices_of(run)
        size = _page_size(limit)
        pages = self._pages(
            lambda token: slice_pb2.ConfirmSlicesRequest(parent=parent, seed=seed, page_size=size, page_token=token),
            self._slices.ConfirmSlices,
        )
        return gather((messages.confirmed_batch(page.slices) for page in pages), messages.CONFIRMED, limit)

    def compare_models(self, runs: Sequence[RunLike], *, limit: int = 50) -> Comparison:
        """Two or more runs of one dataset, with the same slices, side by side; `limit` bounds each kind of slices."""
        found = tuple(self._finished(run, "ranking") for run in runs)
        if len(found) < 2:
            raise UserError("runs", "name two or more to compare")
        for run in found[1:]:
            check_same_slices(found[0], run, "runs")
        rankings = [run.ranking for run in found]
        for first, second in itertools.combinations(found, 2):
            if first.ranking == second.ranking:
                raise UserError("runs", f"{first.name} and {second.name} have the same scores; name others to compare")
        request = slice_pb2.CompareModelsRequest(rankings=rankings, page_size=limit)
        response = self._call(self._slices.CompareModels, request)
        names = {run.ranking: run.name for run in found}
        kind = slice_pb2.VersionChange.DESCRIPTOR
        return Comparison(
            runs=found,
            average_overlap=response.average_overlap,
            overlaps=pa.Table.from_pylist(
                [
                    {"first": names.get(o.first, o.first), "second": names.get(o.second, o.second), "share": o.share}
                    for o in response.overlaps
                ],
                messages.OVERLAPS,
            ),
            changes={messages.word(kind, c.change): c.slice_count for c in response.changes},
            worse=pa.Table.from_batches([messages.differences_batch(response.worse)]),
            versions=pa.Table.from_batches([messages.differences_batch(response.versions)]),
        )

    def _slices_of(self, run: RunLike) -> str:
        """The ranking of a run; a ranking or an enumeration may be named itself."""
        return run if isinstance(run, str) and run.startswith("datasets/") else self._finished(run, "ranking").ranking


def attribute_tags(tags: Mapping[str, str]) -> list[types_pb2.AttributeTag]:
    """Attribute to tag as pairs of the contract."""
    return [types_pb2.AttributeTag(attribute=attribute, tag=tag) for attribute, tag in tags.items()]


def check_same_slices(first: run_pb2.Run, second: run_pb2.Run, field: str) -> None:
    """UserError when two runs did not rank the same slices."""
    if first.dataset != second.dataset:
        raise UserError(
            field, f"{first.name} is of {first.dataset} and {second.name} of {second.dataset}; compare runs of one"
        )
    if first.enumeration != second.enumeration:
        raise UserError(
            field,
            f"{first.name} and {second.name} did not rank the same slices; run both models with the same schema, "
            "--depth and --min-count on the same instances",
        )


def _page_size(limit: int | None) -> int:
    return PAGE if limit is None else max(1, min(limit, PAGE))


def _slice_columns(table: pa.Table) -> pa.Table:
    """A slice stream in the columns of SLICES; what a stream does not carry is null."""
    if "scored" in table.column_names:
        table = table.rename_columns({"scored": "scored_count"})
    return pa.table(
        {
            field.name: table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in messages.SLICES
        },
        schema=messages.SLICES,
    )
