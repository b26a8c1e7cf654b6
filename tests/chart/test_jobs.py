"""Who makes Kubernetes Jobs may do what the code does, and no more; what it makes is held to the policy as well."""

from __future__ import annotations

import re

import pytest

from services.enumeration.kubernetes_jobs import job_of
from services.enumeration.order import Order
from tests.chart.conftest import ROOT, VALUES, Manifests, Run, load_settings, render
from tests.chart.policy import breaches

VERBS = {"read": "get"}


@pytest.fixture(scope="module")
def full(run_helm: Run) -> Manifests:
    return render(run_helm, VALUES / "full.yaml")


def test_the_role_allows_the_calls_of_the_code(full: Manifests) -> None:
    code = (ROOT / "services" / "enumeration" / "kubernetes_jobs.py").read_text()
    called = {
        (f"{kind}s", VERBS.get(verb, verb)) for verb, kind in re.findall(r"self\._\w+\.(\w+?)_namespaced_(\w+)\(", code)
    }
    allowed = {
        (resource, verb)
        for rule in full.of("Role")["hibug2-enumeration"]["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert ("jobs", "create") in called
    assert allowed == called
    assert full.of("ClusterRole") == full.of("ClusterRoleBinding") == {}


def test_only_the_server_has_the_role_and_the_pods_of_jobs_have_none(full: Manifests) -> None:
    bindings = full.of("RoleBinding")
    assert [s["name"] for b in bindings.values() for s in b["subjects"]] == ["hibug2-enumeration"]
    accounts = full.of("ServiceAccount")
    assert all(account["automountServiceAccountToken"] is False for account in accounts.values())
    for deployment, container in full.containers():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] in accounts
        assert (pod["serviceAccountName"] == "hibug2-enumeration") == (container["name"] == "enumeration")
        given = full.environment(container)
        if container["name"] == "enumeration":
            assert given["HIBUG2_JOBS_SERVICE_ACCOUNT"] in accounts.keys() - {"hibug2-enumeration"}
            assert given["HIBUG2_JOBS_IMAGE"] == container["image"]
            assert given["HIBUG2_JOBS_NAMESPACE"] == "vision"


def test_a_job_made_of_the_servers_pod_keeps_the_policy_and_meets_its_network_policy(full: Manifests) -> None:
    template = full.of("Deployment")["hibug2-enumeration"]["spec"]["template"]
    container = template["spec"]["containers"][0]
    settings = load_settings("enumeration", full.environment(container))
    order = Order(
        team="cars", name="enumerations/e", tagging="taggings/t", split="validation", min_count=10, max_depth=3
    )
    job = job_of(template, order, settings)  # type: ignore[arg-type]
    pod = {"kind": "Pod", **job["spec"]["template"]}
    assert list(breaches(pod)) == []
    labels = pod["metadata"]["labels"]
    policy = full.of("NetworkPolicy")["hibug2-enumeration-job"]["spec"]["podSelector"]["matchLabels"]
    assert policy.items() <= labels.items()
    for service in full.of("Service").values():
        if service["metadata"]["name"] != "hibug2-metrics":
            assert not service["spec"]["selector"].items() <= labels.items()


def test_without_jobs_nobody_may_ask_the_api(run_helm: Run) -> None:
    rendered = render(run_helm, VALUES / "keda.yaml")
    assert rendered.of("Role") == rendered.of("RoleBinding") == {}
    for deployment, container in rendered.containers():
        assert deployment["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
        assert "HIBUG2_JOBS_ENABLED" not in rendered.environment(container)
