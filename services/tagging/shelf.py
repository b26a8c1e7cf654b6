"""One tagging in the store: its plan, the results that were written down so far, and in the end its table.

A chunk holds the results of many parts; it is written by rename, and a part counts once a chunk has it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.tagging.given import given_codes
from services.tagging.plan import Group, Plan
from services.tagging.reuse import Known, identities
from shared.errors import DataLoss, NotFound
from shared.llm import Usage
from shared.names import Name
from shared.schema import NOT_VISIBLE, UNKNOWN, Schema, Tagger
from shared.store.artifacts import Artifacts, Manifest, Provenance, TagTable, tags_to_arrow

_PLAN_COLUMNS = ["instance_id", "image_uri", "label", "left_px", "top_px", "width_px", "height_px"]
_FIGURES = b"hibug2.figures"


@dataclass(frozen=True)
class Outline:
    """What a plan says beside its rows. `id` tells it from another plan of a tagging of the same name."""

    id: str
    dataset: str  # digest
    schema: str
    rows_per_part: int
    row_count: int
    groups: tuple[tuple[tuple[int, ...], int], ...]  # attributes, and how many rows lack them
    reused: bool  # there are tags to take over
    prompt_digest: str
    model: str
    clip: str = ""


@dataclass(frozen=True)
class Figures:
    """What results tell beside tags: the spend, the answers asked of a model, those that stayed invalid, dead rows."""

    usage: Usage = field(default_factory=Usage)
    asked: int = 0
    invalid: int = 0
    dead: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.usage + other.usage,
            self.asked + other.asked,
            self.invalid + other.invalid,
            self.dead + other.dead,
        )

    @property
    def invalid_share(self) -> float:
        return self.invalid / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class PartResult:
    """What a worker found for a part: `codes` (rows, attributes of its group) uint16, and dead rows with the reason."""

    part: int
    codes: npt.NDArray[np.uint16]
    dead: Mapping[int, str]
    figures: Figures


@dataclass(frozen=True)
class DeadRow:
    """An instance that could not be tagged."""

    instance_id: str
    image_uri: str
    reason: str


@dataclass(frozen=True)
class Written:
    """What chunks hold: numbers of parts, and the figures of all."""

    parts: frozenset[int]
    figures: Figures


class Shelf:
    """The folder of one tagging. Blocking: async code calls it in a thread."""

    def __init__(self, artifacts: Artifacts, name: Name) -> None:
        self._artifacts = artifacts
        self._store = artifacts.store
        self.name = name

    def _path(self, *parts: str) -> str:
        return self._artifacts.path(self.name, *parts)

    # The plan

    def outline(self) -> Outline:
        """NotFound when nothing is planned."""
        told = self._store.read_json(self._path("plan.json"))
        groups = tuple((tuple(attributes), rows) for attributes, rows in told.pop("groups"))
        return Outline(groups=groups, **told)

    def plan(self, outline: Outline) -> Plan:
        """The plan that was made; it stays the same for all attempts, for parts are named after it."""
        order = self._store.read_table(self._path("plan", "rows.parquet")).column("row").to_numpy()
        ends = np.cumsum([rows for _, rows in outline.groups])
        cut = np.split(order, ends[:-1]) if len(ends) else []
        groups = tuple(Group(attributes, rows) for (attributes, _), rows in zip(outline.groups, cut, strict=True))
        return Plan(outline.row_count, groups, outline.rows_per_part)

    def write_plan(
        self,
        plan: Plan,
        instances: pa.Table,
        known: Known,
        *,
        dataset: str,
        schema: str,
        prompt_digest: str,
        model: str,
        clip: str,
    ) -> Outline:
        """Store what workers read and what later attempts go on from; `plan.json` comes last."""
        for number, rows in enumerate(plan.shards):
            shard = instances.select(_PLAN_COLUMNS).take(pa.array(rows))
            self._store.write_table(self._path("plan", f"{number:06d}.parquet"), shard)
        self._store.write_table(self._path("plan", "rows.parquet"), pa.table({"row": pa.array(plan.rows)}))
        reused = bool(known.mask.any())
        if reused:
            self._store.write_table(self._path("plan", "reused.parquet"), _codes_to_arrow(known.codes))
        outline = Outline(
            id=uuid.uuid4().hex[:12],
            dataset=dataset,
            schema=schema,
            rows_per_part=plan.rows_per_part,
            row_count=plan.row_count,
            groups=tuple((group.attributes, len(group.rows)) for group in plan.groups),
            reused=reused,
            prompt_digest=prompt_digest,
            model=model,
            clip=clip,
        )
        self._store.write_json(self._path("plan.json"), asdict(outline))
        return outline

    def shard(self, number: int) -> pa.Table:
        """Instances of one shard of the plan."""
        return self._store.read_table(self._path("plan", f"{number:06d}.parquet"))

    # Who pays

    def budget(self) -> tuple[str, float] | None:
        """The account that was named and its cap; None when the tagging has no budget."""
        try:
            told = self._store.read_json(self._path("budget.json"))
        except NotFound:
            return None
        return told["account"], told["amount"]

    def write_budget(self, account: str, amount: float) -> None:
        self._store.write_json(self._path("budget.json"), {"account": account, "amount": amount})

    # Results

    def written(self) -> Written:
        """What is in the store of the parts."""
        parts: set[int] = set()
        figures = Figures()
        for table in self._chunks(["part"]):
            parts.update(np.unique(table.column("part").to_numpy()).tolist())
            figures += _figures_of(table)
        return Written(frozenset(parts), figures)

    def write_chunk(self, plan: Plan, results: Sequence[PartResult], attribute_count: int) -> None:
        """Write down `results`: all of them are there afterwards, or none."""
        parts = [plan.parts[result.part] for result in results]
        codes = np.full((sum(p.count for p in parts), attribute_count), UNKNOWN, dtype=np.uint16)
        reasons: list[str] = []
        at = 0
        for part, result in zip(parts, results, strict=True):
            codes[at : at + part.count, plan.attributes_of(part)] = result.codes
            reasons += [result.dead.get(i, "") for i in range(part.count)]
            at += part.count
        table = _codes_to_arrow(codes)
        table = table.append_column("part", pa.array(np.repeat([p.number for p in parts], [p.count for p in parts])))
        table = table.append_column("row", pa.array(np.concatenate([plan.rows_of(p) for p in parts])))
        table = table.append_column("reason", pa.array(reasons, pa.string()))
        figures = sum((result.figures for result in results), Figures())
        table = table.replace_schema_metadata({_FIGURES: json.dumps(asdict(figures))})
        self._store.write_table(self._path("chunks", f"{parts[0].number:08d}-{uuid.uuid4().hex[:8]}.parquet"), table)

    def _chunks(self, columns: list[str] | None = None) -> Iterable[pa.Table]:
        for file in self._store.names(self._path("chunks")):
            yield self._store.read_table(self._path("chunks", file), columns)

    # The table

    def close(
        self,
        plan: Plan,
        outline: Outline,
        instances: pa.Table,
        schema: Schema,
        buried: Mapping[int, str],
        provenance: Provenance,
        attribute_keys: Mapping[str, str],
    ) -> None:
        """Write table, dead rows and manifest, and remove plan and chunks.

        `buried` are parts that no worker finished, with the reason. DataLoss when other parts are missing.
        """
        shape = (instances.num_rows, len(schema.attributes))
        codes = np.full(shape, UNKNOWN, dtype=np.uint16)
        if outline.reused:
            codes[:] = _codes_of(self._store.read_table(self._path("plan", "reused.parquet")), shape[1])
        reasons: dict[int, str] = {}
        missing, figures = set(range(len(plan.parts))), Figures()
        group_of = np.array([part.group for part in plan.parts], dtype=np.int64)
        for table in self._chunks():
            part, row = table.column("part").to_numpy(), table.column("row").to_numpy()
            found, figures = _codes_of(table, shape[1]), figures + _figures_of(table)
            for g, group in enumerate(plan.groups):
                here = group_of[part] == g
                codes[np.ix_(row[here], group.attributes)] = found[np.ix_(here, group.attributes)]
            reasons |= {int(r): why for r, why in zip(row, table.column("reason").to_pylist(), strict=True) if why}
            missing -= set(part.tolist())
        for number in missing & buried.keys():
            reasons |= dict.fromkeys(plan.rows_of(plan.parts[number]).tolist(), buried[number])
        if left := sorted(missing - buried.keys()):
            raise DataLoss(f"{self.name} lacks {len(left)} of {len(plan.parts)} parts, the first is {left[0]}")
        given = [j for j, a in enumerate(schema.attributes) if a.tagger is Tagger.GIVEN]
        codes[:, given] = given_codes(instances, [schema.attributes[j] for j in given])
        self._write(instances, schema, codes, reasons)
        self._artifacts.complete(
            self.name,
            Manifest(
                provenance,
                {
                    "instance_count": instances.num_rows,
                    "dead_count": len(reasons),
                    "reused_count": instances.num_rows - len(plan.rows),
                    "asked_count": figures.asked,
                    "invalid_answer_count": figures.invalid,
                    "usage": asdict(figures.usage),
                    "attribute_keys": dict(attribute_keys),
                    "unknown": {a: int((codes[:, j] == UNKNOWN).sum()) for j, a in enumerate(schema.names())},
                    "not_visible": {
                        a.name: int((codes[:, j] == a.code(NOT_VISIBLE)).sum()) if NOT_VISIBLE in a.tags else 0
                        for j, a in enumerate(schema.attributes)
                    },
                },
            ),
        )
        self._store.delete(self._path("plan"))
        self._store.delete(self._path("chunks"))

    def _write(
        self, instances: pa.Table, schema: Schema, codes: npt.NDArray[np.uint16], reasons: Mapping[int, str]
    ) -> None:
        table = TagTable(instances.column("instance_id").combine_chunks(), codes, schema)
        self._artifacts.write_part(self.name, "tags", tags_to_arrow(table))
        dead = np.zeros(instances.num_rows, dtype=np.bool_)
        rows = sorted(reasons)
        dead[rows] = True
        columns = {"identity": pa.array(identities(instances)), "dead": pa.array(dead)}
        self._artifacts.write_part(self.name, "rows", pa.table(columns))
        lost = instances.select(["instance_id", "image_uri"]).take(pa.array(rows, pa.int64()))
        lost = lost.append_column("reason", pa.array([reasons[row] for row in rows], pa.string()))
        self._artifacts.write_part(self.name, "dead", lost)

    def dead(self) -> list[DeadRow]:
        """The instances that could not be tagged: of the table, or where that is not there yet, of the chunks."""
        if self._artifacts.is_complete(self.name):
            if not self._artifacts.manifest(self.name).summary["dead_count"]:
                return []
            return [DeadRow(**row) for row in self._artifacts.read_part(self.name, "dead").to_pylist()]
        try:
            plan = self.plan(self.outline())
        except NotFound:
            return []
        found: dict[int, str] = {}  # position in the plan -> why
        place = {int(row): i for i, row in enumerate(plan.rows)}
        for table in self._chunks(["row", "reason"]):
            pairs = zip(table.column("row").to_pylist(), table.column("reason").to_pylist(), strict=True)
            found |= {place[row]: why for row, why in pairs if why}
        return self.instances_at(plan, found)

    def instances_at(self, plan: Plan, reasons: Mapping[int, str]) -> list[DeadRow]:
        """The instances at positions of the plan, each with its reason."""
        found: list[DeadRow] = []
        start = 0
        for number, rows in enumerate(plan.shards):
            here = [i for i in sorted(reasons) if start <= i < start + len(rows)]
            if here:
                shard = self.shard(number).select(["instance_id", "image_uri"]).take([i - start for i in here])
                found += [DeadRow(reason=reasons[i], **row) for i, row in zip(here, shard.to_pylist(), strict=True)]
            start += len(rows)
        return found


def _codes_to_arrow(codes: npt.NDArray[np.uint16]) -> pa.Table:
    """A column a attribute; its name could be that of another column, so they are counted."""
    columns = {f"code_{j}": pa.array(np.ascontiguousarray(column)) for j, column in enumerate(codes.T)}
    return pa.table(columns)


def _codes_of(table: pa.Table, attribute_count: int) -> npt.NDArray[np.uint16]:
    return np.column_stack([table.column(f"code_{j}").to_numpy() for j in range(attribute_count)])


def _figures_of(table: pa.Table) -> Figures:
    told: dict[str, Any] = json.loads(table.schema.metadata[_FIGURES])
    return Figures(Usage(**told.pop("usage")), **told)
