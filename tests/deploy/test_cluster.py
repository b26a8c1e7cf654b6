"""`make cluster-test`: the chart in a cluster of yours, with faults in mid-run.

It needs images in a registry that the cluster pulls from, or on its nodes. KUBECONTEXT names the context of kubectl;
REGISTRY (none: on the nodes) and TAG the images; STORAGE_CLASS a class whose claims many pods may write to at a time
(the cluster's default where it is not set). Everything is made in a namespace of its own, which goes away at the end.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.images.build import ROOT
from deploy.local.demo import load, write_images
from deploy.tools.helm import helm
from hibug2 import Client
from shared.rpc.probe import healthy
from shared.version import VERSION
from tests.deploy.runs import demo, error_slices, finished, in_tagging, run_again

pytestmark = pytest.mark.timeout(3600)
CHART = ROOT / "charts" / "hibug2"
RELEASE = "hibug2"
REGISTRY, TAG = os.environ.get("REGISTRY", ""), os.environ.get("TAG") or VERSION
UNPACK = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|').extractall(sys.argv[1])"


def redis() -> list[dict[str, Any]]:
    """A Redis with an append-only file on a claim of its own."""
    labels = {"app": "redis"}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "redis"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "redis"},
        "spec": {"selector": labels, "ports": [{"port": 6379}]},
    }
    container = {
        "name": "redis",
        "image": "redis:7.2-alpine",
        "args": ["redis-server", "--appendonly", "yes", "--save", ""],
        "ports": [{"containerPort": 6379}],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "readinessProbe": {"exec": {"command": ["redis-cli", "ping"]}},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 999,
            "fsGroup": 999,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "redis"}}],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "redis"},
        "spec": {
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return [claim, service, deployment]


def shared_claim(name: str) -> dict[str, Any]:
    """A claim that many pods write to."""
    spec: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "2Gi"}}}
    if storage_class := os.environ.get("STORAGE_CLASS"):
        spec["storageClassName"] = storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def loader(image: str) -> dict[str, Any]:
    """A pod that takes images onto their claim."""
    container = {
        "name": "loader",
        "image": image,
        "command": ["/opt/venv/bin/python", "-c", "import time; time.sleep(3600)"],
        "volumeMounts": [{"name": "images", "mountPath": "/load"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "loader"},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "images", "persistentVolumeClaim": {"claimName": "images"}}],
        },
    }


@dataclass
class Cluster:
    """The platform in a namespace of its own."""

    context: str
    images: Path
    namespace: str = field(default_factory=lambda: f"hibug2-test-{uuid.uuid4().hex[:6]}")
    port: int = 0
    _forward: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kubectl(self, *arguments: str, given: bytes | None = None, check: bool = True) -> str:
        command = ["kubectl", "--context", self.context, "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=900)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}"
        return done.stdout.decode()

    def apply(self, documents: Sequence[dict[str, Any]]) -> None:
        self.kubectl("apply", "--filename", "-", given=yaml.safe_dump_all(documents).encode())

    def helm(self, *arguments: str) -> None:
        command = [str(helm()), "--kube-context", self.context, "--namespace", self.namespace, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"

    def values(self) -> dict[str, Any]:
        """What the chart is told."""
        return {
            "image": {"registry": REGISTRY, "tag": TAG},
            "store": {"url": "file:///data/hibug2", "existingClaim": "artifacts"},
            "images": {
                "prefixes": [self.images.as_uri()],
                "existingClaim": "images",
                "mountPath": str(self.images),
            },
            "taggingWorkers": {"replicas": 2, "settings": {"HIBUG2_LEASE_S": "10"}},
        }

    def upgrade(self, *changes: str) -> None:
        file = self.images / "values.yaml"
        file.write_text(yaml.safe_dump(self.values()))
        self.helm(
            "upgrade", "--install", RELEASE, str(CHART), "--values", str(file), "--wait", "--timeout", "10m", *changes
        )

    def load_images(self) -> None:
        """Bring the demo's images onto their claim, under the path that they have here."""
        folder = self.images / ".demo"
        folder.mkdir()
        write_images(load()[0], folder)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(folder, arcname=".demo")
        shutil.rmtree(folder)
        self.apply([loader(f"{REGISTRY}/hibug2-gateway:{TAG}".lstrip("/"))])
        self.kubectl("wait", "--for=condition=Ready", "pod/loader", "--timeout=5m")
        command = ("/opt/venv/bin/python", "-c", UNPACK, "/load")
        self.kubectl("exec", "-i", "loader", "--", *command, given=packed.getvalue())
        self.kubectl("delete", "pod", "loader", "--grace-period=1")

    def forward(self) -> None:
        """Reach the gateway from here, anew where the way broke."""
        end = time.monotonic() + 120
        while True:
            self._unforward()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
            way = ("port-forward", f"service/{RELEASE}-gateway", f"{self.port}:50051")
            command = ["kubectl", "--context", self.context, "--namespace", self.namespace, *way]
            self._forward = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while self._forward.poll() is None:
                if healthy(self.address, 2):
                    return
                assert time.monotonic() < end, "the gateway is not reached"
            assert time.monotonic() < end, "kubectl does not reach the gateway"
            time.sleep(1)

    def _unforward(self) -> None:
        if self._forward is not None:
            self._forward.kill()
            self._forward.wait()

    def close(self) -> None:
        self._unforward()
        self.kubectl("delete", "namespace", self.namespace, "--wait=false", check=False)

    # Faults

    def kill(self, component: str) -> None:
        """SIGKILL to one pod, as when its node dies."""
        selector = f"--selector=app.kubernetes.io/component={component}"
        pods = json.loads(self.kubectl("get", "pods", selector, "--output=json"))["items"]
        self.kubectl("delete", "pod", pods[0]["metadata"]["name"], "--grace-period=0", "--force")

    def roll_redis(self) -> None:
        self.kubectl("rollout", "restart", "deployment/redis")
        self.kubectl("rollout", "status", "deployment/redis", "--timeout=5m")


def lacking() -> str | None:
    """Why no cluster is reached from here; None where one may be."""
    if not os.environ.get("KUBECONTEXT"):
        return "no cluster: name a context of kubectl (make cluster-test KUBECONTEXT=… REGISTRY=… TAG=…)"
    if shutil.which("kubectl") is None:
        return "kubectl is not here, and without it no cluster is reached"
    return None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := lacking():
        pytest.skip(missing)
    ours = Cluster(os.environ["KUBECONTEXT"], tmp_path_factory.mktemp("cluster").resolve())
    try:
        ours.kubectl("create", "namespace", ours.namespace)
        ours.kubectl(
            "label", "namespace", ours.namespace, "pod-security.kubernetes.io/enforce=restricted", "--overwrite"
        )
        ours.apply([*redis(), shared_claim("artifacts"), shared_claim("images")])
        ours.kubectl("rollout", "status", "deployment/redis", "--timeout=5m")
        ours.load_images()
        ours.upgrade()
        ours.forward()
        yield ours
    finally:
        ours.close()


def test_the_installed_chart_answers(cluster: Cluster) -> None:
    cluster.helm("test", RELEASE, "--timeout", "5m")
    assert "error slices" in demo(cluster)


FAULTS: dict[str, Callable[[Cluster], None]] = {
    "worker-killed": lambda c: c.kill("tagging-workers"),
    "gateway-killed": lambda c: c.kill("gateway"),
    "redis-rolled": Cluster.roll_redis,
    "upgraded": lambda c: c.upgrade("--set-string", "gateway.settings.HIBUG2_DRAIN_S=15"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_nothing_is_lost(cluster: Cluster, fault: str) -> None:
    with Client(cluster.address) as client:
        whole = client.runs("fashion")[0]
        in_tagging(client, run := run_again(cluster, client, fault))
    FAULTS[fault](cluster)
    cluster.forward()
    last = finished(cluster, run)
    with Client(cluster.address) as client:
        assert error_slices(client, last) == error_slices(client, whole)


def test_uninstalling_leaves_nothing_but_the_claims(cluster: Cluster) -> None:
    cluster.helm("uninstall", RELEASE, "--wait")
    kinds = "all,configmaps,networkpolicies,poddisruptionbudgets,serviceaccounts,roles,rolebindings"
    selector = f"--selector=app.kubernetes.io/instance={RELEASE}"
    assert cluster.kubectl("get", kinds, selector, "--output=name").split() == []
    claims = cluster.kubectl("get", "pvc", "--output=name").split()
    assert {"persistentvolumeclaim/artifacts", "persistentvolumeclaim/images"} <= set(claims)
