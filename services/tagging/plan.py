"""What a tagging has to do: which instances, cut into parts that one worker does in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import invalid
from shared.schema import Schema, Tagger

UNTAGGED_SPLIT = "train"


@dataclass(frozen=True)
class Part:
    """Rows [first, first + count) of the plan, done as one."""

    number: int
    first: int
    count: int


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


def parts_of(row_count: int, rows_per_part: int) -> list[Part]:
    """Parts of `rows_per_part` rows, the last one smaller, that cover `row_count` rows once."""
    starts = range(0, row_count, rows_per_part)
    return [Part(i, first, min(rows_per_part, row_count - first)) for i, first in enumerate(starts)]


def missing(parts: Iterable[Part], done: Iterable[str]) -> list[Part]:
    """The parts whose result is not among the file names `done`."""
    there = set(done)
    return [p for p in parts if part_file(p.number) not in there]


def part_file(number: int) -> str:
    """File name of a part's result."""
    return f"{number:06d}.parquet"


def code_column(attribute: int) -> str:
    """The column of an attribute's codes in a part; its name could be that of another column."""
    return f"code_{attribute}"


def needs_llm(schema: Schema) -> bool:
    """True when some attribute is tagged by a language model."""
    return any(a.tagger is Tagger.VLM for a in schema.attributes)


def needs_image(schema: Schema) -> bool:
    """True when some attribute is read off the image."""
    return any(a.tagger is not Tagger.GIVEN for a in schema.attributes)
