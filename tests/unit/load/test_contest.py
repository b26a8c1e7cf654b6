"""The contest between tools: differences are fatal, late ones are stopped, samples are checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from services.enumeration.engine import enumerate_slices
from tests.load import samples
from tests.load.contest import check_counts, contest
from tests.load.found import Found, fingerprint, keys_of
from tests.load.page import write_section
from tests.load.rivals import RIVALS
from tests.load.samples import Disagreement
from tests.load.shapes import Table, paper_table

GRAM, NUMPY = "one-hot matmul a parent, numpy", "paper's Algorithm 3, numpy"
OWN = {"HiBug2", NUMPY, GRAM}


def _found(given: Table, max_depth: int, min_count: int = 10) -> tuple[np.ndarray, Found]:
    slices = enumerate_slices(given.codes, given.tag_counts, given.scores, min_count=min_count, max_depth=max_depth)
    keys = keys_of(slices.items, int(given.offsets[-1]))
    return slices.items, Found(keys, slices.count, np.rint(slices.total[:, 0]).astype(np.int64))


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("max_depth", [2, 3, 4])
def test_every_rival_is_read_right(name: str, max_depth: int) -> None:
    """Those that are installed: the benchmark's own requirements are no part of the development setup."""
    given, rival = Table(*paper_table(250, 6)), RIVALS[name]
    if name not in OWN:
        pytest.importorskip({"pyfim": "fim", "DivExplorer": "divexplorer"}.get(rival.distribution, rival.distribution))
    run, read = rival.prepare(given, 10, max_depth)
    found = read(run())
    if rival.lists_all:
        _, ours = _found(given, max_depth)
        assert fingerprint(found).disagrees(fingerprint(ours)) is None
    else:
        assert len(found.keys)
        check_counts(given, found, max_depth)


def test_two_that_agree_are_timed_and_one_that_is_late_is_stopped(tmp_path: Path) -> None:
    given = Table(*paper_table(400, 8))
    options = {"min_count": 10, "max_depth": 3, "rounds": 2, "enough_s": 60.0}
    outcomes = contest(given, ["HiBug2", GRAM], tmp_path, limit_s=60.0, **options)
    assert [len(o.seconds) for o in outcomes] == [2, 2]
    assert outcomes[0].found == outcomes[1].found
    late = contest(given, ["HiBug2", GRAM], tmp_path, limit_s=60.0, **(options | {"enough_s": 0.0}))
    assert [len(o.seconds) for o in late] == [1, 1]
    long = Table(*paper_table(4_000, 47))
    with pytest.raises(Disagreement, match=r"not finished in 0\.05 s"):
        contest(long, [NUMPY], tmp_path, limit_s=0.05, **(options | {"max_depth": 4}))


@pytest.mark.parametrize("method", [samples.naive, samples.tree])
def test_a_sample_is_checked_and_a_wrong_answer_is_found_out(method: object) -> None:
    given = Table(*paper_table(300, 6))
    items, found = _found(given, 3)
    seconds, checked = method(samples.Known(given, items, found), 10, 0)
    assert seconds > 0
    assert 0 < checked <= len(items)
    wrong = Found(found.keys, found.count + 1, found.total)
    with pytest.raises(Disagreement, match="which is not so"):
        method(samples.Known(given, items, wrong), 10, 0)
    half = len(items) // 2
    fewer = Found(found.keys[:half], found.count[:half], found.total[:half])
    with pytest.raises(Disagreement, match="where there should be"):
        method(samples.Known(given, items[:half], fewer), 10, 0)


def test_a_wrong_count_of_a_partial_list_is_found_out() -> None:
    given = Table(*paper_table(300, 6))
    _, found = _found(given, 3)
    check_counts(given, Found(found.keys[:5], found.count[:5], found.total[:5]), 3)
    with pytest.raises(Disagreement):
        check_counts(given, Found(found.keys[:5], found.count[:5] + 1, found.total[:5]), 3)


def test_a_section_replaces_itself_and_leaves_the_others(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    write_section("one", "first", page)
    write_section("two", "second", page)
    write_section("one", "third", page)
    text = page.read_text()
    assert "first" not in text
    assert text.index("third") < text.index("second")
    assert text.count("<!-- one: begin -->") == 1
