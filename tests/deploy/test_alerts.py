"""Alerts and dashboard ask for metrics that are there, speak when they should, and say what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from deploy.images.build import ROOT

FILES = ROOT / "charts" / "hibug2" / "files"
DASHBOARDS = ROOT / "deploy" / "dashboards"
# Of prometheus_client itself, for every process.
OF_EVERY_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total"}


@pytest.fixture(scope="module")
def alerts() -> dict[str, dict[str, Any]]:
    (group,) = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not here: `apt-get install prometheus` brings it, and `make test-deploy` installs it")
    return found


def metrics_of_code() -> dict[str, set[str]]:
    """metric -> its labels, for every metric that the code defines."""
    found = {}
    for folder in ("services", "shared"):
        for module in (ROOT / folder).rglob("*.py"):
            for kind, name, rest in re.findall(
                r'\b(Counter|Gauge|Histogram)\(\s*"(hibug2_\w+)",(.*?\))\n(?=\S|\n)', module.read_text(), re.DOTALL
            ):
                labels = re.search(r"\[([^\]]*)\]", rest)
                own = set(re.findall(r'"(\w+)"', labels[1])) if labels else set()
                if kind == "Histogram":
                    found |= {
                        f"{name}{s}": own | ({"le"} if s == "_bucket" else set()) for s in ("_bucket", "_sum", "_count")
                    }
                else:
                    found[name] = own
    return found


def test_rules_are_valid(promtool: str) -> None:
    done = subprocess.run(
        [promtool, "check", "rules", FILES / "alerts.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_speak_when_they_should(promtool: str) -> None:
    command = [promtool, "test", "rules", DASHBOARDS / "alerts_test.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_its_configuration(promtool: str) -> None:
    command = [promtool, "check", "config", "--syntax-only", DASHBOARDS / "prometheus.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested(alerts: dict[str, dict[str, Any]]) -> None:
    cases = yaml.safe_load((DASHBOARDS / "alerts_test.yaml").read_text())["tests"]
    told = {(rule["alertname"], bool(rule.get("exp_alerts"))) for case in cases for rule in case["alert_rule_test"]}
    for alert in alerts:
        assert {(alert, True), (alert, False)} <= told, f"{alert} needs a case in which it speaks, and one in which not"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert(alerts: dict[str, dict[str, Any]]) -> None:
    named = {alert: rule["annotations"]["runbook"] for alert, rule in alerts.items()}
    there = {str(path.relative_to(ROOT)) for path in (DASHBOARDS / "runbooks").glob("*.md")}
    assert set(named.values()) == there
    for alert, path in named.items():
        assert alert in (ROOT / path).read_text().splitlines()[0]


@pytest.mark.parametrize("file", ["alerts.yaml", "dashboard.json"])
def test_metrics_and_labels_are_those_of_the_code(alerts: dict[str, dict[str, Any]], file: str) -> None:
    known = metrics_of_code()
    assert "hibug2_rpc_handled_total" in known
    if file == "alerts.yaml":
        queries = [rule["expr"] for rule in alerts.values()]
    else:
        panels = json.loads((FILES / file).read_text())["panels"]
        queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert queries
    for query in queries:
        for name, matchers in re.findall(r"\b((?:hibug2|process)_\w+)(?:\{([^}]*)\})?", query):
            if name in OF_EVERY_PROCESS:
                continue
            assert name in known, f"no code defines {name}, which {file} asks for"
            labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers)) - {"namespace", "pod", "job", "instance"}
            assert labels <= known[name], f"{name} has no label {labels - known[name]}"


def test_every_metric_is_on_the_dashboard_and_documented_with_its_labels() -> None:
    shown = (FILES / "dashboard.json").read_text()
    rows = re.findall(r"^\| `(hibug2_\w+)` \|([^|]*)\|", (DASHBOARDS / "README.md").read_text(), re.MULTILINE)
    documented = {name: set(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert len(documented) == len(rows)
    defined = {
        name.removesuffix("_bucket"): labels - {"le"}
        for name, labels in metrics_of_code().items()
        if not name.endswith(("_sum", "_count"))
    }
    assert documented == defined
    assert [name for name in defined if name not in shown] == []
