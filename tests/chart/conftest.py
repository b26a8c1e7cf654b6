"""Helm and the chart as rendered by it."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings

from deploy.tools.helm import helm

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "hibug2"
NAMESPACE = "vision"
VALUES = Path(__file__).parent / "values"
ENVIRONMENTS = ROOT / "deploy" / "environments"
SERVICES = ("gateway", "attribute", "tagging", "enumeration", "prediction", "repair")


@dataclass(frozen=True)
class Manifests:
    """What one set of values renders to."""

    documents: tuple[dict[str, Any], ...]

    def of(self, kind: str) -> dict[str, dict[str, Any]]:
        """name -> manifest, for one kind."""
        return {d["metadata"]["name"]: d for d in self.documents if d["kind"] == kind}

    def containers(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(Deployment, container) for every container of every Deployment."""
        return [
            (deployment, container)
            for deployment in self.of("Deployment").values()
            for container in deployment["spec"]["template"]["spec"]["containers"]
        ]

    def pods(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(manifest, its pod template) of all that runs: Deployments, and the pod of `helm test`."""
        deployments = [(d, d["spec"]["template"]) for d in self.of("Deployment").values()]
        return deployments + [(p, p) for p in self.of("Pod").values()]

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """The variables that the container starts with; `secret` stands for what a secret's key holds."""
        found: dict[str, str] = {}
        for source in container["envFrom"]:
            if "configMapRef" in source:
                found |= self.of("ConfigMap")[source["configMapRef"]["name"]]["data"]
        for variable in container.get("env", []):
            found[variable["name"]] = variable.get("value", "secret")
        return found


def service_of(container: dict[str, Any]) -> str:
    """The service whose image the container runs: `…/hibug2-tagging:1.2.3` -> `tagging`."""
    name: str = container["image"].rpartition("/")[2]
    return name.removeprefix("hibug2-").partition(":")[0]


def load_settings(service: str, environment: Mapping[str, str]) -> BaseSettings:
    """The service's settings under `environment` and no other HIBUG2_ variable; ValidationError when they are wrong."""
    with pytest.MonkeyPatch.context() as patched:
        for name in [n for n in os.environ if n.startswith("HIBUG2_")]:
            patched.delenv(name)
        for name, value in environment.items():
            patched.setenv(name, value)
        settings: BaseSettings = import_module(f"services.{service}.config").Settings()
    return settings


def variables_of(settings: BaseSettings) -> set[str]:
    """The names of the environment variables that these settings are read from."""
    return {f"HIBUG2_{field.upper()}" for field in type(settings).model_fields}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run_helm() -> Run:
    binary = helm()

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([binary, *arguments], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)

    return run


EXAMPLES = [CHART / "values.yaml", *sorted(VALUES.glob("*.yaml")), *sorted(ENVIRONMENTS.glob("*.yaml"))]


@pytest.fixture(scope="session", params=EXAMPLES, ids=lambda path: "default" if path.parent == CHART else path.stem)
def values_file(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(scope="session")
def manifests(run_helm: Run, values_file: Path) -> Manifests:
    return render(run_helm, values_file)


def render(run_helm: Run, values_file: Path) -> Manifests:
    return Manifests(tuple(copy.deepcopy(_documents(run_helm, values_file, values_file.read_text()))))


@cache
def _documents(run_helm: Run, values_file: Path, _: str) -> list[dict[str, Any]]:
    done = run_helm("template", "hibug2", CHART, "--namespace", NAMESPACE, "--values", values_file)
    assert done.returncode == 0, done.stderr
    return load_all(done.stdout)


def load_all(text: str) -> list[dict[str, Any]]:
    """The documents in `text`, by the parser in C: there are many."""
    return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]
