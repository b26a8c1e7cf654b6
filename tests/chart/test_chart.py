"""The chart lints, renders to valid and safe manifests, fits the services' settings, and refuses wrong values."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.chart import custom
from tests.chart.calls import used_by_code
from tests.chart.conftest import (
    CHART,
    SERVICES,
    VALUES,
    Manifests,
    Run,
    load_all,
    load_settings,
    render,
    service_of,
    variables_of,
)
from tests.chart.policy import breaches

VERSIONS = ("1.30", "1.33")


def test_lint(run_helm: Run, values_file: Path) -> None:
    done = run_helm("lint", "--strict", CHART, "--values", values_file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_notes_tell_the_next_command(run_helm: Run, values_file: Path) -> None:
    done = run_helm("install", "--dry-run=client", "hibug2", CHART, "--values", values_file)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("\nNOTES:\n")[2]
    assert "rollout status" in notes
    assert "hibug2 dataset create" in notes
    assert "<no value>" not in notes


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(manifests: Manifests, version: str) -> None:
    for document in manifests.documents:
        if document["kind"] in custom.SCHEMAS:
            custom.validate(document)
        else:
            validate(json.dumps(document), version)


@cache
def validate(document: str, version: str) -> None:
    """Most documents are the same under several values; each is looked at once."""
    kubernetes_validate.validate(json.loads(document), version, strict=True)


def test_a_wrong_manifest_is_seen(manifests: Manifests) -> None:
    deployment = copy.deepcopy(next(iter(manifests.of("Deployment").values())))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[0], strict=True)


def test_every_service_is_there(manifests: Manifests) -> None:
    assert set(manifests.of("Deployment")) == {f"hibug2-{s}" for s in (*SERVICES, "tagging-workers")}
    assert set(manifests.of("Service")) - {"hibug2-metrics"} == {f"hibug2-{s}" for s in SERVICES}
    for _, container in manifests.containers():
        assert importlib.util.find_spec(f"services.{service_of(container)}.__main__")
    workers = manifests.of("Deployment")["hibug2-tagging-workers"]["spec"]["template"]["spec"]["containers"][0]
    assert service_of(workers) == "tagging"
    assert workers["args"] == ["worker"]


def test_nothing_is_named_twice(manifests: Manifests) -> None:
    names = [(d["kind"], d["metadata"]["name"]) for d in manifests.documents]
    assert len(names) == len(set(names))


def test_policy(manifests: Manifests) -> None:
    makes_jobs = "hibug2-enumeration" in manifests.of("Role")
    for manifest, _ in manifests.pods():
        allowed = makes_jobs and manifest["metadata"]["name"] == "hibug2-enumeration"
        assert list(breaches(manifest)) == (["pod mounts a service account token"] if allowed else [])


CONTAINER = ("spec", "template", "spec", "containers", 0)
POD = ("spec", "template", "spec")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*POD, "securityContext", "runAsNonRoot"), False),
        ((*POD, "securityContext", "runAsUser"), 0),
        ((*POD, "securityContext", "seccompProfile"), {"type": "Unconfined"}),
        ((*POD, "automountServiceAccountToken"), True),
        ((*POD, "serviceAccountName"), "default"),
        ((*POD, "topologySpreadConstraints"), []),
        ((*POD, "enableServiceLinks"), True),
        ((*POD, "hostNetwork"), True),
        ((*POD, "volumes"), [{"name": "tmp", "emptyDir": {}}]),
        ((*POD, "volumes"), [{"name": "host", "hostPath": {"path": "/"}}]),
        (("spec", "template", "metadata", "annotations"), {}),
        ((*CONTAINER, "securityContext", "allowPrivilegeEscalation"), True),
        ((*CONTAINER, "securityContext", "privileged"), True),
        ((*CONTAINER, "securityContext", "readOnlyRootFilesystem"), False),
        ((*CONTAINER, "securityContext", "capabilities"), {"drop": ["ALL"], "add": ["NET_ADMIN"]}),
        ((*CONTAINER, "securityContext", "runAsUser"), 0),
        ((*CONTAINER, "resources", "limits"), {"cpu": "1"}),
        ((*CONTAINER, "resources", "requests"), {"memory": "1Gi"}),
        ((*CONTAINER, "startupProbe"), {}),
        ((*CONTAINER, "readinessProbe"), {"httpGet": {"port": 9090}}),
        ((*CONTAINER, "livenessProbe"), {"grpc": {"port": 1}}),
        ((*CONTAINER, "image"), "registry.example.com:5000/hibug2-gateway"),
        ((*CONTAINER, "image"), "hibug2-gateway:latest"),
        ((*CONTAINER, "volumeMounts"), []),
    ],
)
def test_a_breach_of_the_policy_is_seen(run_helm: Run, path: tuple[Any, ...], value: object) -> None:
    rendered = render(run_helm, VALUES / "full.yaml")
    deployment: Any = rendered.of("Deployment")["hibug2-gateway"]
    place = deployment
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert len(list(breaches(deployment))) == 1


def test_services_lead_to_their_pods(manifests: Manifests) -> None:
    for name, service in manifests.of("Service").items():
        if name == "hibug2-metrics":
            continue
        reached = [
            deployment
            for deployment in manifests.of("Deployment").values()
            if service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert [deployment["metadata"]["name"] for deployment in reached] == [name]
        pod = reached[0]["spec"]["template"]["spec"]
        named = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
        expected = {"grpc": 50051, "http": 8080} if name == "hibug2-gateway" else {"grpc": 50051}
        assert {port["name"]: named[port["targetPort"]] for port in service["spec"]["ports"]} == expected
        # round_robin needs the address of every pod; people reach the gateway by one address
        assert (service["spec"].get("clusterIP") == "None") == (name != "hibug2-gateway")


def test_the_gateway_is_told_where_the_services_are(manifests: Manifests) -> None:
    told = manifests.of("ConfigMap")["hibug2-gateway"]["data"]
    targets = {name: value for name, value in told.items() if name.endswith("_ADDRESS")}
    assert targets == {
        f"HIBUG2_{service.upper()}_ADDRESS": f"dns:///hibug2-{service}:50051"
        for service in SERVICES
        if service != "gateway"
    }
    for target in targets.values():
        host, _, port = target.removeprefix("dns:///").partition(":")
        assert int(port) in [p["port"] for p in manifests.of("Service")[host]["spec"]["ports"]]


def test_settings_are_known_and_load(manifests: Manifests) -> None:
    for deployment, container in manifests.containers():
        given = manifests.environment(container)
        settings = load_settings(service_of(container), given)
        assert given.keys() <= variables_of(settings), deployment["metadata"]["name"]
        # whatever says where something is must be told, for a default knows nothing of the cluster
        places = ("_ADDRESS", "_LISTEN", "_METRICS_PORT", "_HTTP_PORT", "_STORE_URL", "_REDIS_URL", "_PREFIXES")
        assert {v for v in variables_of(settings) if v.endswith(places)} <= given.keys()
        ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        assert given["HIBUG2_LISTEN"].endswith(f":{ports['grpc']}")
        assert given["HIBUG2_METRICS_PORT"] == ports["metrics"]
        assert given.get("HIBUG2_HTTP_PORT") == ports.get("http")
        assert given.get("HIBUG2_HEALTH_PORT") == ports.get("health")


def test_there_is_time_to_end_in(manifests: Manifests) -> None:
    for deployment, container in manifests.containers():
        settings = load_settings(service_of(container), manifests.environment(container)).model_dump()
        stop = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        # a worker may be waiting for an answer that is paid for
        longest = settings["llm_timeout_s"] if deployment["metadata"]["name"].endswith("-workers") else 0
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert stop + settings["drain_s"] + longest < grace
        # a Service forgets a pod some seconds after it was told to end; a worker has none
        assert (stop > 0) == (deployment["metadata"]["name"] in manifests.of("Service"))


def test_folders_are_mounted_where_the_settings_say(run_helm: Run) -> None:
    rendered = render(run_helm, VALUES / "folder-store.yaml")
    for _, container in rendered.containers():
        given = rendered.environment(container)
        mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
        assert f"file://{mounts['store']['mountPath']}" == given["HIBUG2_STORE_URL"]
        assert ("images" in mounts) == ((container["name"], "images") in used_by_code())
        if "images" in mounts:
            assert f"file://{mounts['images']['mountPath']}" == given["HIBUG2_IMAGE_PREFIXES"]
            assert mounts["images"]["readOnly"] is True


def test_secrets_come_from_secrets_and_reach_only_who_needs_them(run_helm: Run) -> None:
    full = render(run_helm, VALUES / "full.yaml")
    redis, llm = ("HIBUG2_REDIS_URL", "redis", "address"), ("HIBUG2_LLM_API_KEY", "llm", "token")
    for _, container in full.containers():
        asked = {
            (e["name"], e["valueFrom"]["secretKeyRef"]["name"], e["valueFrom"]["secretKeyRef"]["key"])
            for e in container["env"]
        }
        assert asked == ({redis, llm} if (container["name"], "llm") in used_by_code() else {redis})
        reads_llm = "HIBUG2_LLM_BASE_URL" in variables_of(load_settings(service_of(container), {}))
        assert ("HIBUG2_LLM_BASE_URL" in full.environment(container)) == reads_llm
        assert {"secretRef": {"name": "object-store"}} in container["envFrom"]
    assert full.of("Secret") == {}
    for settings in full.of("ConfigMap").values():
        assert not {"HIBUG2_REDIS_URL", "HIBUG2_LLM_API_KEY"} & settings["data"].keys()


def variables_of_component(name: str) -> set[str]:
    return variables_of(load_settings(name.removesuffix("-workers"), {}))


def test_a_changed_setting_restarts_only_who_reads_it(run_helm: Run, tmp_path: Path) -> None:
    def checksums(values: dict[str, Any]) -> dict[str, str]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        return {
            name: d["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
            for name, d in render(run_helm, file).of("Deployment").items()
        }

    before, after = checksums({}), checksums({"images": {"prefixes": ["s3://photos"]}})
    changed = {name for name in before if before[name] != after[name]}
    readers = {
        name for name in (*SERVICES, "tagging-workers") if "HIBUG2_IMAGE_PREFIXES" in variables_of_component(name)
    }
    assert changed == {f"hibug2-{name}" for name in readers} != set(before)


def test_two_releases_in_one_namespace_do_not_meet(run_helm: Run) -> None:
    names = []
    for release in ("hibug2", "staging"):
        done = run_helm("template", release, CHART, "--values", VALUES / "full.yaml")
        names.append({(d["kind"], d["metadata"]["name"]) for d in load_all(done.stdout)})
    assert len(names[0]) == len(names[1]) > 0
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"gatewy": {"replicas": 2}}, "gatewy"),
        ({"gateway": {"replica": 2}}, "replica"),
        ({"gateway": {"replicas": "2"}}, "/gateway/replicas"),
        ({"enumeration": {"replicas": -1}}, "/enumeration/replicas"),
        ({"repair": {"resources": {"limits": {"memory": 1}}}}, "/repair/resources/limits/memory"),
        ({"repair": {"resources": {"limits": None}}}, "/repair/resources"),
        ({"prediction": {"settings": {"LOG_LEVEL": "info"}}}, "LOG_LEVEL"),
        ({"prediction": {"settings": {"HIBUG2_DRAIN_S": 1000000}}}, "/prediction/settings/HIBUG2_DRAIN_S"),
        ({"tagging": {"settings": {"HIBUG2_LLM_API_KEY": "k"}}}, "HIBUG2_LLM_API_KEY"),
        ({"tagging": {"settings": {"HIBUG2_LISTEN": "0.0.0.0:1"}}}, "HIBUG2_LISTEN"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"image": {"tag": 1.2}}, "/image/tag"),
        ({"store": {"url": "file:///data"}}, "/store/existingClaim"),
        ({"store": {"url": "/data"}}, "/store/url"),
        ({"redis": {"url": "redis://:password@redis:6379/0"}}, "/redis/url"),
        ({"images": {"prefixes": "s3://photos"}}, "/images/prefixes"),
        ({"images": {"prefixes": ["s3://photos,s3://more"]}}, "/images/prefixes/0"),
        ({"llm": {"baseUrl": "https://llm.example.com/v1"}}, "/llm/model"),
        ({"llm": {"apiKey": "k"}}, "apiKey"),
        ({"logLevel": "loud"}, "/logLevel"),
        ({"taggingWorkers": {"autoscaling": {"mode": ["keda", "hpa"]}}}, "/taggingWorkers/autoscaling/mode"),
        ({"taggingWorkers": {"autoscaling": {"keda": True, "hpa": True}}}, "/taggingWorkers/autoscaling"),
        ({"taggingWorkers": {"autoscaling": {"mode": "keda"}}}, "/metrics/prometheusUrl"),
        ({"taggingWorkers": {"autoscaling": {"mode": "hpa", "minReplicas": 0}}}, "minReplicas"),
        ({"taggingWorkers": {"autoscaling": {"scaleDownSeconds": 30}}}, "scaleDownSeconds"),
        ({"enumeration": {"autoscaling": {"mode": "keda"}}}, "/enumeration/autoscaling/mode"),
        ({"tls": {"enabled": True}}, "/tls"),
        ({"ingress": {"enabled": True}}, "/ingress/host"),
        ({"route": {"enabled": True, "hostnames": ["a.example.com"]}}, "/route/parentRefs"),
        ({"networkPolicy": {"redisTo": [{"ipBlok": {"cidr": "10.0.0.0/8"}}]}}, "ipBlok"),
        ({"tagging": {"settings": {"HIBUG2_LEASE_SECONDS": "60"}}}, "HIBUG2_LEASE_SECONDS"),
        ({"jobs": {"minSlices": "many"}}, "/jobs/minSlices"),
        ({"reflection": "yes"}, "/reflection"),
    ],
)
def test_wrong_values_are_refused(run_helm: Run, tmp_path: Path, values: dict[str, Any], where: str) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    done = run_helm("template", "hibug2", CHART, "--values", file)
    assert done.returncode != 0
    assert where in done.stderr
