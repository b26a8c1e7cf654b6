"""Slices of a table that is sent along: every one, those of a class, error slices alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hibug2.client import Client, ErrorRule
from hibug2.errors import HiBug2Error
from tests.load.shapes import paper_table


@pytest.fixture(scope="module")
def table() -> pa.Table:
    codes, _, scores = paper_table(600, 5)
    columns = {f"a{i}": [f"t{c}" for c in codes[:, i]] for i in range(codes.shape[1])}
    return pa.table({**columns, "score": scores[:, 0]})


def keys(found: pa.Table) -> list[frozenset[tuple[str, str]]]:
    return [frozenset((p["attribute"], p["tag"]) for p in tags) for tags in found["tags"].to_pylist()]


def extent(table: pa.Table, key: frozenset[tuple[str, str]]) -> np.ndarray:
    held = np.ones(table.num_rows, dtype=bool)
    for attribute, tag in key:
        held &= np.array(table[attribute].to_pylist()) == tag
    return held


def test_slices_that_hold_a_column_are_those_among_all(client: Client, table: pa.Table) -> None:
    everything = client.enumerate(table, ["score"])
    held = client.enumerate(table, ["score"], must_hold="a2")
    expected = [key for key in keys(everything) if any(attribute == "a2" for attribute, _ in key)]
    assert keys(held) == expected
    assert 0 < len(expected) < everything.num_rows


def test_error_slices_alone_are_those_of_the_rule(client: Client, table: pa.Table) -> None:
    everything = client.enumerate(table, ["score"])
    mean = dict(zip(keys(everything), everything["score_mean"].to_pylist(), strict=True))
    overall = float(np.mean(table["score"]))
    mean[frozenset()] = overall
    expected = {
        key: m for key, m in mean.items() if key and m < overall - 0.1 and m < min(mean[key - {pair}] for pair in key)
    }
    found = client.enumerate(table, ["score"], errors=ErrorRule("score", 0.1))
    assert set(keys(found)) == set(expected)
    means = found["score_mean"].to_pylist()
    assert means == sorted(means)
    lost = 1 - np.array(table["score"])
    for key, row in zip(keys(found), found.to_pylist(), strict=True):
        rows = extent(table, key)
        assert row["count"] == rows.sum()
        assert row["drop"] == pytest.approx(overall - expected[key])
        assert row["parent_drop"] == pytest.approx(min(mean[key - {pair}] for pair in key) - expected[key])
        assert row["error_share"] == pytest.approx(lost[rows].sum() / lost.sum())
        assert row["interval_low"] <= row["score_mean"] <= row["interval_high"]
    top = client.enumerate(table, ["score"], errors=ErrorRule("score", 0.1, top=3))
    assert top.equals(found.slice(0, 3))


def test_a_result_that_does_not_fit_memory_comes_from_a_file(
    client: Client, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = client.enumerate(table, ["score"])
    monkeypatch.setattr("services.enumeration.spill.IN_MEMORY", 100)
    assert client.enumerate(table, ["score"]).equals(expected)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"must_hold": "ghost"}, "must_hold"),
        ({"errors": ErrorRule("ghost")}, "error_rule.score_column"),
        ({"errors": ErrorRule("score", margin=1.5)}, "margin"),
        ({"errors": ErrorRule("score", top=-1)}, "error_rule.max_slices"),
        ({"scores": [], "errors": ErrorRule("")}, "score_columns"),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(client: Client, table: pa.Table, asked: dict, field: str) -> None:
    with pytest.raises(HiBug2Error) as caught:
        client.enumerate(table, **{"scores": ["score"], **asked})
    assert caught.value.code == "INVALID_ARGUMENT"
    assert [v.field for v in caught.value.violations] == [field]
