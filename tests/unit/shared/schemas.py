"""Random schemas that obey the rules, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from shared.schema import Attribute, Category, Measure, Schema, Tagger, Task

_FORBIDDEN = "=|;,\x7f"
# Text as people write it: no control characters, no surrogates, no blank at either end.
words = (
    st.text(
        st.characters(min_codepoint=32, exclude_characters=_FORBIDDEN, exclude_categories=["Cs", "Cc", "Z"]),
        min_size=1,
        max_size=12,
    )
    .filter(lambda word: word.casefold() not in ("unknown", "instance_id") and not word.isspace())
    .filter(lambda word: not word.startswith("is "))
)


def _unique(least: int, most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(words, min_size=least, max_size=most, unique_by=str.casefold)


@st.composite
def attributes(draw: st.DrawFn, name: str) -> Attribute:
    tagger = draw(st.sampled_from(list(Tagger)))
    tags = tuple(draw(_unique(1 if tagger is Tagger.GIVEN else 2, 5)))
    measure = None
    if tagger is Tagger.MEASURED:
        finite = st.floats(-1e6, 1e6)
        edges = draw(st.lists(finite, min_size=len(tags) - 1, max_size=len(tags) - 1, unique=True).map(sorted))
        measure = Measure(draw(words), tuple(edges) if draw(st.booleans()) else ())
    return Attribute(
        name,
        draw(st.sampled_from(list(Category))),
        tags,
        tagger,
        description=draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
        measure=measure,
        sources=tuple(draw(_unique(0, 2))),
        locked=draw(st.booleans()),
    )


@st.composite
def schemas(draw: st.DrawFn, most: int = 4) -> Schema:
    names = draw(_unique(1, most))
    return Schema(
        draw(st.sampled_from(list(Task))),
        tuple(draw(_unique(0, 3))),
        tuple(draw(attributes(name)) for name in names),
    )
