"""Pods come with the work, go later than a lease, and are not all taken at once."""

from __future__ import annotations

from typing import Any

from tests.chart.conftest import VALUES, Manifests, Run, load_settings, render


def lease_s() -> float:
    return float(load_settings("tagging", {}).model_dump()["lease_s"])


def slow_enough(behavior: dict[str, Any]) -> bool:
    return bool(behavior["scaleDown"]["stabilizationWindowSeconds"] > lease_s())


def test_keda_scales_workers_by_the_whole_backlog(run_helm: Run) -> None:
    rendered = render(run_helm, VALUES / "keda.yaml")
    scaled = rendered.of("ScaledObject")["hibug2-tagging-workers"]["spec"]
    assert scaled["scaleTargetRef"]["name"] in rendered.of("Deployment")
    assert scaled["minReplicaCount"] == 0
    assert scaled["cooldownPeriod"] > lease_s()
    assert slow_enough(scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"])
    trigger = scaled["triggers"][0]["metadata"]
    assert trigger["query"] == 'sum(max by (kind) (hibug2_tagging_backlog{namespace="vision"}))'
    assert rendered.of("HorizontalPodAutoscaler") == {}


def test_hpa_scales_workers_by_the_backlog_and_the_enumeration_by_cpu(run_helm: Run) -> None:
    rendered = render(run_helm, VALUES / "hpa.yaml")
    scalers = {name: scaler["spec"] for name, scaler in rendered.of("HorizontalPodAutoscaler").items()}
    assert set(scalers) == {"hibug2-enumeration", "hibug2-tagging-workers"}
    assert rendered.of("ScaledObject") == {}
    for name, spec in scalers.items():
        assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        assert slow_enough(spec["behavior"])
    assert scalers["hibug2-enumeration"]["metrics"][0]["resource"]["name"] == "cpu"
    assert scalers["hibug2-tagging-workers"]["metrics"][0]["external"]["metric"]["name"] == "hibug2_tagging_backlog"


def test_who_is_scaled_is_told_no_number_of_pods(manifests: Manifests) -> None:
    scaled = {
        scaler["spec"]["scaleTargetRef"]["name"]
        for kind in ("HorizontalPodAutoscaler", "ScaledObject")
        for scaler in manifests.of(kind).values()
    }
    for name, deployment in manifests.of("Deployment").items():
        assert ("replicas" in deployment["spec"]) == (name not in scaled)


def test_a_drain_takes_some_pods_of_each_deployment_and_never_waits_for_ever(manifests: Manifests) -> None:
    budgets = manifests.of("PodDisruptionBudget")
    assert budgets.keys() == manifests.of("Deployment").keys()
    for name, budget in budgets.items():
        deployment = manifests.of("Deployment")[name]
        assert budget["spec"]["selector"] == deployment["spec"]["selector"]
        assert budget["spec"]["maxUnavailable"] == 1
