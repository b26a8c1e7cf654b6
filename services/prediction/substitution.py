"""Tag substitution: error slices with one tag replaced by a tag that means something near (paper 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.prediction.items import (
    MAX_PER_CLASS,
    MAX_PREDICTIONS,
    Floats,
    Ints,
    attribute_of_items,
    check_items,
    check_limits,
    class_of,
    row_keys,
    within_caps,
)
from shared.errors import Precondition, invalid
from shared.schema import MAIN_OBJECT, NOT_VISIBLE, Schema
from shared.text import TextEncoder

OBJECT = "object"  # what a slice speaks about when it names no class and there are several

Embed = Callable[[str], Floats]  # the embeddings (T, d) of all tags, as they are said of one main object


@dataclass(frozen=True)
class Substitutions:
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


def tag_phrases(schema: Schema, main_object: str) -> list[str]:
    """The text that stands for each tag, in item order: "photo of bear, fur color: brown".

    The attribute and the main object tell a dark coat from a dark room. A tag of the attribute "main object" is named
    itself: "photo of bear".
    """
    return [
        f"photo of {tag}" if attribute == MAIN_OBJECT else f"photo of {main_object}, {attribute}: {tag}"
        for attribute, tag in schema.pairs
    ]


def embed_tags(schema: Schema, encoder: TextEncoder, main_object: str) -> NDArray[np.float32]:
    """Unit-norm embeddings (T, d) of all tags in item order, as they are said of `main_object`.

    The mean of the tag's own embedding and that of its phrase. In the phrase alone the words that all tags of an
    attribute share outweigh the tag, most of all with an encoder that is a mean over words.
    """
    tags = [tag for _, tag in schema.pairs]
    both = encoder.encode(tags) + encoder.encode(tag_phrases(schema, main_object))
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    return both


def substitute_tags(
    schema: Schema,
    error_items: Ints,
    error_drop: Floats,
    enumerated_items: Ints,
    embed: Embed,
    *,
    neighbours: int = 3,
    max_per_class: int = MAX_PER_CLASS,
    max_predictions: int = MAX_PREDICTIONS,
) -> Substitutions:
    """Predict bad slices that the data does not show (paper 4.2, tag substitution; the paper has 1 neighbour).

    In each error slice the tag of each pair in turn is replaced by the `neighbours` tags of the same attribute
    whose embeddings are nearest by cosine (to 6 digits; ties: lower code). The tags are embedded as they are said of
    the class that the slice names, else of the dataset's main object, else of an "object". "not visible" is never
    put in, and the class (attribute "main object") is never replaced: it is what is debugged.
    A result that was enumerated has enough instances to be known, so it is no prediction. Results reached from
    several error slices are one prediction with all its origins. They are ranked by score = drop of the origin x
    cosine (ties: the better ranked origin, then item order), and cut to `max_per_class` for each class named in a
    slice and for those that name none, and to `max_predictions` in all.

    error_items      (E, D) items of the error slices in rank order, ascending, padded with -1
    error_drop       (E,)   overall mean - mean of each
    enumerated_items (S, D) items of every slice with count >= M to the same depth, in any order
    embed            gives (T, d), a row per item, not zero, for the name of a main object; see `embed_tags`

    Raises InvalidInput (arrays that do not fit the schema or each other, a limit < 1) and Precondition (no
    error slices).
    """
    attribute_of = attribute_of_items(schema)
    n_items = len(attribute_of)
    check_limits(neighbours=neighbours, max_per_class=max_per_class, max_predictions=max_predictions)
    if not len(error_items):
        raise Precondition("there are no error slices to predict from; lower the margin or the minimum count")
    check_items("error_items", error_items, attribute_of)
    check_items("enumerated_items", enumerated_items, attribute_of)
    if error_items.shape[1] != enumerated_items.shape[1]:
        raise invalid("enumerated_items", f"is {enumerated_items.shape[1]} wide and error_items {error_items.shape[1]}")
    if error_drop.shape != (len(error_items),) or not np.isfinite(error_drop).all():
        raise invalid("error_drop", f"must be {len(error_items)} numbers, one for each error slice")

    named, group = np.unique(class_of(schema, error_items), return_inverse=True)
    tables = [_nearest(schema, embed(main_object_of(schema, int(item))), neighbours) for item in named]
    nearest, cosine = (np.stack(parts) for parts in zip(*tables, strict=True))  # (G, T + 1, k)

    # One candidate for each (error slice, place in it, neighbour).
    pairs = np.where(error_items < 0, n_items, error_items)  # the last row of a table is that of padding
    origin, place, k = np.nonzero(nearest[group[:, None], pairs] >= 0)
    from_item = error_items[origin, place]
    to_item = nearest[group[origin], from_item, k]
    similarity = cosine[group[origin], from_item, k]
    score = error_drop[origin] * similarity
    items = error_items[origin].astype(np.int32)
    items[np.arange(len(items)), place] = to_item  # the same attribute, so the row still ascends

    keys = row_keys(np.concatenate([items, enumerated_items]), n_items)
    candidate_keys, known = keys[: len(items)], keys[len(items) :]
    # Duplicates side by side, the best first; an origin reaches a slice one way only, so no tie is left.
    order = np.lexsort((origin, -score, candidate_keys))
    order = order[~np.isin(candidate_keys[order], known)]
    first = np.diff(candidate_keys[order], prepend=-1) != 0
    starts = np.flatnonzero(first)
    ends = np.append(starts[1:], len(order))

    best = order[starts]
    rank = np.lexsort((candidate_keys[best], origin[best], -score[best]))
    rank = rank[within_caps(class_of(schema, items[best[rank]]), max_per_class, max_predictions)]
    best = best[rank]
    spans = [order[a:b] for a, b in zip(starts[rank], ends[rank], strict=True)]
    return Substitutions(
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


def main_object_of(schema: Schema, class_item: int) -> str:
    """What a slice speaks about: the class that it names (item, -1 for none), else the only one there is."""
    if class_item >= 0:
        return schema.pairs[class_item][1]
    return schema.main_objects[0] if len(schema.main_objects) == 1 else OBJECT


def _nearest(schema: Schema, embeddings: Floats, neighbours: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Items (T + 1, k) that may replace each item, nearest first, -1 where there is none, and their cosines.

    The last row stands for padding and has none.
    """
    n_items = len(schema.pairs)
    if embeddings.ndim != 2 or len(embeddings) != n_items:
        raise invalid("embeddings", f"has shape {embeddings.shape}; give a row for each of {n_items} tags")
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
        if attribute.name == MAIN_OBJECT:
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
