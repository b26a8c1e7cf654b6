"""Whom each component calls, read from the code: the settings that name places, and who reads them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib import import_module

from tests.chart.conftest import ROOT, SERVICES

# What a setting says the place of.
SYSTEMS = {
    "redis_url": "redis",
    "store_url": "store",
    "image_prefixes": "images",
    "otlp_endpoint": "traces",
    "jobs_enabled": "kubernetes",
}
PLACES = ("_url", "_address", "_endpoint", "_prefixes", "_host", "jobs_enabled")
# No calls by themselves: an address to listen on, and an endpoint that is called by whom `llm_from` gives a client.
NO_CALLS = {"http_host", "llm_base_url"}
# What each Deployment runs.
STARTS = {
    **{service: f"services.{service}.server" for service in SERVICES},
    "tagging-workers": "services.tagging.worker",
}


@cache
def syntax(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def modules_from(start: str) -> set[str]:
    """`start` and the modules of the same service that it stands on."""
    service = ".".join(start.split(".")[:2])
    found: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(syntax(module)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for name in named:
                path = ROOT.joinpath(*name.split("."))
                if name.startswith(f"{service}.") and (path.with_suffix(".py").exists() or path.is_dir()):
                    waiting.append(name)
    return found


def settings_used(tree: ast.AST) -> Iterator[str]:
    """Fields of settings that the code reads, and `llm_from` where it is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if holder.lstrip("_") == "settings":
                yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "llm_from":
            yield "llm_from"


@cache
def used_by_code() -> set[tuple[str, str]]:
    """(component, what it calls) as the code has it."""
    shared = {
        name for module in (ROOT / "shared").rglob("*.py") for name in settings_used(ast.parse(module.read_text()))
    } & {"otlp_endpoint"}
    edges = set()
    for component, start in STARTS.items():
        service = start.split(".")[1]
        fields = import_module(f"services.{service}.config").Settings.model_fields.keys()
        used = {name for module in modules_from(start) for name in settings_used(syntax(module))} | shared
        for name in used:
            if name == "llm_from":
                edges.add((component, "llm"))
            elif name not in fields:
                continue
            elif name.endswith("_address"):
                edges.add((component, name.removesuffix("_address")))
            elif name in SYSTEMS:
                edges.add((component, SYSTEMS[name]))
    return edges


def unknown_places() -> list[str]:
    """Settings that name a place which nobody here knows, as service.setting."""
    return [
        f"{service}.{name}"
        for service in SERVICES
        for name in import_module(f"services.{service}.config").Settings.model_fields
        if name.endswith(PLACES)
        and name not in SYSTEMS.keys() | NO_CALLS
        and name.removesuffix("_address") not in SERVICES
    ]
