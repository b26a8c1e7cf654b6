"""Tags as people type them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibug2 import UserError, typed

# What an attribute or a tag may be called, less what has to be quoted.
NAMES = st.text(st.characters(categories=("L", "N", "P"), exclude_characters='=|;,:"'), min_size=1, max_size=8)
TAGS = NAMES | st.tuples(NAMES, NAMES).map(", ".join) | st.tuples(NAMES, NAMES).map(":".join)


def written(tag):
    return f'"{tag}"' if "," in tag else tag


@given(st.dictionaries(NAMES, st.lists(TAGS, min_size=1, max_size=3), max_size=3))
def test_what_is_typed_is_what_is_asked(terms):
    texts = [f"{attribute}: {', '.join(map(written, tags))}" for attribute, tags in terms.items()]
    assert typed.any_of(texts, "terms") == terms


@given(st.dictionaries(NAMES, NAMES, min_size=1, max_size=3), st.floats(0, 1))
def test_a_threshold_is_tags_and_a_limit(tags, limit):
    text = ",".join(f"{attribute}:{tag}" for attribute, tag in tags.items())
    assert typed.threshold(f"{text}={limit}", "--threshold") == (tags, limit)


@pytest.mark.parametrize("text", ["", "pose", "pose:", ": lying", "pose: a,, b", "pose: a,", "pose: a\nb\r, c"])
def test_terms_that_cannot_be_read(text):
    with pytest.raises(UserError, match=r"^terms: "):
        typed.any_of([text], "terms")


def test_an_attribute_is_named_once():
    with pytest.raises(UserError, match="names 'pose' twice"):
        typed.any_of(["pose: a", "pose: b"], "terms")
    with pytest.raises(UserError, match="names 'pose' twice"):
        typed.threshold("pose: a, pose: b=0.1", "--threshold")


@pytest.mark.parametrize("text", ["pose: a", "pose: a=", "pose: a=x", "pose: a=2", "pose: a=nan", "=0.1", "pose=0.1"])
def test_thresholds_that_cannot_be_read(text):
    with pytest.raises(UserError, match=r"^--threshold: "):
        typed.threshold(text, "--threshold")


def test_a_severity_is_a_name_how_far_and_a_limit():
    assert typed.severity("very grave: 0.3=0.02", "--severity") == ("very grave", 0.3, 0.02)
    for text in ("grave: 0.3", "grave=0.02", "grave: x=0.02", ": 0.3=0.02", "grave: 0.3=2"):
        with pytest.raises(UserError, match=r"^--severity: "):
            typed.severity(text, "--severity")


def test_models_come_with_their_picks():
    assert typed.trained_with(["v2=random", "v3=s1#margin"], "--compare", "") == {"v2": "random", "v3": "s1#margin"}
    for text in ("v2", "v2=", "=random"):
        with pytest.raises(UserError, match=f"^--compare: '{text}' is not MODEL=PICKS"):
            typed.trained_with([text], "--compare", "MODEL=PICKS")
    with pytest.raises(UserError, match="names 'v2' twice"):
        typed.trained_with(["v2=random", "v2=lowest_mean"], "--compare", "MODEL=PICKS")
