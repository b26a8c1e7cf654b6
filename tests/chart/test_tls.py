"""With TLS every server has a certificate for the name that it is called by, and probes need none."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.chart.conftest import VALUES, Manifests, Run, render

CLIENT_CA = "HIBUG2_TLS_CLIENT_CA_FILE"


@pytest.fixture(scope="module")
def tls(run_helm: Run) -> Manifests:
    return render(run_helm, VALUES / "tls.yaml")


def test_certificates_hold_the_names_that_are_called(tls: Manifests) -> None:
    certificates = {name: c["spec"] for name, c in tls.of("Certificate").items()}
    assert certificates.keys() == tls.of("Service").keys()
    for name, spec in certificates.items():
        assert {name, f"{name}.vision.svc"} <= set(spec["dnsNames"])
        assert {"server auth", "client auth"} <= set(spec["usages"])
    called = [v for n, v in tls.of("ConfigMap")["hibug2-gateway"]["data"].items() if n.endswith("_ADDRESS")]
    assert {address.removeprefix("dns:///").rpartition(":")[0] for address in called} < certificates.keys()
    assert "hibug2.example.com" in certificates["hibug2-gateway"]["dnsNames"]


def test_files_are_mounted_whole_where_the_settings_say(tls: Manifests) -> None:
    for deployment, container in tls.containers():
        name = deployment["metadata"]["name"]
        given = tls.environment(container)
        files = {n: Path(v) for n, v in given.items() if n.startswith("HIBUG2_TLS_")}
        mounts = {m["name"]: m for m in container["volumeMounts"]}
        # workers serve nobody but the prober
        assert (len(files) > 0) == ("tls" in mounts) == (name in tls.of("Service"))
        if not files:
            continue
        assert {str(path.parent) for path in files.values()} == {mounts["tls"]["mountPath"]}
        # a mounted subPath would never see a renewed certificate
        assert "subPath" not in mounts["tls"]
        volumes = {v["name"]: v for v in deployment["spec"]["template"]["spec"]["volumes"]}
        assert volumes["tls"]["secret"]["secretName"] == tls.of("Certificate")[name]["spec"]["secretName"]
        assert {path.name for path in files.values()} == {"tls.crt", "tls.key", "ca.crt"}


def test_services_ask_each_other_for_certificates_and_people_for_none(tls: Manifests) -> None:
    asking = {d["metadata"]["name"] for d, c in tls.containers() if CLIENT_CA in tls.environment(c)}
    assert asking == tls.of("Service").keys() - {"hibug2-gateway"}


def test_probes_come_without_tls(tls: Manifests) -> None:
    for deployment, container in tls.containers():
        port = tls.environment(container).get("HIBUG2_HEALTH_PORT", "50051")
        assert container["livenessProbe"]["grpc"]["port"] == int(port)
        assert (port == "50052") == (deployment["metadata"]["name"] in tls.of("Service"))


def test_one_secret_of_ones_own_serves_all(run_helm: Run, tmp_path: Path) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"tls": {"enabled": True, "existingSecret": "ours"}}))
    rendered = render(run_helm, file)
    assert rendered.of("Certificate") == {}
    for deployment in rendered.of("Deployment").values():
        for volume in deployment["spec"]["template"]["spec"]["volumes"]:
            assert volume["name"] != "tls" or volume["secret"]["secretName"] == "ours"


def test_without_tls_nothing_of_it_is_there(run_helm: Run) -> None:
    rendered = render(run_helm, VALUES / "minimal.yaml")
    assert "TLS" not in yaml.safe_dump(list(rendered.documents))
    assert "HIBUG2_HEALTH_PORT" not in yaml.safe_dump(list(rendered.documents))
