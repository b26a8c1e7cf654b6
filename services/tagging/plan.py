"""What a tagging has to do: which instances lack which tags, cut into parts that one worker does in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import invalid
from shared.schema import Schema, Tagger

UNTAGGED_SPLIT = "train"
_SHARD_ROWS = 4096  # of the plan in one file: what a worker reads for its first part of them


@dataclass(frozen=True)
class Group:
    """Rows that lack the same attributes; both are positions, `rows` (n,) int64 in the tagging."""

    attributes: tuple[int, ...]
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Rows [start, start + count) of `Plan.rows`, done as one; they are rows [first, first + count) of a shard."""

    number: int
    group: int
    shard: int
    first: int
    start: int
    count: int


@dataclass(frozen=True)
class Plan:
    """What is left to do of a tagging of `row_count` rows: groups, cut into parts of at most `rows_per_part` rows."""

    row_count: int
    groups: tuple[Group, ...]
    rows_per_part: int

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """(n,) int64, positions in the tagging, in the order in which they are worked on."""
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *(group.rows for group in self.groups)])

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return tuple(parts_of([len(group.rows) for group in self.groups], self.rows_per_part))

    @cached_property
    def part_rows(self) -> npt.NDArray[np.int64]:
        """(parts,) int64, the rows of each part."""
        return np.array([part.count for part in self.parts], dtype=np.int64)

    @cached_property
    def shards(self) -> tuple[npt.NDArray[np.int64], ...]:
        """The rows of each shard, positions in the tagging."""
        if not self.parts:
            return ()
        number = np.repeat([part.shard for part in self.parts], self.part_rows)
        return tuple(np.split(self.rows, np.flatnonzero(np.diff(number)) + 1))

    def attributes_of(self, part: Part) -> tuple[int, ...]:
        return self.groups[part.group].attributes

    def rows_of(self, part: Part) -> npt.NDArray[np.int64]:
        return self.rows[part.start : part.start + part.count]


def rows_to_tag(instances: pa.Table, splits: Sequence[str]) -> pa.Table:
    """The instances of `splits` (all but train when empty), in their order; InvalidInput when there are none."""
    if splits:
        wanted = pc.is_in(instances.column("split"), value_set=pa.array(list(splits), pa.string()))
    else:
        wanted = pc.not_equal(instances.column("split"), UNTAGGED_SPLIT)
    chosen = instances.filter(wanted).combine_chunks()
    if chosen.num_rows == 0:
        there = sorted(set(instances.column("split").to_pylist()))
        raise invalid("splits", f"no instance to tag; the dataset has the splits {', '.join(there)}")
    return chosen


def groups_of(lacking: npt.NDArray[np.bool_]) -> tuple[Group, ...]:
    """The rows of `lacking` (N, A), true where a tag is to be found, by what they lack; rows that lack nothing are out.

    Groups come in the order of their first rows, rows ascend.
    """
    rows = np.flatnonzero(lacking.any(axis=1))
    if not len(rows):
        return ()
    packed = np.packbits(lacking[rows], axis=1)
    _, first, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    return tuple(
        Group(tuple(np.flatnonzero(lacking[rows[first[g]]]).tolist()), rows[which == g]) for g in np.argsort(first)
    )


def parts_of(group_rows: Sequence[int], rows_per_part: int) -> list[Part]:
    """Parts of `rows_per_part` rows, the last of each group smaller, that cover the rows of all groups once."""
    parts: list[Part] = []
    per_shard = max(1, _SHARD_ROWS // rows_per_part)
    start = first = 0
    for group, rows in enumerate(group_rows):
        for begin in range(0, rows, rows_per_part):
            number, count = len(parts), min(rows_per_part, rows - begin)
            first = 0 if number % per_shard == 0 else first
            parts.append(Part(number, group, number // per_shard, first, start, count))
            start, first = start + count, first + count
    return parts


def looked_at(schema: Schema) -> tuple[int, ...]:
    """Positions of the attributes that workers read off images; the others are in the manifest."""
    return tuple(j for j, a in enumerate(schema.attributes) if a.tagger is not Tagger.GIVEN)


def needs_llm(schema: Schema) -> bool:
    """True when some attribute is tagged by a language model."""
    return any(a.tagger is Tagger.VLM for a in schema.attributes)


def needs_clip(schema: Schema) -> bool:
    """True when some attribute is tagged by CLIP."""
    return any(a.tagger is Tagger.CLIP for a in schema.attributes)
