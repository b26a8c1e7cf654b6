"""Reports of models that are always right, and always wrong."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.report.render import _axis, render
from tests.unit.gateway import test_report_gather as ranked


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_model_with_the_same_score_everywhere_has_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float
) -> None:
    codes, scores = ranked.table()
    scores[~np.isnan(scores)] = score
    monkeypatch.setattr(ranked, "table", lambda: (codes, scores))
    data = ranked.report(tmp_path)
    assert data.overall_mean == score
    assert data.error_slices == ()
    assert f"{100 * score:.1f}%" in render(data)


@given(st.lists(st.floats(0, 1), min_size=1))
def test_an_axis_holds_every_mean_and_has_a_length(means: list[float]) -> None:
    low, high = _axis(means)
    assert 0 <= low <= min(means) <= max(means) <= high <= 1
    assert low < high
