"""The network policies allow the edges that the code uses, and no other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.chart.calls import unknown_places, used_by_code
from tests.chart.conftest import SERVICES, VALUES, Manifests, Run, render

# A port of its own for each system outside, so that an edge to a port is an edge to a system.
PORTS = {"redis": 7001, "store": 7002, "images": 7003, "llm": 7004, "traces": 7005, "kubernetes": 7006}
EVERYTHING = {
    "redis": {"url": "redis://redis:7001/0", "port": PORTS["redis"]},
    "store": {"url": "s3://artifacts", "port": PORTS["store"]},
    "images": {"prefixes": ["s3://photos"], "port": PORTS["images"]},
    "llm": {"baseUrl": "https://llm.example.com:7004/v1", "model": "m", "port": PORTS["llm"]},
    "traces": {"otlpEndpoint": "http://collector:7005", "port": PORTS["traces"]},
    "jobs": {"enabled": True},
    "networkPolicy": {"kubernetesPort": PORTS["kubernetes"]},
}


def selected(manifests: Manifests, selector: dict[str, Any]) -> set[str]:
    """Components of the pods that the selector selects."""
    found = set()
    for _, template in manifests.pods():
        labels = template["metadata"]["labels"]
        if selector.get("matchLabels", {}).items() <= labels.items():
            found.add(labels["app.kubernetes.io/component"])
    return found


def egress(manifests: Manifests) -> set[tuple[str, str, int]]:
    """(component, component or "outside", TCP port) that may be called; name servers aside."""
    edges = set()
    for policy in manifests.of("NetworkPolicy").values():
        for source in selected(manifests, policy["spec"]["podSelector"]):
            for rule in policy["spec"].get("egress", []):
                ports = [p["port"] for p in rule["ports"]]
                if ports == [53, 53]:
                    continue
                for port in ports:
                    for peer in rule.get("to", [{}]):
                        inside = selected(manifests, peer["podSelector"]) if "podSelector" in peer else {"outside"}
                        edges |= {(source, target, port) for target in inside}
    return edges


def ingress(manifests: Manifests) -> set[tuple[str, str, int]]:
    """(component or "anybody", component, port) that is let in."""
    edges = set()
    for policy in manifests.of("NetworkPolicy").values():
        for target in selected(manifests, policy["spec"]["podSelector"]):
            for rule in policy["spec"].get("ingress", []):
                for port in [p["port"] for p in rule["ports"]]:
                    for peer in rule.get("from", [{}]):
                        inside = selected(manifests, peer["podSelector"]) if "podSelector" in peer else {"anybody"}
                        edges |= {(source, target, port) for source in inside}
    return edges


@pytest.fixture(scope="module")
def everything(run_helm: Run, tmp_path_factory: pytest.TempPathFactory) -> Manifests:
    file = tmp_path_factory.mktemp("values") / "everything.yaml"
    file.write_text(yaml.safe_dump(EVERYTHING))
    return render(run_helm, file)


def test_every_setting_that_names_a_place_is_known() -> None:
    assert unknown_places() == [], (
        "these settings name a place: add them to SYSTEMS in tests/chart/calls.py, and their edge to hibug2.calls and "
        "hibug2.uses in the chart"
    )


def test_egress_is_what_the_code_calls(everything: Manifests) -> None:
    system_at = {port: system for system, port in PORTS.items()}
    allowed = {
        (source, system_at[port] if target == "outside" else target) for source, target, port in egress(everything)
    }
    assert allowed - {("test", "gateway")} == used_by_code()


def test_calls_between_components_are_let_in_and_nothing_else_is(everything: Manifests) -> None:
    inside = {edge for edge in egress(everything) if edge[1] != "outside" and edge[0] != "test"}
    assert inside == {("gateway", service, 50051) for service in SERVICES if service != "gateway"}
    assert ingress(everything) == inside | {("anybody", "gateway", 50051), ("anybody", "gateway", 8080)}


def test_an_edge_too_many_and_one_too_few_are_seen(everything: Manifests) -> None:
    wrong = Manifests(copy.deepcopy(everything.documents))
    rules = wrong.of("NetworkPolicy")["hibug2-repair"]["spec"]["egress"]
    rules.append({"ports": [{"port": PORTS["llm"]}]})
    assert egress(wrong) - egress(everything) == {("repair", "outside", PORTS["llm"])}
    del rules[1:]
    assert {edge[0] for edge in egress(everything) - egress(wrong)} == {"repair"}


@pytest.mark.parametrize("values", ["full", "tls"])
def test_all_else_is_denied(run_helm: Run, values: str) -> None:
    rendered = render(run_helm, VALUES / f"{values}.yaml")
    deny = rendered.of("NetworkPolicy")["hibug2-deny"]["spec"]
    assert deny == {"podSelector": deny["podSelector"], "policyTypes": ["Ingress", "Egress"]}
    everyone = {template["metadata"]["labels"]["app.kubernetes.io/component"] for _, template in rendered.pods()}
    assert selected(rendered, deny["podSelector"]) == everyone
    for policy in rendered.of("NetworkPolicy").values():
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_people_metrics_and_outside_systems_are_held_to_the_given_peers(run_helm: Run) -> None:
    rendered = render(run_helm, VALUES / "full.yaml")
    policies = {name: policy["spec"] for name, policy in rendered.of("NetworkPolicy").items()}
    people = policies["hibug2-gateway"]["ingress"][0]["from"]
    assert {"namespaceSelector": {"matchLabels": {"team": "vision"}}} in people
    for component in (*SERVICES, "tagging-workers"):
        metrics = [rule for rule in policies[f"hibug2-{component}"]["ingress"] if rule["ports"][0]["port"] == 9090]
        assert metrics[0]["from"] == [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
        ]
        redis = [rule for rule in policies[f"hibug2-{component}"]["egress"] if rule["ports"][0]["port"] == 6380]
        assert redis[0]["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "data"}}}]


def test_a_pod_of_a_job_reaches_the_store_and_redis_alone(everything: Manifests) -> None:
    job = everything.of("NetworkPolicy")["hibug2-enumeration-job"]["spec"]
    ports = {rule["ports"][0]["port"] for rule in job["egress"]}
    assert ports == {53, PORTS["redis"], PORTS["store"], PORTS["traces"]}
    assert "ingress" not in job
