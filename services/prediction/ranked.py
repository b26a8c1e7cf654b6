"""What predictions are made from and held against: a ranking with its tags and scores, read from the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.prediction.extents import Extents
from shared.errors import Precondition, invalid
from shared.names import Name, parse
from shared.schema import Schema
from shared.store.artifacts import Artifacts, ModelRecord, TagTable, column_by_id, items_of, scores_in_order


@dataclass(frozen=True)
class Ranked:
    """A ranking, and what it was made with. What it stands on is read when first asked for."""

    artifacts: Artifacts
    name: Name
    schema: Schema
    tagging: Name
    enumeration: Name
    split: str
    min_count: int  # M
    max_depth: int  # D
    margin: float
    model: str
    scores_digest: str

    @cached_property
    def error_slices(self) -> pa.Table:
        """In rank order, with at least the items and the drop."""
        return self.artifacts.read_part(self.name, "error_slices")

    @cached_property
    def enumerated(self) -> npt.NDArray[np.int32]:
        """(S, D) items of all slices."""
        return items_of(self.artifacts.read_part(self.enumeration, "slices"))

    @cached_property
    def table(self) -> TagTable:
        """The tags of the ranked split."""
        return rows_of_splits(self.artifacts, self.tagging, [self.split])

    @cached_property
    def scores(self) -> npt.NDArray[np.float64]:
        """(N,) of the rows of `table`, NaN where not scored."""
        return scores_in_order(self._scores, self.table.instance_ids)

    @cached_property
    def extents(self) -> Extents:
        return Extents(self.schema, self.table.codes)

    def is_unseen(self, items: Sequence[int]) -> bool:
        """True when fewer than M instances of the ranked split hold `items`."""
        return self.extents.count(items) < self.min_count

    def classes(self) -> tuple[list[str | None], list[str | None]]:
        """The label and the predicted label of each row of `table`, None where not known."""
        instances = self.artifacts.instances(self.artifacts.dataset(self.name.dataset))
        labels = column_by_id(instances, self.table.instance_ids, "label")
        predicted = column_by_id(self._scores, self.table.instance_ids, "predicted_label")
        return labels.to_pylist(), predicted.to_pylist()

    @cached_property
    def _scores(self) -> pa.Table:
        return self.artifacts.scores_of(self.name.dataset, self.scores_digest)


def open_ranking(artifacts: Artifacts, name: Name) -> Ranked:
    """NotFound when the ranking, or what it was made from, is absent or unfinished.

    Precondition when its tagging has another schema than the ranking: it was made anew under the same name.
    """
    provenance = artifacts.manifest(name).provenance
    parameters = provenance.parameters
    schema, _ = artifacts.schema(name.dataset, str(parameters["schema"]))
    tagging = parse(str(parameters["tagging"]), "taggings", "ranking")
    check_schema_of(artifacts, tagging, schema, str(name))
    return Ranked(
        artifacts,
        name,
        schema,
        tagging,
        parse(str(parameters["enumeration"]), "enumerations", "ranking"),
        str(parameters["split"]),
        int(parameters["min_count"]),
        int(parameters["max_depth"]),
        float(parameters["margin"]),
        str(parameters["model"]),
        provenance.inputs["scores"],
    )


def check_schema_of(artifacts: Artifacts, tagging: Name, schema: Schema, of: str) -> None:
    """Precondition when `tagging` has not `schema`, that of the artifact `of`; it names the first difference."""
    other = str(artifacts.manifest(tagging).provenance.parameters["schema"])
    if other == schema.schema_id:
        return
    theirs = {a.name: a.tags for a in artifacts.schema(tagging.dataset, other)[0].attributes}
    ours = {a.name: a.tags for a in schema.attributes}
    for attribute in (*ours, *theirs):
        if attribute not in theirs:
            difference = f"it does not know the attribute '{attribute}'"
        elif attribute not in ours:
            difference = f"it has the attribute '{attribute}' beside"
        elif ours[attribute] != theirs[attribute]:
            difference = f"'{attribute}' has other tags there"
        else:
            continue
        break
    else:
        difference = "the attributes are described or ordered otherwise"
    raise Precondition(
        f"{tagging} was made with schema {other}, and {of} with {schema.schema_id}: {difference}; "
        "take a tagging with the same schema"
    )


def rows_of_splits(artifacts: Artifacts, tagging: Name, splits: Sequence[str]) -> TagTable:
    """The tag table of the instances of `splits`; InvalidInput when one of them has none."""
    table, rows = artifacts.tagged(tagging, splits)
    found = rows.column("split").unique().to_pylist()
    for split in splits:
        if split not in found:
            there = sorted(artifacts.tagged(tagging)[1].column("split").unique().to_pylist())
            raise invalid("split", f"no tagged instance is in '{split}'; there are {', '.join(there)}")
    return table


def scores_on(artifacts: Artifacts, record: ModelRecord, table: TagTable, where: str) -> npt.NDArray[np.float64]:
    """(N,) scores of a model in the order of `table`; Precondition when it has none there."""
    scores = scores_in_order(artifacts.scores(record), table.instance_ids)
    if np.isnan(scores).all():
        raise Precondition(
            f"model '{record.model}' has no score for any of the {len(scores)} {where} instances; "
            "add them with `hibug2 scores add`"
        )
    return scores
