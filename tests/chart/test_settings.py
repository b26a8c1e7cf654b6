"""The chart knows every setting of every service: it sets it, or its schema lets people set it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deploy.tools import chart
from tests.chart.conftest import CHART, ROOT, Manifests, Run, load_all

# Deployment -> values block
BLOCKS = {name: name for name in chart.COMPONENTS if name != "taggingWorkers"} | {"tagging-workers": "taggingWorkers"}


def test_every_setting_has_a_place() -> None:
    for block, service in chart.COMPONENTS.items():
        schema = json.loads((CHART / "values.schema.json").read_text())
        free = schema["definitions"][f"settings-{block}"]["properties"].keys()
        ours = chart.set_by_chart() | {"HIBUG2_PROMPTS_DIR"}
        for name in chart.variables(service):
            assert name in free | ours, (
                f"{name} of services/{service} is new. If each installation may choose it, run `make chart`, which "
                f"adds it to {block}.settings in values.schema.json; if the chart must set it, add it to "
                "hibug2.settings in templates/_helpers.tpl"
            )
        gone = free - chart.variables(service).keys()
        assert not gone, f"services/{service} reads {sorted(gone)} no longer: run `make chart`"


def test_what_the_chart_sets_is_read_by_a_service() -> None:
    read = {name for service in set(chart.COMPONENTS.values()) for name in chart.variables(service)}
    assert chart.set_by_chart() - read == set(), "the chart sets what no Settings class reads"


def test_what_make_chart_writes_is_committed() -> None:
    for path, text in chart.written().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is behind: run `make chart`"


def test_the_table_names_every_value() -> None:
    text = (CHART / "values.yaml").read_text()
    named = {value.path for value in chart.documented(text)}
    blocks = set(chart.COMPONENTS) - {"gateway"}  # described once

    def leaves(value: object, path: str) -> list[str]:
        if isinstance(value, dict) and value and path not in named:
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}" if path else key)]
        return [path]

    for path in leaves(yaml.safe_load(text), ""):
        assert path in named or path.partition(".")[0] in blocks, path


def test_blocks_have_one_shape() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    shapes = {block: (values[block].keys(), values[block]["autoscaling"].keys()) for block in chart.COMPONENTS}
    assert all(shape == shapes["gateway"] for shape in shapes.values())


@pytest.mark.parametrize("block", sorted(chart.COMPONENTS))
def test_a_free_setting_reaches_its_pods(run_helm: Run, tmp_path: Path, block: str) -> None:
    name = sorted(chart.left_to_people(chart.COMPONENTS[block]))[0]
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({block: {"settings": {name: "3"}}}))
    done = run_helm("template", "hibug2", CHART, "--values", file)
    assert done.returncode == 0, done.stderr
    rendered = Manifests(tuple(load_all(done.stdout)))
    component = next(c for c, b in BLOCKS.items() if b == block)
    assert rendered.of("ConfigMap")[f"hibug2-{component}"]["data"][name] == "3"
