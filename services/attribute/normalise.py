"""The conventions of names and tag sets, held by code whatever a language model answers (paper 3.2.2, A.1.1, A.8)."""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest

from shared.schema import NOT_VISIBLE, UNKNOWN_TAG, Attribute, Category, Tagger

# Where an attribute came from.
DIRECT = "direct"
COMPARISON = "comparison"
DIFFICULTY = "difficulty"
USER = "user"

Proposed = Mapping[Category, Sequence[tuple[str, str]]]  # names and descriptions, as a model gave them

MAX_GATHERED = 200  # what is checked in one question; no dataset has so many that differ
_OBJECT = "object"
_MAX_WORDS = 8
_MAX_CHARACTERS = 60
_MAX_DESCRIPTION = 300
_OTHER = "other"
_YES_NO = ("yes", "no")

_SPELLINGS = {
    "colour": "color",
    "colours": "color",
    "coloured": "colored",
    "grey": "gray",
    "presence": "present",
    "presented": "present",
    "blurriness": "blur",
    "blurry": "blur",
    "blurred": "blur",
    "kind": "type",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that do not tell one attribute from another.
_FILLERS = _words("is of in on at to with and or image picture photo overall level amount degree general visual")
_ARTICLES = _words("a an the")
_QUESTIONS = _words("are does do has have whether if")
_VAGUE = _words(
    "object background foreground scene setting appearance look quality style feature attribute property "
    "detail characteristic condition"
)
_CLASS_WORDS = _words("object main class category label name identity subject")

# What else people call the things that are measured from pixels, by the name of the measure.
_MEASURED_AS: Mapping[str, tuple[str, ...]] = {
    "brightness": ("exposure", "darkness", "lighting brightness", "lighting intensity", "light intensity"),
    "contrast": ("contrast ratio", "color contrast"),
    "saturation": ("color saturation", "color intensity", "color vividness", "colorfulness"),
    "sharpness": ("blur", "focus", "clarity", "image clarity"),
    "noise": ("grain", "graininess", "noisiness"),
    "color_temperature": ("white balance", "color warmth"),
    "dominant_color": ("main color", "color scheme", "color palette"),
    "resolution": ("size", "pixel count"),
    "orientation": ("format", "aspect ratio"),
    "background_clutter": ("clutter", "background complexity", "scene clutter", "background busyness"),
    "object_color": ("color", "object dominant color", "object main color", "object primary color"),
    "object_brightness": ("object lightness", "object exposure"),
    "object_extent": ("object size", "object scale", "object relative size"),
    "object_resolution": ("object pixel size",),
    "object_aspect": ("object aspect ratio", "object proportions"),
    "object_horizontal_position": ("object position horizontally", "object position", "object location"),
    "object_vertical_position": ("object position vertically", "object height in frame", "object position in frame"),
    "object_symmetry": ("symmetry",),
    "object_texture": ("object texture strength",),
    "object_truncation": ("is object at border", "is object truncated", "is object cut off", "object cropping"),
}


@dataclass(frozen=True)
class Candidate:
    """An attribute whose name obeys the conventions and whose tags are not known yet."""

    name: str
    category: Category
    description: str
    sources: tuple[str, ...] = (DIRECT,)


@dataclass(frozen=True)
class Dropped:
    """What was left out of the schema, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Merged:
    """What stands in the schema under another name, and why."""

    name: str
    into: str
    reason: str


class Gathering:
    """The attributes named so far, each once, with everything that named it.

    Names become short, lower case and clean, with "object" in place of each of `main_objects`. What is vague, the
    class itself, already covered by `taken`, or among the measures in `measurable` is dropped, with the reason.
    """

    def __init__(
        self, main_objects: Sequence[str], taken: Sequence[Attribute] = (), measurable: Sequence[str] = ()
    ) -> None:
        self.dropped: list[Dropped] = []
        self._main_objects = tuple(main_objects)
        self._found: dict[frozenset[str], Candidate] = {}
        self._covered = {
            key: "is measured, and does not tell these images apart" for m in measurable for key in _keys_of(m)
        }
        for attribute in taken:
            self._covered |= dict.fromkeys(_taken_keys(attribute), f"says the same as '{attribute.name}'")

    @property
    def candidates(self) -> list[Candidate]:
        """In the order in which they were named first."""
        return list(self._found.values())

    @property
    def names(self) -> list[str]:
        return [candidate.name for candidate in self._found.values()]

    def copy(self) -> Gathering:
        """The same, to try out what an answer would bring."""
        twin = copy.copy(self)
        twin.dropped, twin._found = list(self.dropped), dict(self._found)
        return twin

    def add(self, proposed: Proposed, source: str) -> int:
        """Take in what `source` proposed, by category and in the order given; how many are new."""
        before = len(self._found)
        told: set[frozenset[str]] = set()  # by this source, in this answer
        for category in Category:
            for raw, description in proposed.get(category, ()):
                name = clean_name(raw, self._main_objects)
                key = overlap_key(name)
                reason = _unfit(name, key, several_classes=len(self._main_objects) > 1) or self._covered.get(key, "")
                if not reason and key in self._found:
                    known = self._found[key]
                    if key in told:
                        reason = f"says the same as '{known.name}'"
                    elif source not in known.sources:
                        self._found[key] = replace(known, sources=(*known.sources, source))
                elif not reason and len(self._found) >= MAX_GATHERED:
                    reason = f"over the {MAX_GATHERED} that are looked into"
                elif not reason:
                    line = clean_line(description)[:_MAX_DESCRIPTION].strip()
                    self._found[key] = Candidate(name, category, line, (source,))
                if reason:
                    self.dropped.append(Dropped(_clean(raw)[:80], reason))
                else:
                    told.add(key)
        return len(self._found) - before

    def add_own(self, own: Sequence[Candidate]) -> None:
        """Take in what the user named, under the user's names; what is covered already is dropped."""
        for candidate in own:
            key = overlap_key(candidate.name) or frozenset((candidate.name,))
            reason = self._covered.get(key, "")
            if not reason and key in self._found:
                reason = f"says the same as '{self._found[key].name}'"
            if reason:
                self.dropped.append(Dropped(candidate.name, reason))
            else:
                self._found[key] = candidate


def checked(
    candidates: Sequence[Candidate],
    known: Sequence[str],
    merges: Sequence[tuple[str, str, str]],
    drops: Sequence[tuple[str, str]],
) -> tuple[list[Candidate], list[Merged], list[Dropped]]:
    """`candidates` after the self-check: less `merges` (name, into, reason) and `drops` (name, reason).

    An attribute goes into another candidate, which takes over its sources, or into one of `known`, which need no
    model. What the user named stays; merges that lead nowhere or in a circle are passed over.
    """
    left = {candidate.name: candidate for candidate in candidates}
    gone: dict[str, str] = {}  # a merged name -> where it went
    merged: list[Merged] = []
    dropped: list[Dropped] = []
    for name, reason in drops:
        if name in left and USER not in left[name].sources:
            del left[name]
            dropped.append(Dropped(name, clean_line(reason)[:_MAX_DESCRIPTION] or "is unfit"))
    for name, target, reason in merges:
        into = target
        while into in gone:
            into = gone[into]
        if name in left and USER in left[name].sources:
            name, into = into, name
        if name not in left or name == into or USER in left[name].sources:
            continue
        why = clean_line(reason)[:_MAX_DESCRIPTION] or "says the same"
        if into in left:
            sources = dict.fromkeys((*left[into].sources, *left[name].sources))
            left[into] = replace(left[into], sources=tuple(sources))
            merged.append(Merged(name, into, why))
        elif into in known:
            dropped.append(Dropped(name, f"says the same as '{into}': {why}"))
        else:
            continue
        gone[name] = into
        del left[name]
    return list(left.values()), merged, dropped


def limited(candidates: Sequence[Candidate], limit: int) -> tuple[list[Candidate], list[Dropped]]:
    """At most `limit` of `candidates`: the user's, then the categories in turn, in each what most sources named."""
    own = [c for c in candidates if USER in c.sources]
    by_category: dict[Category, list[Candidate]] = {category: [] for category in Category}
    for candidate in sorted(candidates, key=lambda c: -len(c.sources)):
        if USER not in candidate.sources:
            by_category[candidate.category].append(candidate)
    ranked = [*own, *(c for rank in zip_longest(*by_category.values()) for c in rank if c is not None)]
    chosen = set(ranked[:limit])
    over = [Dropped(c.name, f"over the limit of {limit} attributes") for c in ranked[limit:]]
    return [c for category in Category for c in candidates if c.category is category and c in chosen], over


def attributes(
    chosen: Sequence[Candidate], tag_lists: Mapping[str, Sequence[str]], max_tags: int
) -> tuple[list[Attribute], list[Dropped]]:
    """`chosen` with the tags that `tag_lists` has under their names; those left with fewer than two are dropped.

    Tags of "is …" attributes are yes and no. An attribute whose tags are yes and no becomes "is …", unless the user
    named it. Background attributes can be "not visible". `max_tags` is at least 4.
    """
    kept: list[Attribute] = []
    dropped: list[Dropped] = []
    for candidate in chosen:
        tags = clean_tags(candidate.name, candidate.category, tag_lists.get(candidate.name, ()), max_tags)
        name = candidate.name  # made a question it still has its own overlap key, so it stays unique
        if tags[:2] == _YES_NO and not name.startswith("is ") and USER not in candidate.sources:
            name = f"is {name}"
        if len(tags) < 2:
            dropped.append(Dropped(name, "has fewer than two tags"))
        else:
            about = candidate.description
            kept.append(Attribute(name, candidate.category, tags, Tagger.VLM, about, sources=candidate.sources))
    return kept, dropped


def clean_name(raw: str, main_objects: Sequence[str]) -> str:
    """`raw` as names are written: lower case, no articles, "is …" for questions, "object" for the class."""
    words = [word for word in _clean(raw).replace("?", " ").split() if word not in _ARTICLES]
    if len(words) > 1 and words[0] in _QUESTIONS:
        has, words = words[0] in ("has", "have"), words[1:]
        words = ["is", *words, "present"] if has else words if words[0] == "is" else ["is", *words]
    name = " ".join(words)
    name = _class_pattern(tuple(main_objects)).sub(_OBJECT, name)
    return re.sub(r"\bobject(?: object)+\b", _OBJECT, name)


def overlap_key(name: str) -> frozenset[str]:
    """The words that a name rests on: equal keys are the same property in other words."""
    words = (_stem(word) for word in re.findall(r"[^\W_]+", name.casefold()))
    return frozenset(word for word in words if word not in _FILLERS and word not in _ARTICLES)


def clean_tags(name: str, category: Category, raw: Sequence[str], max_tags: int) -> tuple[str, ...]:
    """The closed tag set of one attribute, at most `max_tags`; may be shorter than two when `raw` holds no more.

    Same words and spellings are one tag; what stands for no answer, for all answers, or covers single colors is
    left out; "not visible" comes last. Over `max_tags`, the last tags give way to "other".
    """
    tags: dict[tuple[str, ...], str] = {}
    for text in raw:
        tag = re.sub(r"^(?:(?:a|an|the) )+", "", _clean(text))
        tag = _SAME_TAG.get(tag_key(tag), tag)
        if tag and len(tag) <= _MAX_CHARACTERS and tag_key(tag) not in _NO_ANSWER:
            tags.setdefault(tag_key(tag), tag)
    absent = tags.pop(tag_key(NOT_VISIBLE), None) is not None
    found = list(tags.values())
    if name.startswith("is ") or set(_YES_NO) <= set(found) or (found and set(found) <= set(_YES_NO)):
        return (*_YES_NO, NOT_VISIBLE) if absent else _YES_NO
    found = _without(found, _CATCH_ALL)
    if "color" in overlap_key(name):
        found = _without(found, _MANY_COLORS)
    absent = absent or (category is Category.BACKGROUND and len(found) > 1)
    room = max_tags - absent
    if len(found) > room:
        found = [*[tag for tag in found if tag != _OTHER][: room - 1], _OTHER]
    return (*found, NOT_VISIBLE) if absent else tuple(found)


def _without(tags: list[str], overlapping: frozenset[tuple[str, ...]]) -> list[str]:
    """`tags` less those that overlap the rest, as long as two are left."""
    left = [tag for tag in tags if tag_key(tag) not in overlapping]
    return left if len(left) > 1 else tags


@lru_cache(maxsize=16)
def _class_pattern(main_objects: tuple[str, ...]) -> re.Pattern[str]:
    """Whatever names one of `main_objects`, in singular or plural; a single character could stand for anything."""
    names = {"main object"}
    for main_object in main_objects:
        whole = " ".join(word for word in _clean(main_object).split() if word not in _ARTICLES)
        names |= {whole, *(part.strip() for part in whole.split("/") if len(part.strip()) > 3)}
    longest_first = sorted((name for name in names if len(name) > 1), key=lambda name: (-len(name), name))
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?:es|s|'s)?(?![\w-])")


def _unfit(name: str, key: frozenset[str], several_classes: bool) -> str:
    if not key:
        return "is no name"
    if len(name.split()) > _MAX_WORDS or len(name) > _MAX_CHARACTERS:
        return f"is longer than {_MAX_WORDS} words or {_MAX_CHARACTERS} characters"
    if key <= _CLASS_WORDS or (several_classes and key == {"object", "type"}):
        return "is the class, which is known"
    if key <= _VAGUE:
        return "is too vague to be told from an image"
    return ""


def _taken_keys(attribute: Attribute) -> set[frozenset[str]]:
    keys = {overlap_key(attribute.name)} - {frozenset()}
    return keys | _keys_of(attribute.measure.name) if attribute.measure is not None else keys


def _keys_of(measure: str) -> set[frozenset[str]]:
    """The overlap keys of everything that `measure` is called."""
    called = (measure.replace("_", " "), *_MEASURED_AS.get(measure, ()))
    return {key for key in map(overlap_key, called) if key}


def tag_key(tag: str) -> tuple[str, ...]:
    """The words of `tag` without their endings and spellings: equal keys are one tag."""
    return tuple(_stem(word) for word in re.split(r"[\s-]+", tag.casefold()))


def _stem(word: str) -> str:
    word = _SPELLINGS.get(word, word)
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _clean(raw: str) -> str:
    """`raw` in lower case, without what names and tags may not hold, with single spaces."""
    return re.sub(r"[\s=|;,_]+", " ", clean_line(raw).lower()).strip(" .:!?\"'`*-–—")


def clean_line(raw: str) -> str:
    """`raw` on one line, in composed characters that can be stored and shown."""
    text = unicodedata.normalize("NFKC", raw)
    shown = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in text)
    return " ".join(shown.split())


_SAME_TAG: Mapping[tuple[str, ...], str] = {
    tag_key(other): tag
    for tag, others in {
        "large": ("big",),
        "small": ("little",),
        "yes": ("yes", "true"),
        "no": ("no", "false"),
        _OTHER: (_OTHER,),
        NOT_VISIBLE: (NOT_VISIBLE, "absent", "invisible", "none visible", "not applicable", "not present", "n/a"),
    }.items()
    for other in others
}
_NO_ANSWER = frozenset(
    map(tag_key, (UNKNOWN_TAG, "unclear", "unsure", "uncertain", "undetermined", "cannot tell", "not sure"))
)
_CATCH_ALL = frozenset(map(tag_key, ("any", "all", "various", "varied")))
_MANY_COLORS = frozenset(
    map(tag_key, ("multicolor", "multicolored", "multi-color", "multi-colored", "mixed", "colorful"))
) | frozenset(map(tag_key, ("multiple colors", "several colors")))
