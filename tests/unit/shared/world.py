"""A small dataset with its tag table, its slices and its error slices in a store."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from services.gateway.datasets import check_instances, record_of
from shared.names import Name
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import (
    SCORES,
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    item_columns,
    table_digest,
    tags_to_arrow,
)
from shared.store.store import Store

SCHEMA = Schema(
    Task.CLASSIFICATION,
    ("bear", "cat"),
    (
        Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, ("bear", "cat"), Tagger.GIVEN),
        Attribute("fur color", Category.MAIN_OBJECT, ("brown", "white", "black", "not visible"), Tagger.VLM),
        Attribute("place", Category.BACKGROUND, ("forest", "zoo", "house", "street"), Tagger.VLM),
    ),
)
TAGGING = Name("pets", "taggings", "t")
ENUMERATION = Name("pets", "enumerations", "e")
RANKING = Name("pets", "rankings", "r")
N, POOL = 400, 60
OFFSETS = np.cumsum([0, *(len(a.tags) for a in SCHEMA.attributes)])


class World:
    """400 scored instances and a pool of 60 without labels; the model predicts the class of each."""

    def __init__(self, folder: Path, fails: bool = True) -> None:
        self.artifacts = Artifacts(Store(folder.as_uri()), "default")
        rng = np.random.default_rng(3)
        self.codes = np.column_stack([rng.integers(0, len(a.tags), N + POOL) for a in SCHEMA.attributes])
        self.codes = self.codes.astype(np.uint16)
        pool = np.arange(N + POOL) >= N
        # No black fur in the zoo, as far as the scored instances show.
        self.codes[~pool & (self.codes[:, 1] == 2) & (self.codes[:, 2] == 1), 2] = 0
        classes = SCHEMA.attributes[0].tags
        self.ids = [f"i{i:03d}" for i in range(N + POOL)]
        self.predicted = [classes[code] for code in self.codes[:, 0]]
        labels = [None if in_pool else name for in_pool, name in zip(pool, self.predicted, strict=True)]
        self.codes[pool, 0] = UNKNOWN  # the class of a pool instance is what the model says
        table = pa.table(
            {
                "instance_id": self.ids,
                "image_uri": [f"file:///images/{i}.png" for i in self.ids],
                "label": pa.array(labels, pa.string()),
                "split": ["pool" if in_pool else "validation" for in_pool in pool],
            }
        )
        instances = check_instances(table, SCHEMA.task)
        part = self.artifacts.write_instances("pets", instances)
        self.artifacts.write_dataset(record_of("pets", SCHEMA.task, instances, [part], part, []))
        self.artifacts.write_schema("pets", SCHEMA, Provenance({}))
        tags = TagTable(pa.array(self.ids), self.codes, SCHEMA)
        self.artifacts.write_part(TAGGING, "tags", tags_to_arrow(tags))
        self.artifacts.complete(TAGGING, Manifest(Provenance({}, {"schema": SCHEMA.schema_id}), {}))
        white_in_zoo = (self.codes[:, 1] == 1) & (self.codes[:, 2] == 1)
        score = np.where(white_in_zoo & (rng.random(N + POOL) < 0.8) & fails, 0.0, 1.0)
        scores = pa.table(
            {
                "instance_id": self.ids,
                "score": pa.array(score, mask=pool),
                "predicted_label": self.predicted,
                "confidence": pa.nulls(len(self.ids)),
                "probabilities": pa.nulls(len(self.ids)),
            }
        ).cast(SCORES)
        self.model = ModelRecord("pets", "v1", "custom", table_digest(scores), N, float(score[:N].mean()), "")
        self.artifacts.write_scores(self.model, scores)
        self._enumerate(score[:N])

    def score_anew(self, predicted: list[str]) -> None:
        """Give the model other scores than those that were ranked: `predicted` for each instance, and never right."""
        scores = self.artifacts.scores(self.model)
        columns = {
            **dict(zip(scores.column_names, scores.columns, strict=True)),
            "score": pa.array(np.zeros(len(self.ids))),
            "predicted_label": predicted,
        }
        table = pa.table(columns).cast(SCORES)
        self.artifacts.write_scores(replace(self.model, digest=table_digest(table), mean_score=0.0), table)

    def _enumerate(self, score: np.ndarray) -> None:
        """The slices with 5 instances or more, and the error slices among them by the paper's rule, one by one."""
        found: dict[tuple[int, ...], tuple[int, float]] = {}
        for depth in (1, 2, 3):
            for attributes in itertools.combinations(range(3), depth):
                for codes in itertools.product(*(range(len(SCHEMA.attributes[a].tags)) for a in attributes)):
                    extent = (self.codes[:N][:, attributes] == codes).all(axis=1)
                    if extent.sum() >= 5:
                        items = tuple(int(OFFSETS[a]) + code for a, code in zip(attributes, codes, strict=True))
                        found[items] = int(extent.sum()), float(score[extent].mean())
        overall = float(score.mean())
        parents = {k: [p for p in itertools.combinations(k, len(k) - 1) if p] for k in found}
        errors = [
            k
            for k, (_, mean) in found.items()
            if mean < overall - 0.2 and all(mean < found[parent][1] for parent in parents[k])
        ]
        errors.sort(key=lambda k: (found[k][1], k))
        inputs = {"scores": self.model.digest}
        parameters = {"tagging": str(TAGGING), "schema": SCHEMA.schema_id, "enumeration": str(ENUMERATION)}
        for name, part, rows in ((ENUMERATION, "slices", list(found)), (RANKING, "error_slices", errors)):
            items = np.full((len(rows), 3), -1, np.int32)
            for i, row in enumerate(rows):
                items[i, : len(row)] = row
            mean = np.array([found[row][1] for row in rows])
            table = {**item_columns(items), "count": [found[row][0] for row in rows], "mean": mean}
            self.artifacts.write_part(name, part, pa.table({**table, "drop": overall - mean}))
            self.artifacts.complete(name, Manifest(Provenance(inputs, {**parameters, "model": "v1"}), {}))
