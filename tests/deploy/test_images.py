"""Every image holds what its service needs and no more, starts alone under the chart's bounds, and ends when told."""

from __future__ import annotations

import json
import os
import re

import pytest
from packaging.utils import canonicalize_name

from deploy.images.build import BUDGET_MB, ROOT, Built
from tests.deploy.conftest import SERVICES
from tests.deploy.engine import Engine, of

PYTHON = "/opt/venv/bin/python"
# Large libraries, and the one service each is for. The CLIP encoder's come with EXTRAS=s3,clip only.
ONLY_IN = {
    "numba": {"enumeration"},
    "scipy": {"enumeration"},
    "fastapi": {"gateway"},
    "torch": set(),
    "open-clip-torch": set(),
}


def contained(engine: Engine, image: str, code: str) -> str:
    """What Python code prints inside the image, without a network."""
    return engine("run", "--rm", "--network=none", "--read-only", f"--entrypoint={PYTHON}", image, "-c", code)


@pytest.fixture(scope="module")
def bills(engine: Engine, built: dict[str, Built]) -> dict[str, dict[str, str]]:
    """service -> library -> version, as each image's own bill of materials says."""
    found = {}
    for service, image in built.items():
        text = contained(engine, image.image, "print(open('/opt/venv/sbom.cdx.json').read())")
        bill = json.loads(text)
        assert bill["bomFormat"] == "CycloneDX"
        found[service] = {c["name"].lower(): c["version"] for c in bill["components"]}
    return found


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("service", SERVICES)
def test_size_is_within_the_budget(built: dict[str, Built], service: str) -> None:
    assert built[service].size_mb <= BUDGET_MB[service]


def test_the_bill_of_materials_is_what_is_installed(engine: Engine, bills: dict[str, dict[str, str]]) -> None:
    list_all = "import importlib.metadata as m; print(*{d.metadata['Name'].lower() for d in m.distributions()})"
    for service, bill in bills.items():
        assert set(contained(engine, of(service), list_all).split()) - {"hibug2-platform"} <= bill.keys()


def test_versions_are_those_of_the_constraints(bills: dict[str, dict[str, str]]) -> None:
    text = (ROOT / "constraints.txt").read_text()
    pinned = {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    for service, bill in bills.items():
        for name, version in bill.items():
            if name not in ("hibug2", "hibug2-platform"):
                assert version == pinned.get(canonicalize_name(name)), f"{name} of {service}"


def test_a_service_holds_only_its_own_extra(bills: dict[str, dict[str, str]]) -> None:
    for library, services in ONLY_IN.items():
        assert {service for service, bill in bills.items() if library in bill} == services, library
    for service, bill in bills.items():
        assert not {"pip", "setuptools", "wheel", "pytest", "grpcio-tools"} & bill.keys(), service


def test_labels_and_user(engine: Engine, built: dict[str, Built]) -> None:
    for service, image in built.items():
        known = engine.image(image.image)["Config"]
        labels = {key.removeprefix("org.opencontainers.image."): value for key, value in known["Labels"].items()}
        assert labels["title"] == f"hibug2-{service}"
        assert labels["licenses"] == "Apache-2.0"
        assert image.image.endswith(f":{labels['version']}")
        assert known["User"] == "10001:10001"
        assert "Healthcheck" not in known
        assert known["Entrypoint"] == [PYTHON, "/opt/venv/service.py"]  # no shell between


def test_nothing_of_the_machine_that_built_it_is_inside(engine: Engine, built: dict[str, Built]) -> None:
    look = (
        "import os; print(*[p for p in ('/etc/pip.conf', '/source', '/wheels', '/root/.cache') if os.path.exists(p)])"
    )
    for image in built.values():
        # an empty file may stay where a mount was
        left = contained(engine, image.image, look).split()
        assert set(left) <= {"/etc/pip.conf"}
        if left:
            assert contained(engine, image.image, "import os; print(os.path.getsize('/etc/pip.conf'))") == "0"
        assert not [e for e in engine.image(image.image)["Config"]["Env"] if e.startswith(("PIP_", "HTTP"))]


@pytest.mark.parametrize("service", [*SERVICES, "tagging worker"])
def test_it_starts_alone_is_probed_and_ends(engine: Engine, built: dict[str, Built], service: str) -> None:
    folder, *command = service.split()
    name = engine.start(
        f"hibug2-alone-{service.replace(' ', '-')}-{os.getpid()}",
        built[folder].image,
        *command,
        options=("--network=none", "--tmpfs=/var/lib/hibug2", "--env=HIBUG2_DRAIN_S=2"),
    )
    try:
        assert engine.healthy(name), engine.logs(name)
        user = engine("exec", name, PYTHON, "-c", "import os; print(os.getuid(), os.access('/', os.W_OK))")
        assert user == "10001 False"
        status, seconds = engine.stop(name, 30)
        assert (status, seconds < 20) == (0, True), engine.logs(name)
    finally:
        engine("rm", "--force", name, check=False)


def test_kernels_come_compiled(engine: Engine, built: dict[str, Built]) -> None:
    """On the processor that built the image nothing is compiled at start, though the file system is read-only."""
    said = contained(
        engine,
        built["enumeration"].image,
        "import runpy; runpy.run_module('services.enumeration.warm', run_name='__main__')",
    )
    found = re.search(r"compiled in ([\d.]+) s", said)
    assert found is not None, said
    print(f"\nkernels ready in {found[1]} s", end="")
    assert float(found[1]) < 10
