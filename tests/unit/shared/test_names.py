from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidInput
from shared.names import Name, check_id, content_id, dataset_id, parse, parse_any

ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True).filter(lambda text: ".." not in text)


@given(ids, ids)
def test_a_name_is_read_back_as_it_was_written(dataset, id_):
    name = Name(dataset, "taggings", id_)
    assert parse(str(name), "taggings", "name") == name
    assert parse(str(name), "taggings", "name", within=dataset) == name
    assert parse_any(str(name), ("rankings", "taggings"), "name") == name
    assert dataset_id(name.parent, "parent") == dataset


@given(st.text(max_size=80))
def test_an_id_never_leads_out_of_its_folder(text):
    try:
        found = check_id(text, "id")
    except InvalidInput:
        return
    else:
        assert found == text
        assert text.isascii()
        assert text.isprintable()
        assert not set(text) & set("/\\ ")
        assert text not in ("", ".", "..")


@pytest.mark.parametrize("text", ["", ".", "..", "a..b", "a/b", "a\n", "-a", "ä", "a" * 64, " a"])
def test_what_is_no_id_is_refused(text):
    with pytest.raises(InvalidInput, match="dataset_id"):
        check_id(text, "dataset_id")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "datasets",
        "datasets/a",
        "datasets/a/taggings",
        "datasets/a/taggings/b/c",
        "datasets/a/rankings/b",
        "things/a/taggings/b",
        "datasets//taggings/b",
        "datasets/a/taggings/",
        "datasets/../taggings/b",
        "/datasets/a/taggings/b",
        "datasets/a/taggings/b\n",
    ],
)
def test_what_is_no_name_is_refused(text):
    for read in (parse, lambda text, c, f: parse_any(text, (c, "models"), f)):
        with pytest.raises(InvalidInput) as refused:
            read(text, "taggings", "tagging")
        assert refused.value.violations[0].field == "tagging"


def test_a_name_of_another_dataset_is_refused():
    with pytest.raises(InvalidInput, match="another dataset than 'b'"):
        parse("datasets/a/models/m", "models", "model", within="b")


@pytest.mark.parametrize("text", ["a", "datasets/a/b", "datasets/", "datasets/a b"])
def test_what_names_no_dataset_is_refused(text):
    with pytest.raises(InvalidInput, match="parent"):
        dataset_id(text, "parent")


@given(st.dictionaries(st.text(min_size=1), st.integers() | st.text() | st.lists(st.text()), max_size=4), st.randoms())
def test_equal_parts_give_equal_ids_in_any_order(parts, random):
    order = list(parts)
    random.shuffle(order)
    assert content_id(**parts) == content_id(**{key: parts[key] for key in order})
    check_id(content_id(**parts), "id")
    assert content_id(**parts) != content_id(**parts, another=1) or "another" in parts
