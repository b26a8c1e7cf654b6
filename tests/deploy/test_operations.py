"""What the operations page promises is held by tests that are there, and it names settings that are there."""

from __future__ import annotations

import ast
import re

from deploy.images.build import ROOT
from deploy.tools import chart

PAGE = (ROOT / "docs" / "operations.md").read_text()
RUNBOOKS = "".join(path.read_text() for path in (ROOT / "deploy" / "dashboards" / "runbooks").glob("*.md"))


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, its first two lines aside."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_row_of_what_dies_names_a_test_that_is_there() -> None:
    found = rows("What happens when each part dies")
    assert len(found) > 10
    for row in found:
        named = re.findall(r"`(tests/\S+\.py)::(\w+)`", row[-1])
        assert named, f"no test holds the row '{row[0]}'"
        for path, name in named:
            functions = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(n, "name")}
            assert name in functions, f"{path} has no test {name}, which the row '{row[0]}' names"


def test_sizing_is_measured() -> None:
    for row in rows("Sizing"):
        assert re.search(r"\d", row[1]), row
    assert len(rows("Sizing")) >= 6


def test_settings_that_are_named_are_there() -> None:
    known = {name for service in set(chart.COMPONENTS.values()) for name in chart.variables(service)}
    for name in re.findall(r"HIBUG2_[A-Z0-9_]+", PAGE + RUNBOOKS):
        assert name in known, f"{name} is no setting of a service"


def test_values_that_are_named_are_there() -> None:
    values = {value.path for value in chart.documented((chart.CHART / "values.yaml").read_text())}
    tops = {"llm", "store", "redis", "images", "tls", "jobs", "metrics", "networkPolicy", "ingress", "route", "traces"}
    for name in re.findall(r"`((?:\w+\.)+\w+)`", PAGE + RUNBOOKS):
        if name.split(".")[0] in tops and not name.endswith("…To"):
            assert name in values or any(v.startswith(f"{name}.") for v in values), f"{name} is no value of the chart"
