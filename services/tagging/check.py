"""A check of the tags of one tagging: what is tagged again, and what is written down of it.

A second tagging is a tagging like any other, of a sample, below `checks/`, so workers do it and nothing of it is paid
twice; what it says is kept with the tagging that was checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from services.tagging.course import Wanted
from services.tagging.quality import asked_attributes, judge, references, sample_rows
from shared.errors import NotFound, Precondition, invalid
from shared.names import Name, content_id, dataset_id, parse
from shared.schema import Tagger
from shared.store.artifacts import Artifacts, TagTable, checked_schema, now

SAMPLE, MAX_SAMPLE = 100, 10_000


@dataclass(frozen=True)
class Check:
    """A check that somebody asked for; `wanted` is its second tagging, None where nothing is asked again.

    `rows` (n,) int64 are those of the sample in the table of `tagging`.
    """

    name: Name
    tagging: Name
    rows: npt.NDArray[np.int64]
    wanted: Wanted | None
    seed: int
    min_kappa: float
    model: str


def tagging_to_check(artifacts: Artifacts, parent: str, tagging: str) -> Name:
    """The tagging that is named, or the newest complete one of the current schema of dataset `parent`."""
    dataset = dataset_id(parent, "parent")
    if tagging:
        return parse(tagging, "taggings", "tagging", within=dataset)
    artifacts.dataset(dataset)
    current = artifacts.current_schema_id(dataset)
    for name in _newest_first(artifacts, dataset):
        if artifacts.manifest(name).provenance.parameters["schema"] == current:
            return name
    raise NotFound(f"nothing of dataset '{dataset}' is tagged by its current schema; `hibug2 run` does so")


def plan_check(
    artifacts: Artifacts,
    tagging: Name,
    sample_count: int,
    seed: int,
    *,
    prompt_digest: str,
    model: str,
    min_kappa: float,
) -> Check:
    """What is to be done; the model is "" where there is none to ask.

    InvalidInput for a sample out of bounds, NotFound for a tagging that is absent or not finished, Precondition when a
    language model gave tags and none is there to be asked again.
    """
    count = sample_count or SAMPLE
    if not 1 <= count <= MAX_SAMPLE:
        raise invalid("sample_count", f"is {count}; give 1 to {MAX_SAMPLE}")
    table = artifacts.tag_table(tagging)
    if not model and any(a.tagger is Tagger.VLM for a in table.schema.attributes):
        raise Precondition(
            "a language model gave some of the tags and none is configured to be asked again; set HIBUG2_LLM_BASE_URL "
            "and HIBUG2_LLM_MODEL for the tagging service and its workers"
        )
    dead = artifacts.read_part(tagging, "rows").column("dead").to_numpy(zero_copy_only=False)
    asked = asked_attributes(table.schema, llm=bool(model))
    record = artifacts.dataset(tagging.dataset)
    instances = artifacts.instances(record)
    there = _positions(table, instances)
    rows = sample_rows(~dead & (there >= 0), count, seed) if asked else np.empty(0, dtype=np.int64)
    key = content_id(
        tagging=str(tagging), sample=count, seed=seed, prompt=prompt_digest, model=model, min_kappa=min_kappa
    )
    name = Name(tagging.dataset, "checks", key)
    wanted = None
    if len(rows):
        wanted = Wanted(
            name=name,
            instances=instances.take(pa.array(there[rows])).combine_chunks(),
            schema=table.schema,
            dataset_digest=record.digest,
            splits=(),
            prompt_digest=prompt_digest,
            model=model,
            clip="",
            redrive=0,
            anew=asked,
        )
    return Check(name, tagging, rows, wanted, seed, min_kappa, model)


def conclude(artifacts: Artifacts, check: Check) -> None:
    """Write down what the check says: with the tagging, with its schema, and under its own name.

    The second tagging, where there is one, is complete.
    """
    table = artifacts.tag_table(check.tagging)
    again: dict[int, npt.NDArray[np.uint16]] = {}
    cost: Mapping[str, Any] = {}
    if check.wanted is not None and check.wanted.anew is not None:
        second = artifacts.tag_table(check.name)
        again = {j: second.codes[:, j] for j in check.wanted.anew}
        cost = artifacts.manifest(check.name).summary["usage"]
    known = references(table.schema, table.codes, _columns(artifacts, check.tagging, table))
    found = judge(table.schema, table.codes, check.rows, again, known, check.min_kappa)
    body = {
        "tagging": str(check.tagging),
        "schema": f"{check.tagging.parent}/schemas/{table.schema.schema_id}",
        "check": str(check.name),
        "sampled_count": len(check.rows),
        "seed": check.seed,
        "min_kappa": check.min_kappa,
        "model": check.model if again else "",
        "usage": cost,
        "create_time": now(),
        "attributes": [asdict(quality) for quality in found],
    }
    for name in (check.tagging, checked_schema(check.tagging.dataset, table.schema.schema_id), check.name):
        artifacts.write_quality(name, body)


def quality_of(artifacts: Artifacts, parent: str, schema: str) -> dict[str, Any]:
    """What the last check of tagging `parent` says, or of the newest tagging of dataset `parent` that was checked.

    Only taggings of `schema`, where it is not "". NotFound when there was no check.
    """
    named = parent.count("/") == 3
    dataset = parse(parent, "taggings", "parent").dataset if named else dataset_id(parent, "parent")
    wanted = parse(schema, "schemas", "schema", within=dataset).id if schema else ""
    names = [parse(parent, "taggings", "parent")] if named else _newest_first(artifacts, dataset)
    for name in names:
        if wanted and artifacts.manifest(name).provenance.parameters["schema"] != wanted:
            continue
        try:
            return artifacts.quality(name)
        except NotFound:
            continue
    raise NotFound(f"nobody has checked the tags of {parent}; `hibug2 tagging quality {parent} --check` does so")


def _newest_first(artifacts: Artifacts, dataset: str) -> list[Name]:
    """The complete taggings of a dataset."""
    ids = artifacts.store.names(artifacts.path(Name(dataset, "taggings", "")))
    names = [name for name in (Name(dataset, "taggings", id_) for id_ in ids) if artifacts.is_complete(name)]
    return sorted(names, key=lambda name: artifacts.manifest(name).provenance.create_time, reverse=True)


def _positions(table: TagTable, instances: pa.Table) -> npt.NDArray[np.int64]:
    """(N,) where `instances` has each row of `table`, -1 where it has it no more."""
    found = pc.index_in(table.instance_ids, value_set=instances.column("instance_id").combine_chunks())
    return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _columns(artifacts: Artifacts, tagging: Name, table: TagTable) -> dict[str, list[str | None]]:
    """The manifest's further columns, by name, in the order of `table`."""
    instances = artifacts.instances(artifacts.dataset(tagging.dataset))
    given = [dict(row or ()) for row in instances.column("given").to_pylist()]
    there = _positions(table, instances).tolist()
    names = sorted({name for row in given for name in row})
    return {name: [given[i].get(name) if i >= 0 else None for i in there] for name in names}
