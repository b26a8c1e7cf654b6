"""What `make cluster-test` makes and says, as far as that can be looked at without a cluster."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shared.version import VERSION
from tests.chart.conftest import Manifests, Run, render
from tests.deploy.test_cluster import FAULTS, RELEASE, UNPACK, Cluster, lacking, loader, redis, shared_claim

MADE = [*redis(), shared_claim("artifacts"), shared_claim("images"), loader(f"hibug2-gateway:{VERSION}")]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster whose kubectl writes down what it is told, and knows two workers."""
    kubectl = tmp_path / "kubectl"
    pods = '{"items": [{"metadata": {"name": "worker-a"}}, {"metadata": {"name": "worker-b"}}]}'
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n'
        f"case \"$*\" in *\"get pods\"*) echo '{pods}';; *lost*) echo 'no route' >&2; exit 1;; esac\n"
    )
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Cluster("my-context", tmp_path)


def told(cluster: Cluster) -> list[str]:
    """What kubectl was told, without the context and the namespace that are told each time."""
    always = f"--context my-context --namespace {cluster.namespace} "
    lines = (cluster.images / "told").read_text().splitlines()
    assert all(line.startswith(always) for line in lines)
    return [line.removeprefix(always) for line in lines]


@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_what_is_made_beside_the_chart_is_valid(version: str) -> None:
    for document in MADE:
        kubernetes_validate.validate(document, version, strict=True)


def pods_of(documents: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for document in documents:
        if document["kind"] == "Pod":
            yield document["spec"]
        elif document["kind"] == "Deployment":
            yield document["spec"]["template"]["spec"]


def test_pods_are_let_into_a_restricted_namespace() -> None:
    pods = list(pods_of(MADE))
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.fixture
def rendered(cluster: Cluster, run_helm: Run) -> Manifests:
    file = cluster.images / "values.yaml"
    file.write_text(yaml.safe_dump(cluster.values()))
    return render(run_helm, file)


def test_the_chart_takes_the_values_and_finds_what_was_made(cluster: Cluster, rendered: Manifests) -> None:
    made = {(d["kind"], d["metadata"]["name"]) for d in MADE}
    for deployment, container in rendered.containers():
        for volume in deployment["spec"]["template"]["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in made
        environment = rendered.environment(container)
        assert environment["HIBUG2_REDIS_URL"] == "redis://redis:6379/0"
        for mount in container["volumeMounts"]:
            if mount["name"] == "images":  # what a client calls a file here is that file there
                assert mount["mountPath"] == str(cluster.images)
                assert environment["HIBUG2_IMAGE_PREFIXES"] == cluster.images.as_uri()


def test_faults_hit_what_is_there(cluster: Cluster, rendered: Manifests) -> None:
    components = {
        name: deployment["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for name, deployment in rendered.of("Deployment").items()
    }
    assert {"tagging-workers", "gateway"} <= set(components.values())
    assert 50051 in [p["port"] for p in rendered.of("Service")[f"{RELEASE}-gateway"]["spec"]["ports"]]
    FAULTS["worker-killed"](cluster)
    FAULTS["redis-rolled"](cluster)
    assert told(cluster) == [
        "get pods --selector=app.kubernetes.io/component=tagging-workers --output=json",
        "delete pod worker-a --grace-period=0 --force",
        "rollout restart deployment/redis",
        "rollout status deployment/redis --timeout=5m",
    ]


def test_everything_goes_with_its_namespace(cluster: Cluster) -> None:
    cluster.close()
    assert told(cluster) == [f"delete namespace {cluster.namespace} --wait=false"]


def test_what_kubectl_refuses_is_told_with_the_command(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match=r"get lost: no route"):
        cluster.kubectl("get", "lost")


def test_images_come_out_as_they_went_in(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("images/a.png")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"png"))
    subprocess.run([sys.executable, "-c", UNPACK, tmp_path], input=packed.getvalue(), check=True)
    assert (tmp_path / "images" / "a.png").read_bytes() == b"png"


def test_without_a_cluster_it_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBECONTEXT", raising=False)
    assert "no cluster: name a context of kubectl" in (lacking() or "")
    monkeypatch.setenv("KUBECONTEXT", "my-context")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "kubectl is not here" in (lacking() or "")
