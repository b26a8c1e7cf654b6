"""Tag substitution: error slices with one tag replaced by a tag that means something near (paper 4.2).

Items number the (attribute, tag) pairs as the enumerated slices do: offset of the attribute + code of the tag,
where the offsets are the running sums of the tag counts in the order of the schema.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.prediction.encoder import TextEncoder
from shared.errors import Precondition, Violation, invalid, refuse
from shared.schema import MAIN_OBJECT, NOT_VISIBLE, Schema

Ints = NDArray[np.int32] | NDArray[np.int64]
Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """Predicted slices, the most likely to be bad first; P rows.

    Origins are positions in the error slices they were made from. All origins of prediction i, the best first,
    are `origin_indices[origin_offsets[i]:origin_offsets[i + 1]]`.
    """

    items: NDArray[np.int32]  # (P, D) ascending, padded with -1
    score: NDArray[np.float64]  # (P,) drop of the best origin x similarity of the two tags
    origin: NDArray[np.int64]  # (P,) the best origin; the next four columns tell how it was changed
    attribute: NDArray[np.int32]  # (P,) position in the schema
    from_item: NDArray[np.int32]  # (P,)
    to_item: NDArray[np.int32]  # (P,)
    similarity: NDArray[np.float64]  # (P,) cosine of the two tags' embeddings
    origin_offsets: NDArray[np.int64]  # (P + 1,)
    origin_indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.score)


def tag_phrases(schema: Schema) -> list[str]:
    """The text that stands for each tag, in item order: "photo of bear, fur color: brown".

    The attribute and the main object tell a dark coat from a dark room. Where a dataset has several main
    objects, all tags say "object": tags of one attribute are compared with each other, so the class must not
    set them apart. A tag of the attribute "main object" is named itself: "photo of bear".
    """
    thing = schema.main_objects[0] if len(schema.main_objects) == 1 else "object"
    return [
        f"photo of {tag}" if attribute.name == MAIN_OBJECT else f"photo of {thing}, {attribute.name}: {tag}"
        for attribute in schema.attributes
        for tag in attribute.tags
    ]


def embed_tags(schema: Schema, encoder: TextEncoder) -> NDArray[np.float32]:
    """Unit-norm embeddings (T, d) of all tags in item order; the `embeddings` of `substitute_tags`.

    The mean of the tag's own embedding and that of its phrase. In the phrase alone the words that all tags of an
    attribute share outweigh the tag, most of all with an encoder that is a mean over words.
    """
    tags = [tag for attribute in schema.attributes for tag in attribute.tags]
    both = encoder.encode(tags) + encoder.encode(tag_phrases(schema))
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    return both


def substitute_tags(
    schema: Schema,
    error_items: Ints,
    error_drop: Floats,
    enumerated_items: Ints,
    embeddings: Floats,
    *,
    neighbours: int = 3,
    max_per_class: int = 20,
    max_predictions: int = 1000,
    substitute_class: bool = False,
) -> Predictions:
    """Predict bad slices that the data does not show (paper 4.2, tag substitution; the paper has 1 neighbour).

    In each error slice the tag of each pair in turn is replaced by the `neighbours` tags of the same attribute
    whose embeddings are nearest by cosine (to 6 digits; ties: lower code). "not visible" is never put in, and the class
    (attribute "main object") is replaced only with `substitute_class`: it is what is debugged. A result that
    was enumerated has enough instances to be known, so it is no prediction. Results reached from several error
    slices are one prediction with all its origins. They are ranked by score = drop of the origin x cosine (ties:
    the better ranked origin, then item order), and cut to `max_per_class` for each class named in a slice and
    to `max_predictions` in all.

    error_items      (E, D) items of the error slices in rank order, ascending, padded with -1
    error_drop       (E,)   overall mean - mean of each
    enumerated_items (S, D) items of every slice with count >= M to the same depth, in any order
    embeddings       (T, d) a row per item, not zero; see `embed_tags`

    Raises InvalidInput (arrays that do not fit the schema or each other, a limit < 1) and Precondition (no
    error slices).
    """
    tag_counts = np.array([len(a.tags) for a in schema.attributes], np.int64)
    n_items = int(tag_counts.sum())
    refuse(
        Violation(field, f"is {value}; give 1 or more")
        for field, value in (
            ("neighbours", neighbours),
            ("max_per_class", max_per_class),
            ("max_predictions", max_predictions),
        )
        if value < 1
    )
    if not len(error_items):
        raise Precondition("there are no error slices to predict from; lower the margin or the minimum count")
    attribute_of = np.repeat(np.arange(len(tag_counts)), tag_counts)
    _check_items("error_items", error_items, attribute_of)
    _check_items("enumerated_items", enumerated_items, attribute_of)
    if error_items.shape[1] != enumerated_items.shape[1]:
        raise invalid("enumerated_items", f"is {enumerated_items.shape[1]} wide and error_items {error_items.shape[1]}")
    if error_drop.shape != (len(error_items),) or not np.isfinite(error_drop).all():
        raise invalid("error_drop", f"must be {len(error_items)} numbers, one for each error slice")
    if embeddings.ndim != 2 or len(embeddings) != n_items:
        raise invalid("embeddings", f"has shape {embeddings.shape}; give a row for each of {n_items} tags")

    nearest, cosine = _nearest(schema, embeddings, neighbours, substitute_class)

    # One candidate for each (error slice, place in it, neighbour).
    pairs = np.where(error_items < 0, n_items, error_items)  # the last row of `nearest` is that of padding
    origin, place, k = np.nonzero(nearest[pairs] >= 0)
    from_item = error_items[origin, place]
    to_item = nearest[from_item, k]
    similarity = cosine[from_item, k]
    score = error_drop[origin] * similarity
    items = error_items[origin].astype(np.int32)
    items[np.arange(len(items)), place] = to_item  # the same attribute, so the row still ascends

    keys = _row_keys(np.concatenate([items, enumerated_items]), n_items)
    candidate_keys, known = keys[: len(items)], keys[len(items) :]
    # Duplicates side by side, the best first; an origin reaches a slice one way only, so no tie is left.
    order = np.lexsort((origin, -score, candidate_keys))
    order = order[~np.isin(candidate_keys[order], known)]
    first = np.diff(candidate_keys[order], prepend=-1) != 0
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(order))

    best = order[starts]
    rank = np.lexsort((candidate_keys[best], origin[best], -score[best]))
    classes = _class_of(schema, items[best[rank]])
    rank = rank[_within_caps(classes, max_per_class, max_predictions)]
    best = best[rank]
    spans = [order[a:b] for a, b in zip(starts[rank], ends[rank], strict=True)]
    return Predictions(
        items=items[best],
        score=score[best],
        origin=origin[best],
        attribute=attribute_of[from_item[best]].astype(np.int32),
        from_item=from_item[best].astype(np.int32),
        to_item=to_item[best].astype(np.int32),
        similarity=similarity[best],
        origin_offsets=np.cumsum([0, *map(len, spans)], dtype=np.int64),
        origin_indices=origin[np.concatenate(spans)] if spans else np.empty(0, np.int64),
    )


def _nearest(
    schema: Schema, embeddings: Floats, neighbours: int, substitute_class: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Items (T + 1, k) that may replace each item, nearest first, -1 where there is none, and their cosines.

    The last row stands for padding and has none.
    """
    unit = embeddings.astype(np.float64)
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise invalid("embeddings", "has a row that is zero or not finite; encode every tag")
    unit /= norms
    width = min(neighbours, max(len(a.tags) for a in schema.attributes))
    items = np.full((len(unit) + 1, width), -1, np.int64)
    cosines = np.full((len(unit) + 1, width), np.nan)
    offset = 0
    for attribute in schema.attributes:
        rows = slice(offset, offset + len(attribute.tags))
        offset = rows.stop
        if attribute.name == MAIN_OBJECT and not substitute_class:
            continue
        # Rounded, so that the last bits, which differ between machines, never decide.
        cosine = np.round(unit[rows] @ unit[rows].T, 6)
        allowed = np.array([tag.casefold() != NOT_VISIBLE for tag in attribute.tags])
        possible = np.where(allowed & ~np.eye(len(cosine), dtype=bool), cosine, -np.inf)
        codes = np.argsort(-possible, axis=1, kind="stable")[:, :width]
        found = np.take_along_axis(possible, codes, axis=1)
        items[rows, : codes.shape[1]] = np.where(np.isfinite(found), codes + rows.start, -1)
        cosines[rows, : codes.shape[1]] = found
    return items, cosines


def _row_keys(items: Ints, n_items: int) -> NDArray[np.int64]:
    """One number >= 0 a row (n, D): equal for equal rows, and ordered as the rows are.

    The columns are digits of one number; where they would not fit in 63 bits, the number so far gives way to
    its rank.
    """
    base = n_items + 1  # -1 is a digit too
    keys = np.zeros(len(items), np.int64)
    span = 1
    for column in items.T:
        if span > np.iinfo(np.int64).max // base:
            distinct, keys = np.unique(keys, return_inverse=True)
            span = len(distinct)
        keys = keys * base + (column.astype(np.int64) + 1)
        span *= base
    return keys


def _class_of(schema: Schema, items: NDArray[np.int32]) -> NDArray[np.int64]:
    """The item of the class that each row (P, D) names, -1 where it names none; (P,)."""
    offset = 0
    for attribute in schema.attributes:
        if attribute.name == MAIN_OBJECT:
            ours = (items >= offset) & (items < offset + len(attribute.tags))
            # A slice names an attribute once at most, so there is one item to find.
            named: NDArray[np.int64] = np.where(ours, items, -1).max(axis=1).astype(np.int64)
            return named
        offset += len(attribute.tags)
    return np.full(len(items), -1, np.int64)


def _within_caps(classes: NDArray[np.int64], max_per_class: int, max_rows: int) -> NDArray[np.int64]:
    """Positions of the rows to keep of rows in rank order: the first of each class, and the first in all."""
    by_class = np.argsort(classes, kind="stable")
    grouped = classes[by_class]
    place = np.arange(len(classes)) - np.searchsorted(grouped, grouped)  # 0, 1, … in each class
    kept = np.sort(by_class[(place < max_per_class) | (grouped < 0)])
    return kept[:max_rows]


def _check_items(field: str, items: Ints, attribute_of: NDArray[np.int64]) -> None:
    """Refuse items (n, D) that are not slices: pairs of the schema, ascending, an attribute once, then -1."""
    if items.ndim != 2 or not items.shape[1] or not np.issubdtype(items.dtype, np.integer):
        raise invalid(field, f"is {items.dtype} of shape {items.shape}; give integers (slices, depth)")
    n_items = len(attribute_of)
    wrong: NDArray[np.bool_] = np.asarray(((items < -1) | (items >= n_items)).any(axis=1) | (items[:, 0] < 0))
    if not wrong.any():
        attributes = np.append(attribute_of, n_items)[items]  # -1 finds the last: padding comes after them all
        rises = (np.diff(attributes, axis=1) > 0) | (items[:, 1:] < 0)
        wrong = np.asarray(~rises.all(axis=1))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise invalid(
            f"{field}[{row}]",
            f"{items[row].tolist()} is no slice of the schema: give items 0 to {n_items - 1} ascending, "
            "each attribute once, padded with -1",
        )
