from __future__ import annotations

import json

import pytest

from shared.config import ImageSettings, LLMEnvironment, ServiceSettings, load


class Settings(ServiceSettings, ImageSettings, LLMEnvironment):
    """All of them."""


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    import os

    for name in [n for n in os.environ if n.startswith("HIBUG2_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HIBUG2_METRICS_PORT", "many"),
        ("HIBUG2_METRICS_PORT", "70000"),
        ("HIBUG2_LOG_LEVEL", "loud"),
        ("HIBUG2_REFLECTION", "perhaps"),
        ("HIBUG2_LLM_TIMEOUT_S", "0"),
        ("HIBUG2_LLM_BASE_URL", "http://localhost"),  # and no model named
        ("HIBUG2_TLS_CERT_FILE", "/tls/tls.crt"),  # and no key
        ("HIBUG2_TLS_KEY_FILE", "/tls/tls.key"),
        ("HIBUG2_TLS_CLIENT_CA_FILE", "/tls/ca.crt"),  # for a server without TLS
        ("HIBUG2_HEALTH_PORT", "-1"),
        ("HIBUG2_LLM_REQUESTS_PER_MINUTE", "-1"),
        ("HIBUG2_LLM_TOKENS_PER_MINUTE", "many"),
        ("HIBUG2_LLM_IMAGE_DETAIL", "medium"),
        ("HIBUG2_LLM_CACHE_TTL_S", "-1"),
    ],
)
def test_a_wrong_variable_ends_the_process_and_is_named(variable, value, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        load(Settings, [])
    assert ended.value.code == 2
    assert variable in capsys.readouterr().err


def test_every_wrong_variable_is_named(monkeypatch, capsys):
    monkeypatch.setenv("HIBUG2_METRICS_PORT", "x")
    monkeypatch.setenv("HIBUG2_DRAIN_S", "-1")
    with pytest.raises(SystemExit):
        load(Settings, [])
    lines = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["HIBUG2_DRAIN_S", "HIBUG2_METRICS_PORT"]


def test_settings_are_printed_without_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HIBUG2_LLM_API_KEY", "sesame-1")
    monkeypatch.setenv("HIBUG2_REDIS_URL", "rediss://user:sesame-2@redis:6379/0")
    monkeypatch.setenv("HIBUG2_STORE_URL", "s3://bucket/folder")
    with pytest.raises(SystemExit) as ended:
        load(Settings, ["--print-config"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "sesame" not in printed
    shown = json.loads(printed)
    assert shown["store_url"] == "s3://bucket/folder"
    assert shown["redis_url"].startswith("rediss://user:***")
    assert shown["redis_url"].endswith("@redis:6379/0")


@pytest.mark.parametrize(
    ("text", "prefixes"),
    [("", ()), ("/data", ("/data",)), (" file:///a , s3://b/c ,", ("file:///a", "s3://b/c"))],
)
def test_prefixes_are_separated_by_commas(text, prefixes, monkeypatch):
    monkeypatch.setenv("HIBUG2_IMAGE_PREFIXES", text)
    assert load(Settings, []).image_prefixes == prefixes
