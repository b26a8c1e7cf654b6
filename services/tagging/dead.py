"""What could not be tagged: images whose file is at fault, and parts that no worker finished; another try for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.tagging.shelf import DeadRow, Shelf
from shared.errors import NotFound
from shared.names import Name, content_id, dataset_id, parse
from shared.store.artifacts import Artifacts


@dataclass(frozen=True)
class Request:
    """What a tagging was asked for; enough to ask for it again."""

    dataset: str
    schema: str
    splits: tuple[str, ...]


def taggings(artifacts: Artifacts, parent: str) -> list[Name]:
    """The taggings that `parent` means: the one it names, or those of a dataset or of all, as their instances are now.

    Of taggings that were tried again only the last counts. NotFound for a tagging or a dataset that is not there.
    """
    if parent.count("/") == 3:
        name = parse(parent, "taggings", "parent")
        if not artifacts.store.names(artifacts.path(name)):
            raise NotFound(f"there is no {name}; 'hibug2 tagging dead {name.parent}' shows those of its dataset")
        return [name]
    datasets = [dataset_id(parent, "parent")] if parent else artifacts.datasets()
    found: list[Name] = []
    for dataset in datasets:
        digest = artifacts.dataset(dataset).digest
        for id_ in artifacts.store.names(artifacts.path(Name(dataset, "taggings", ""))):
            name = Name(dataset, "taggings", id_)
            if not artifacts.is_complete(name):
                if not _is_of(artifacts, name, digest):
                    continue
            else:
                provenance = artifacts.manifest(name).provenance
                tries = redrives(artifacts, _request(artifacts, name))
                if provenance.inputs["dataset"] != digest or provenance.parameters.get("redrive", 0) < tries:
                    continue
            found.append(name)
    return found


def dead_rows(artifacts: Artifacts, name: Name) -> list[DeadRow]:
    """The instances of a tagging that could not be tagged, so far."""
    return Shelf(artifacts, name).dead()


def buried_rows(artifacts: Artifacts, name: Name, buried: Sequence[tuple[str, int, str]]) -> list[DeadRow]:
    """The instances of parts that no worker finished, of a tagging that is not complete.

    `buried` are (plan, part, reason); those of another plan are left out.
    """
    shelf = Shelf(artifacts, name)
    try:
        outline = shelf.outline()
        plan = shelf.plan(outline)
    except NotFound:
        return []
    reasons: dict[int, str] = {}
    for plan_id, number, reason in buried:
        if plan_id == outline.id:
            part = plan.parts[number]
            reasons |= dict.fromkeys(range(part.start, part.start + part.count), reason)
    return shelf.instances_at(plan, reasons)


def redriven(artifacts: Artifacts, name: Name) -> Request:
    """Count one more try for the dead of a complete tagging: what is asked for now is another tagging.

    Asked again before that one is made, it is the same.
    """
    asked = _request(artifacts, name)
    tries = max(artifacts.manifest(name).provenance.parameters.get("redrive", 0) + 1, redrives(artifacts, asked))
    artifacts.store.write_json(_counter(artifacts, asked), {"count": tries})
    return asked


def redrives(artifacts: Artifacts, asked: Request) -> int:
    """How often the dead of what is asked for were tried again."""
    try:
        return int(artifacts.store.read_json(_counter(artifacts, asked))["count"])
    except NotFound:
        return 0


def _is_of(artifacts: Artifacts, name: Name, digest: str) -> bool:
    try:
        return Shelf(artifacts, name).outline().dataset == digest
    except NotFound:
        return False


def _request(artifacts: Artifacts, name: Name) -> Request:
    parameters = artifacts.manifest(name).provenance.parameters
    return Request(name.dataset, str(parameters["schema"]), tuple(parameters["splits"]))


def _counter(artifacts: Artifacts, asked: Request) -> str:
    key = content_id(schema=asked.schema, splits=asked.splits)
    return artifacts.path(Name(asked.dataset, "redrives", key), "count.json")
