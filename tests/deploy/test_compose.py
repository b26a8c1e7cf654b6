"""The compose file starts the platform, Prometheus sees every part of it, and the demo runs through its gateway."""

from __future__ import annotations

import json
import re
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.images.build import BUDGET_MB, ROOT, Built
from deploy.local import containers
from shared.rpc.probe import healthy
from shared.version import VERSION
from tests.deploy import engine as engines
from tests.deploy.engine import Engine
from tests.deploy.runs import demo

pytestmark = pytest.mark.timeout(1800)
FILES = ROOT / "charts" / "hibug2" / "files"
COMPOSE = yaml.safe_load(containers.FILE.read_text())
# Their metrics have no series while nothing of the kind has happened: no language model is asked, no certificate read.
QUIET = re.compile(r"hibug2_(llm|tls)_|code!=\"OK\"|_dead_total")


@dataclass
class Composed:
    """A project of its own, beside any stack that is up here."""

    engine: Engine
    command: list[str]
    images: Path
    services: list[str]
    grpc_port: int
    http_port: int
    prometheus_port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def project(self) -> str:
        return self.command[-1]

    def prometheus(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.prometheus_port}/api/v1/{path}?{query}", timeout=10
        ) as got:
            answer = json.load(got)
        assert answer["status"] == "success", answer
        return answer["data"]

    def running(self) -> list[str]:
        return self.engine("ps", "--format", "{{.Names}}", "--filter", f"name={self.project}").split()


@pytest.fixture(scope="module")
def composed(
    engine: Engine, base: str, built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composed]:
    command = containers.compose()
    if command is None:
        pytest.skip("nothing runs compose files here: neither docker compose nor podman-compose")
    ports = [engines.free_port() for _ in range(3)]
    images = engines.readable(tmp_path_factory.mktemp("images"))
    others = engines.others_image(engine, base)
    settings = {
        "HIBUG2_IMAGES": str(images),
        "TAG": VERSION,
        "REDIS_IMAGE": others,
        "PROMETHEUS_IMAGE": others,
        **dict(zip(("GRPC_PORT", "HTTP_PORT", "PROMETHEUS_PORT"), map(str, ports), strict=True)),
    }
    # Grafana comes from a registry alone; what it is told is looked at in test_alerts.py
    services = [name for name in COMPOSE["services"] if name != "grafana"]
    ours = Composed(engine, [*command, "--project-name", f"hibug2-{uuid.uuid4().hex[:6]}"], images, services, *ports)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        try:
            assert containers.run(ours.command, "up", "--detach", *services) == 0
            wait_for(lambda: healthy(ours.address, 1), "the gateway is not healthy")
            yield ours
        finally:
            containers.run(ours.command, "down", "--volumes")


def wait_for(holds: Any, otherwise: str, within_s: float = 90) -> None:
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, otherwise
        time.sleep(0.5)


def test_grafana_is_given_a_dashboard_that_it_can_show() -> None:
    """By what its provisioning asks for: the paths, the data source, an own place and number for every panel."""
    grafana = COMPOSE["services"]["grafana"]
    mounts = {inside: outside for outside, inside, _ in (volume.split(":") for volume in grafana["volumes"])}
    provisioning = "/etc/grafana/provisioning"
    told = {}
    for kind, key in (("datasources", "datasources"), ("dashboards", "providers")):
        (file,) = (containers.FILE.parent / mounts[f"{provisioning}/{kind}"]).resolve().glob("*.yaml")
        document = yaml.safe_load(file.read_text())
        assert document["apiVersion"] == 1
        (told[kind],) = document[key]
    assert told["datasources"]["url"] == "http://prometheus:9090"
    assert told["datasources"]["isDefault"] is True
    (shown,) = [path for path in mounts if Path(path).parent == Path(told["dashboards"]["options"]["path"])]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == shown
    dashboard = json.loads((containers.FILE.parent / mounts[shown]).read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["query"] == told["datasources"]["type"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        x, y, width, height = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
        assert x + width <= 24
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
            for target in panel["targets"]:
                assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables.keys() | {"__rate_interval"}


@pytest.fixture(scope="module")
def said(composed: Composed) -> str:
    return demo(composed)


def test_every_service_runs_and_two_workers(composed: Composed, said: str) -> None:
    names = [name.replace("_", "-") for name in composed.running()]
    for service in composed.services:
        count = len([name for name in names if re.fullmatch(rf"{composed.project}-{service}-\d+", name)])
        assert count == (2 if service == "tagging-worker" else 1), (service, names)


def test_services_are_healthy_by_the_check_of_the_file(composed: Composed, said: str) -> None:
    for name in composed.running():
        service = name.replace("_", "-").removeprefix(f"{composed.project}-").rpartition("-")[0]
        if "healthcheck" in COMPOSE["services"][service]:
            kind, *check = COMPOSE["services"][service]["healthcheck"]["test"]
            assert kind == "CMD"
            composed.engine("exec", name, *check)


def test_the_demo_finds_and_its_pages_are_served(composed: Composed, said: str) -> None:
    assert "error slices" in said
    with urllib.request.urlopen(f"http://127.0.0.1:{composed.http_port}/", timeout=10) as page:
        assert page.status == 200
        assert b"HiBug2" in page.read()


def test_prometheus_reaches_every_part(composed: Composed, said: str) -> None:
    wanted = len(BUDGET_MB) + 2

    def all_up() -> bool:
        targets = composed.prometheus("targets")["activeTargets"]
        return len(targets) == wanted and all(target["health"] == "up" for target in targets)

    wait_for(all_up, f"not {wanted} targets are up: {composed.prometheus('targets')['activeTargets']}")


def test_the_alerts_are_loaded_and_none_fires(composed: Composed, said: str) -> None:
    (wanted,) = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]

    def rules() -> list[dict[str, Any]]:
        return [rule for group in composed.prometheus("rules")["groups"] for rule in group["rules"]]

    wait_for(lambda: rules() and all(rule["health"] == "ok" for rule in rules()), "the rules are not evaluated")
    assert {rule["name"] for rule in rules()} == {rule["alert"] for rule in wanted["rules"]}
    assert [rule["name"] for rule in rules() if rule["state"] == "firing"] == []


def test_the_dashboard_shows_what_the_demo_did(composed: Composed, said: str) -> None:
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(queries) > 15

    def silent() -> list[str]:
        """Queries without a series, of those that should have one; a wrong one is refused."""
        answers = {
            query: composed.prometheus("query", query=query.replace("$namespace", "compose")) for query in queries
        }
        return [query for query, answer in answers.items() if not answer["result"] and not QUIET.search(query)]

    wait_for(lambda: not silent(), f"no series: {silent()}")


# the last of the module: it takes the platform away
def test_down_stops_everything_and_keeps_the_volumes(composed: Composed, said: str) -> None:
    assert containers.are_up(composed.command)
    assert containers.down(composed.command) == 0
    assert composed.running() == []
    assert not containers.are_up(composed.command)
    kept = composed.engine("volume", "ls", "--format", "{{.Name}}").split()
    assert {f"{composed.project}_{name}" for name in COMPOSE["volumes"]} <= set(kept)
