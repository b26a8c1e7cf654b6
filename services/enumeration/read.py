"""Slices as a reader asks for them: filtered, ordered, with their tags in words."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import invalid
from shared.schema import MAIN_OBJECT, Schema

TAGS = pa.list_(pa.struct([("attribute", pa.string()), ("tag", pa.string())]))
_WORDS = ("attribute", "tag", "class")
_TERM = re.compile(r'\s*(\w+)\s*(<=|>=|=|<|>)\s*("(?:[^"\\]|\\.)*"|[^\s"]+)(?:\s+AND\s+(?=\S)|\s*$)')
_COMPARE = {
    "<": np.less,
    "<=": np.less_equal,
    "=": np.equal,
    ">=": np.greater_equal,
    ">": np.greater,
}


@dataclass(frozen=True)
class Vocabulary:
    """Item id -> attribute and tag: item id = offset[attribute] + code."""

    attributes: pa.StringArray
    tags: pa.StringArray
    offsets: npt.NDArray[np.int64]  # (A + 1,)


def vocabulary(names: Sequence[str], tag_sets: Sequence[Sequence[str]]) -> Vocabulary:
    """The items of attributes `names` with their `tag_sets`, in order."""
    counts = np.array([len(t) for t in tag_sets], dtype=np.int64)
    attributes = [name for name, tags in zip(names, tag_sets, strict=True) for _ in tags]
    tags = [tag for tag_set in tag_sets for tag in tag_set]
    return Vocabulary(
        pa.array(attributes, pa.string()), pa.array(tags, pa.string()), np.concatenate([[0], np.cumsum(counts)])
    )


def schema_vocabulary(schema: Schema) -> Vocabulary:
    return vocabulary(schema.names(), [a.tags for a in schema.attributes])


def tags_column(items: npt.NDArray[np.signedinteger], words: Vocabulary) -> pa.Array:
    """Items (S, D) padded with -1 as a list<struct<attribute, tag>> column, no Python object a slice."""
    return _pairs_column(items, words, [], [])


def blame_column(items: npt.NDArray[np.signedinteger], blame: npt.NDArray[np.float64], words: Vocabulary) -> pa.Array:
    """Items and their shares of the drop, both (S, D), as a list<struct<attribute, tag, drop>> column."""
    return _pairs_column(items, words, ["drop"], [pa.array(blame[items >= 0])])


def _pairs_column(
    items: npt.NDArray[np.signedinteger], words: Vocabulary, names: list[str], values: list[pa.Array]
) -> pa.Array:
    held = items >= 0
    flat = pa.array(items[held].astype(np.int64))
    columns = [words.attributes.take(flat), words.tags.take(flat), *values]
    pairs = pa.StructArray.from_arrays(columns, ["attribute", "tag", *names])
    offsets = np.concatenate([[0], np.cumsum(held.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pairs)


def doubtful_column(items: npt.NDArray[np.signedinteger], words: Vocabulary, doubtful: Set[str]) -> pa.Array:
    """Those of the `doubtful` attributes that each slice of items (S, D) has, as a list<string> column."""
    named = _names_one_of(items, words, doubtful)
    values = words.attributes.take(pa.array(items[named].astype(np.int64)))
    offsets = np.concatenate([[0], np.cumsum(named.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def doubtful_counts(
    items: npt.NDArray[np.signedinteger], words: Vocabulary, doubtful: Set[str]
) -> npt.NDArray[np.int64]:
    """(S,), how many of the `doubtful` attributes each slice of items (S, D) has."""
    return np.asarray(_names_one_of(items, words, doubtful).sum(axis=1), dtype=np.int64)


def _names_one_of(items: npt.NDArray[np.signedinteger], words: Vocabulary, doubtful: Set[str]) -> npt.NDArray[np.bool_]:
    """(S, D), the pairs whose attribute is one of `doubtful`; no pair for padding."""
    named = np.array([attribute in doubtful for attribute in words.attributes.to_pylist()] + [False], dtype=np.bool_)
    return np.asarray(named[items])


def choose(
    columns: dict[str, npt.NDArray[np.float64] | npt.NDArray[np.int64]],
    items: npt.NDArray[np.signedinteger],
    words: Vocabulary,
    filter_text: str,
    order_by: str,
) -> npt.NDArray[np.int64]:
    """Positions of the slices that pass `filter_text`, in the order that `order_by` asks for.

    The filter is terms joined by AND: a field of `columns` with a comparison, or attribute / tag / class with `=`;
    attribute and tag must hold of the same pair only where the filter has exactly one of each. Raises InvalidInput
    for what cannot be read or a field that these slices lack.
    """
    keep = np.ones(len(items), dtype=bool)
    attributes: list[str] = []
    tags: list[str] = []
    for name, operator, raw in _terms(filter_text.strip()):
        value = re.sub(r"\\(.)", r"\1", raw[1:-1]) if raw.startswith('"') else raw
        if name in _WORDS:
            if operator != "=":
                raise invalid("filter", f"{name} is compared with =")
            if name == "class":
                keep &= _holds(items, words, [MAIN_OBJECT], [value])
            else:
                (attributes if name == "attribute" else tags).append(value)
            continue
        column = _numbers(columns, name, "filter", _WORDS)
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise invalid("filter", f"{name} is compared with '{value[:60]}', which is no number")
        keep &= _COMPARE[operator](column, number)
    if attributes or tags:
        keep &= _holds(items, words, attributes, tags)
    positions = np.flatnonzero(keep)
    if not order_by.strip():
        return positions
    name, _, direction = order_by.strip().partition(" ")
    if direction.strip() not in ("", "asc", "desc"):
        raise invalid("order_by", f"'{order_by}' is not a field with asc or desc")
    values = _numbers(columns, name, "order_by")[positions]
    return positions[np.argsort(-values if direction.strip() == "desc" else values, kind="stable")]


def _terms(text: str) -> Iterator[tuple[str, str, str]]:
    at = 0
    while at < len(text):
        match = _TERM.match(text, at)
        if match is None:
            raise invalid(
                "filter", f"cannot read '{text[at : at + 80]}'; write terms such as count >= 20 joined by AND"
            )
        yield match[1], match[2], match[3]
        at = match.end()


def _numbers(
    columns: dict[str, npt.NDArray[np.float64] | npt.NDArray[np.int64]],
    name: str,
    field: str,
    words: Sequence[str] = (),
) -> npt.NDArray[np.float64]:
    if name not in columns:
        raise invalid(field, f"'{name[:60]}' is not one of {', '.join((*columns, *words))}")
    return columns[name].astype(np.float64)


def _holds(
    items: npt.NDArray[np.signedinteger], words: Vocabulary, attributes: list[str], tags: list[str]
) -> npt.NDArray[np.bool_]:
    names = np.asarray(words.attributes.to_pylist(), dtype=object)
    values = np.asarray(words.tags.to_pylist(), dtype=object)
    if len(attributes) == 1 and len(tags) == 1:
        wanted = [(names == attributes[0]) & (values == tags[0])]
    else:
        wanted = [names == a for a in attributes] + [values == t for t in tags]
    keep = np.ones(len(items), dtype=bool)
    for mask in wanted:
        padded = np.append(mask, False)
        keep &= padded[items].any(axis=1)
    return keep
