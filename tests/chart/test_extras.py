"""Each service's extra brings what its code imports: an image lacks nothing that a developer's environment has."""

from __future__ import annotations

import ast
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.images.build import EXTRAS, HEAVY
from tests.chart.conftest import ROOT, SERVICES

PROJECT = "hibug2-platform"
OURS = {"services", "shared", "prompts", "deploy"}
# The code says what is missing where these are asked for without their extra.
OPTIONAL = {"torch", "open_clip"}


def _project_requires() -> tuple[str, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_extras = project["optional-dependencies"].items()
    return (*project["dependencies"], *(f'{line}; extra == "{name}"' for name, lines in of_extras for line in lines))


PROJECT_REQUIRES = _project_requires()


@cache
def imported(module: str) -> frozenset[str]:
    """Names that the module imports, also inside functions, but not for type checkers alone."""
    path = ROOT.joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def outside(service: str) -> set[str]:
    """Top-level packages of others that the service's code imports, directly or by what it stands on."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [f"services.{service}.__main__"]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in imported(module):
            if name.split(".")[0] not in OURS:
                found.add(name.split(".")[0])
            elif is_module(name):
                waiting.append(name)
    return found - set(sys.stdlib_module_names) - {"hibug2"}


def brought(extras: frozenset[str]) -> set[str]:
    """Distributions that the platform with these extras installs, as this environment knows them."""
    found: set[str] = set()
    waiting = [(PROJECT, extras)]
    while waiting:
        name, wanted = waiting.pop()
        for line in _requires(name):
            requirement = Requirement(line)
            contexts = [{"extra": extra} for extra in wanted] or [{"extra": ""}]
            if requirement.marker and not any(requirement.marker.evaluate(context) for context in contexts):
                continue
            key, more = requirement.name.lower().replace("_", "-"), frozenset(requirement.extras)
            if key not in found or more:
                found.add(key)
                if key != PROJECT or more - wanted:
                    waiting.append((key, more | (wanted if key == PROJECT else frozenset())))
    return found


@cache
def _requires(name: str) -> tuple[str, ...]:
    if name == PROJECT:
        return PROJECT_REQUIRES
    try:
        return tuple(requires(name) or ())
    except PackageNotFoundError:
        return ()


@pytest.mark.parametrize("service", SERVICES)
def test_the_extra_brings_what_the_code_imports(service: str) -> None:
    own = frozenset({service, *EXTRAS.split(","), *(HEAVY if service == "enumeration" else ())})
    there = brought(own)
    owners = packages_distributions()
    missing = {
        package: owners.get(package, ["?"])
        for package in outside(service) - OPTIONAL
        if not {name.lower().replace("_", "-") for name in owners.get(package, [])} & there
    }
    assert not missing, f"services/{service} imports these, and the extra `{service}` does not bring them"


def test_whatever_an_image_may_hold_is_pinned_to_a_version_that_fits() -> None:
    """All but the CLIP models' libraries: which of their builds is right depends on the machine."""
    text = (ROOT / "constraints.txt").read_text()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in text.split())}
    asked = [Requirement(line) for line in PROJECT_REQUIRES if not line.endswith('extra == "clip"')]
    assert len(asked) > 50
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        if name not in (PROJECT, "hibug2"):
            assert requirement.specifier.contains(pinned.get(name, "0")), f"{requirement}: run `make lock`"
