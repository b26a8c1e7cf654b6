"""What builds images, starts containers and writes the chart does so, and says what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from deploy.images import build, trim
from deploy.local import __main__ as local
from deploy.local import containers
from deploy.tools import chart
from shared.version import VERSION


@pytest.fixture
def engine_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `podman` that knows sizes and builds nothing; what it was told is in `told` beside."""
    program = tmp_path / "podman"
    program.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/told\n'
        'case "$1 $2" in\n'
        '"image inspect") case "$*" in *hibug2*) echo 400000000;; *) echo 100000000;; esac;;\n'
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CONTAINER_ENGINE", "podman")
    return tmp_path


def test_images_are_built_with_their_service_and_their_size_is_told(
    engine_on_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main(["gateway", "--tag", "1.2", "--registry", "registry.example.com/x"]) == 0
    assert "registry.example.com/x/hibug2-gateway:1.2" in (said := capsys.readouterr().out)
    assert "300 MB of 350" in said
    assert "--build-arg SERVICE=gateway" in (engine_on_path / "told").read_text()


def test_an_image_over_its_budget_fails_unless_a_heavy_extra_was_asked_for(
    engine_on_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(build.BUDGET_MB, "gateway", 299)
    assert build.main(["gateway"]) == 1
    assert "over budget: gateway" in capsys.readouterr().err
    assert build.main(["gateway", "--extras", "s3,clip"]) == 0


def test_a_build_needs_an_engine_and_a_service_that_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CONTAINER_ENGINE", raising=False)
    assert build.main([]) == 1
    assert "neither podman nor docker" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main(["gatewy"])
    assert "no such service: gatewy" in capsys.readouterr().err


def test_trimming_takes_what_is_not_used_and_nothing_else(tmp_path: Path) -> None:
    used = [
        "pyarrow/lib.so.1",
        "scipy/sparse/a.py",
        "scipy/version.py",
        "botocore/data/s3/x",
        "numpy/core.py",
        "tests.py",
    ]
    unused = [
        "pyarrow/libarrow_flight.so",
        "scipy/stats/a.py",
        "botocore/data/ec2/x",
        "numpy/ma/tests/t.py",
        "numpy/a.h",
    ]
    for name in used + unused:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    trim.trim(tmp_path, "repair")
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(used)


def test_without_an_engine_the_stack_starts_embedded_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(local, "up", lambda: 0)
    assert local.main(["up", "--containers"]) == 0
    assert "starts embedded instead" in capsys.readouterr().out


@pytest.fixture
def docker_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` that says yes to all; what it was told, behind the folder of images, is in the file returned."""
    told = tmp_path / "told"
    program = tmp_path / "docker"
    program.write_text(f'#!/bin/sh\necho "$HIBUG2_IMAGES $@" >> {told}\n[ "$1" != image ] || echo 100000000\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if not shutil.which("podman") else str(tmp_path))
    monkeypatch.setenv("HIBUG2_IMAGES", "/photos")
    for name in ("BASE", "TAG", "EXTRAS", "IMAGE_PREFIX", "GRPC_PORT"):
        monkeypatch.delenv(name, raising=False)
    return told


def test_with_an_engine_images_are_built_and_compose_is_told_what_to_start(
    docker_on_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BASE", "my-base:1")
    monkeypatch.setenv("GRPC_PORT", "50151")
    assert local.main(["up", "--containers"]) == 0
    told = docker_on_path.read_text()
    for service in build.BUDGET_MB:
        assert f"--tag hibug2-{service}:{VERSION} --build-arg BASE=my-base:1" in told
    assert f"/photos compose --file {containers.FILE} up --detach" in told
    assert "below /photos" in (said := capsys.readouterr().out)
    assert "gRPC 127.0.0.1:50151" in said


def test_images_of_a_registry_are_not_built(docker_on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_PREFIX", "registry.example.com/vision/")
    assert local.main(["up", "--containers"]) == 0
    assert " build " not in (told := docker_on_path.read_text())
    assert f"compose --file {containers.FILE} up --detach" in told


def test_the_ports_that_are_told_are_those_of_the_compose_file() -> None:
    assert dict(re.findall(r"\$\{(\w+)_PORT:-(\d+)\}:", containers.FILE.read_text())) == containers.PORTS


def test_a_table_row_is_a_commented_value_with_its_path() -> None:
    text = "a:\n  # -- First,\n  # and more.\n  b: [1]\n  c: 2\n# Not for the table.\nd: 3\n# -- Whole.\ne:\n  f: 4\n"
    rows = [(v.path, v.default, v.description) for v in chart.documented(text)]
    assert rows == [("a.b", "[1]", "First, and more."), ("e", '{"f": 4}', "Whole.")]


def test_a_component_is_told_by_where_its_defaults_are_not_the_gateways() -> None:
    text = (chart.CHART / "values.yaml").read_text()
    found = dict(chart.differing(text))
    values = yaml.safe_load(text)
    assert found.keys() == chart.COMPONENTS.keys() - {"gateway"}
    assert found["taggingWorkers"]["replicas"] == "2"
    assert found["taggingWorkers"]["autoscaling.target"] == "20"
    assert "maxUnavailable" not in found["taggingWorkers"]
    assert json.loads(found["attribute"]["resources"]) == values["attribute"]["resources"]
