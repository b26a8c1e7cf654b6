"""What a cluster under the `restricted` Pod Security Standard, and a careful admin, ask of every Deployment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def breaches(manifest: dict[str, Any]) -> Iterator[str]:
    """A line for everything in the Deployment, or in the pod, that breaks the policy."""
    long_lived = manifest["kind"] == "Deployment"
    template = manifest["spec"]["template"] if long_lived else manifest
    pod = template["spec"]
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True:
        yield "pod may run as root"
    for identity in ("runAsUser", "runAsGroup"):
        if not isinstance(security.get(identity), int) or security[identity] < 1000:
            yield f"pod has no numeric {identity} of its own"
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "pod has no seccomp profile"
    if pod.get("serviceAccountName", "default") == "default":
        yield "pod runs under an account that others use"
    if pod.get("automountServiceAccountToken") is not False:
        yield "pod mounts a service account token"
    if pod.get("enableServiceLinks") is not False:
        yield "pod gets service links, whose variables read as settings"
    for switch in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if pod.get(switch):
            yield f"pod sets {switch}"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a hostPath"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no size limit"
    if long_lived:
        yield from _deployment_breaches(template)
    for container in pod.get("initContainers", []) + pod["containers"]:
        for breach in _container_breaches(container, long_lived):
            yield f"{container['name']}: {breach}"


def _deployment_breaches(template: dict[str, Any]) -> Iterator[str]:
    if template["metadata"].get("annotations", {}).get("checksum/config", "") == "":
        yield "pod does not restart when its settings change"
    spread = {c["topologyKey"] for c in template["spec"].get("topologySpreadConstraints", [])}
    if spread != {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}:
        yield "pods are not spread over zones and nodes"


def _container_breaches(container: dict[str, Any], long_lived: bool) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "may gain privileges"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "root file system can be written"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    if {"runAsUser", "runAsNonRoot", "seccompProfile"} & security.keys():
        yield "overrides the pod's identity"
    resources = container.get("resources", {})
    for kind in ("requests", "limits"):
        for quantity in ("cpu", "memory"):
            if not resources.get(kind, {}).get(quantity):
                yield f"no {quantity} in {kind}"
    if long_lived:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in PROBES:
            if container.get(probe, {}).get("grpc", {}).get("port") != ports.get("health", ports["grpc"]):
                yield f"no {probe} over gRPC"
    tag = container["image"].rpartition("/")[2].partition(":")[2]
    if tag in ("", "latest"):
        yield f"image {container['image']} is not pinned"
    if "/tmp" not in [mount["mountPath"] for mount in container.get("volumeMounts", [])]:
        yield "nowhere to write temporary files"
