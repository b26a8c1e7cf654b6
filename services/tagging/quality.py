"""How far tags can be trusted: what a second tagging of a sample says, and what is known from elsewhere (paper A.1.2).

Agreement is told as a share and as Cohen's kappa, which takes off what chance alone gives: of two answers that are
both "no" on 95 images of 100, 90% agree by chance, and only kappa shows whether the "yes" of an image comes again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.schema import NOT_VISIBLE, UNKNOWN, Attribute, Schema, Tagger

Codes = npt.NDArray[np.uint16]

MIN_COMPARED = 10  # instances below which agreement with something else is no evidence
_ASKED = (Tagger.VLM, Tagger.CLIP)
_KNOWN = (Tagger.MEASURED, Tagger.GIVEN)
_IDLE_WORDS = frozenset({"is", "are", "the", "a", "an", "of", "image", "photo", "picture"})


@dataclass(frozen=True)
class Agreement:
    """Of `compared` instances the `share` with the same tag; `kappa` is absent where both sides know one tag only."""

    compared: int
    share: float | None
    kappa: float | None


@dataclass(frozen=True)
class Reference:
    """Something measured or given that says the same as an attribute. `known` (N, ) uint16 are its codes, in its
    attribute's words: UNKNOWN where it says what that attribute has no tag for."""

    name: str
    tagger: Tagger
    known: Codes


@dataclass(frozen=True)
class AttributeQuality:
    """What is known of the tags of one attribute. Shares are of all instances; `doubt` is "" where there is none."""

    attribute: str
    tagger: Tagger
    unknown_share: float
    not_visible_share: float
    retagged: Agreement | None
    references: tuple[tuple[str, Tagger, Agreement], ...]
    doubt: str


def sample_rows(eligible: npt.NDArray[np.bool_], count: int, seed: int) -> npt.NDArray[np.int64]:
    """At most `count` of the rows that are `eligible` (N,), drawn by `seed`, ascending."""
    rows = np.flatnonzero(eligible)
    chosen = np.random.default_rng(seed).choice(rows, min(count, len(rows)), replace=False)
    return np.sort(chosen).astype(np.int64)


def agreement(first: Codes, second: Codes) -> Agreement:
    """How far two codes (n,) of the same instances agree where neither is UNKNOWN (Cohen 1960)."""
    both = (first != UNKNOWN) & (second != UNKNOWN)
    a, b = first[both].astype(np.int64), second[both].astype(np.int64)
    if not len(a):
        return Agreement(0, None, None)
    share = float((a == b).mean())
    width = int(max(a.max(), b.max())) + 1
    by_chance = float((np.bincount(a, minlength=width) / len(a)) @ (np.bincount(b, minlength=width) / len(b)))
    return Agreement(len(a), share, None if by_chance > 1 - 1e-9 else (share - by_chance) / (1 - by_chance))


def asked_attributes(schema: Schema, llm: bool) -> tuple[int, ...]:
    """Positions of the attributes that a second tagging asks a language model about; none where there is no `llm`.

    Measuring again gives the same again, so only what models said is asked: also what CLIP said, whose second answer
    would be its first.
    """
    return tuple(j for j, a in enumerate(schema.attributes) if llm and a.tagger in _ASKED)


def references(
    schema: Schema, codes: Codes, columns: Mapping[str, Sequence[str | None]]
) -> dict[int, tuple[Reference, ...]]:
    """By position of an attribute that a model tags: what is known from elsewhere of the same thing.

    That is a measured or given attribute of the schema, or a column of the manifest ((N,) values by name), whose name,
    or whose measure's name, has the same words, and at least two of whose tags the attribute has. `codes` (N, A).
    """
    found: dict[int, tuple[Reference, ...]] = {}
    own = {a.name for a in schema.attributes if a.tagger is Tagger.GIVEN}
    for j, attribute in enumerate(schema.attributes):
        if attribute.tagger not in _ASKED:
            continue
        meaning = _words(attribute.name)
        here: list[Reference] = []
        for k, other in enumerate(schema.attributes):
            if other.tagger in _KNOWN and meaning in _meanings(other):
                known = _translated(codes[:, k], other.tags, attribute)
                here.append(Reference(other.name, other.tagger, known))
        for name, values in columns.items():
            if name not in own and _words(name) == meaning:
                tags = sorted({value for value in values if value is not None})
                position = {tag: i for i, tag in enumerate(tags)}
                raw = np.array([UNKNOWN if v is None else position[v] for v in values], dtype=np.uint16)
                here.append(Reference(name, Tagger.GIVEN, _translated(raw, tags, attribute)))
        shared = [r for r in here if len(np.unique(r.known[r.known != UNKNOWN])) >= 2]
        if shared:
            found[j] = tuple(shared)
    return found


def judge(
    schema: Schema,
    codes: Codes,
    sample: npt.NDArray[np.int64],
    retagged: Mapping[int, Codes],
    known: Mapping[int, Sequence[Reference]],
    min_kappa: float,
) -> list[AttributeQuality]:
    """What is known of each attribute of a table with `codes` (N, A).

    `retagged` are by position of an attribute the codes (n,) that the rows `sample` (n,) got the second time, `known`
    the references of (N,) codes. An attribute is doubtful when a kappa lies below `min_kappa`, or when fewer than half
    of the sample was told both times.
    """
    return [
        _judged(attribute, codes[:, j], sample, retagged.get(j), known.get(j, ()), min_kappa)
        for j, attribute in enumerate(schema.attributes)
    ]


def _judged(
    attribute: Attribute,
    codes: Codes,
    sample: npt.NDArray[np.int64],
    again: Codes | None,
    known: Sequence[Reference],
    min_kappa: float,
) -> AttributeQuality:
    doubts: list[str] = []
    second = None if again is None else agreement(codes[sample], again)
    if second is not None:
        if 2 * second.compared < len(sample):
            doubts.append(f"of {len(sample)} instances only {second.compared} were told both times")
        elif second.kappa is not None and second.kappa < min_kappa:
            doubts.append(_low("tagged again", second, min_kappa))
    others = [(r.name, r.tagger, agreement(codes, r.known)) for r in known]
    for name, tagger, found in others:
        if found.compared >= MIN_COMPARED and found.kappa is not None and found.kappa < min_kappa:
            doubts.append(_low(f"beside '{name}', which is {tagger.value},", found, min_kappa))
    not_visible = attribute.code(NOT_VISIBLE)
    return AttributeQuality(
        attribute=attribute.name,
        tagger=attribute.tagger,
        unknown_share=float((codes == UNKNOWN).mean()),
        not_visible_share=0.0 if not_visible == UNKNOWN else float((codes == not_visible).mean()),
        retagged=second,
        references=tuple(others),
        doubt="; ".join(doubts),
    )


def _low(how: str, found: Agreement, min_kappa: float) -> str:
    return f"{how} {found.share:.0%} agree, which is {found.kappa:.2f} after chance (kappa), below {min_kappa:g}"


def _translated(codes: Codes, tags: Sequence[str], attribute: Attribute) -> Codes:
    """`codes` of `tags` as those of `attribute`, by the tags' words; UNKNOWN for what it has no tag for."""
    own = {tag.casefold(): i for i, tag in enumerate(attribute.tags)}
    table = np.array([own.get(tag.strip().casefold(), UNKNOWN) for tag in tags], dtype=np.uint16)
    out = np.full(len(codes), UNKNOWN, dtype=np.uint16)
    held = codes < len(tags)
    out[held] = table[codes[held]]
    return out


def _words(name: str) -> frozenset[str]:
    words = name.casefold().replace("_", " ").replace("-", " ").split()
    return frozenset(words) - _IDLE_WORDS or frozenset(words)


def _meanings(attribute: Attribute) -> set[frozenset[str]]:
    names = {attribute.name} | ({attribute.measure.name} if attribute.measure else set())
    return {_words(name) for name in names}
