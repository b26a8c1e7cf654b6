"""The Dockerfile and the compose file fit the project that they are made from."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.images.build import BUDGET_MB, EXTRAS, HEAVY
from tests.chart.conftest import CHART, ROOT, SERVICES, load_settings, variables_of

DOCKERFILE = ROOT / "deploy" / "images" / "Dockerfile"


def instructions(name: str) -> list[str]:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{name} ")]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "local" / "compose.yaml").read_text())
    return loaded


def test_hadolint() -> None:
    binary = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([binary, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    copied = {source for line in instructions("COPY") if not line.startswith("--from") for source in line.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed
    assert [path for path in sorted(copied) if not (ROOT / path).exists()] == []


def test_the_image_runs_as_the_user_that_the_chart_names() -> None:
    pod = (CHART / "templates" / "_deployment.tpl").read_text()
    user = re.search(r"runAsUser: (\d+)", pod)
    assert user is not None
    assert instructions("USER") == [f"{user[1]}:{user[1]}"]
    assert instructions("HEALTHCHECK") == []


def test_every_service_has_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = [line.partition("=")[2] for line in instructions("ARG") if line.startswith("EXTRAS=")]
    assert default == EXTRAS
    assert set(SERVICES) | set(default.split(",")) | HEAVY <= extras.keys()


def test_data_beside_the_code_comes_with_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    data = {
        path
        for package in ("services", "shared")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".py", ".md")
    }
    assert data
    assert data - shipped == set()


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["version"] == chart["appVersion"] == project["version"]
    assert f"VERSION={project['version']}" in instructions("ARG")


def test_prompts_are_where_the_services_look() -> None:
    assert any("HIBUG2_PROMPTS_DIR=/opt/prompts" in line for line in instructions("ENV"))
    with_prompts = {path.name for path in (ROOT / "prompts").iterdir() if path.is_dir()} & set(SERVICES)
    assert {"attribute", "tagging"} <= with_prompts
    for service in with_prompts:
        assert load_settings(service, {"HIBUG2_PROMPTS_DIR": "/opt/prompts"}).model_dump()["prompts_dir"]


def test_compose_runs_every_service_safely(compose: dict[str, Any]) -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    services = dict(compose["services"])
    assert {"--appendonly", "yes"} <= set(services["redis"]["command"])
    for other in ("redis", "prometheus", "grafana"):
        image = services.pop(other)["image"]
        assert re.fullmatch(r"\$\{" + other.upper() + r"_IMAGE:-[a-z/]+:v?\d+\.\d+\S*\}", image), image
    assert set(services) == {*SERVICES, "tagging-worker"}
    # podman-compose starts one of a service that does not say its mode
    assert services["tagging-worker"]["deploy"] == {"mode": "replicated", "replicas": 2}
    for name, service in services.items():
        folder = name.removesuffix("-worker")
        assert service["image"] == f"${{IMAGE_PREFIX:-}}hibug2-{folder}:${{TAG:-{version}}}"
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert service["healthcheck"]["test"][:4] == ["CMD", "python", "-m", "shared.rpc.probe"]


def test_compose_settings_are_known_and_load(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if name in ("redis", "prometheus", "grafana"):
            continue
        given = {
            variable: value.replace("${HIBUG2_IMAGES}", "/photos")
            for variable, value in service["environment"].items()
            if value is not None
        }
        settings = load_settings(name.removesuffix("-worker"), given)
        assert service["environment"].keys() <= variables_of(settings), name
        for variable in variables_of(settings):
            if variable.endswith("_ADDRESS"):
                assert given[variable].removeprefix("dns:///").removesuffix(":50051") in compose["services"]


def test_compose_mounts_what_is_there(compose: dict[str, Any]) -> None:
    mounted = [v.partition(":")[0] for s in compose["services"].values() for v in s.get("volumes", []) if "$" not in v]
    for source in mounted:
        folder = ROOT / "deploy" / "local"
        assert (folder / source).exists() if source.startswith(".") else source in compose["volumes"], source


def test_prometheus_reads_every_container(compose: dict[str, Any]) -> None:
    told = yaml.safe_load((ROOT / "deploy" / "dashboards" / "prometheus.yaml").read_text())
    (names,) = told["scrape_configs"][0]["dns_sd_configs"]
    assert set(names["names"]) == compose["services"].keys() - {"redis", "prometheus", "grafana"}
    assert names["port"] == load_settings("repair", {}).model_dump()["metrics_port"]


def test_every_image_has_a_budget() -> None:
    assert BUDGET_MB.keys() == set(SERVICES)
    assert (BUDGET_MB["gateway"], BUDGET_MB["enumeration"]) == (350, 450)
