"""`python -m tests.artifacts.write`: keeps what this version writes into the store, for later ones to read.

A folder is named for its version. Once that is released it stays as it is: every later version must read it. A version
whose artifacts hold something else gets a folder of its own; `test_artifacts.py` says when.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from services.enumeration.ranking import rank_artifact
from services.enumeration.slices import enumerate_artifact
from services.gateway.datasets import check_instances, record_of
from services.gateway.scores import check_scores
from services.prediction.predict import predict_by_substitution
from services.prediction.ranked import open_ranking
from services.repair.methods import Method
from services.repair.pick import Wanted, pick_artifact
from services.tagging.plan import Plan, groups_of
from services.tagging.reuse import Known, attribute_key
from services.tagging.shelf import Figures, PartResult, Shelf
from shared.llm import Usage
from shared.names import Name
from shared.schema import MAIN_OBJECT, NOT_VISIBLE, UNKNOWN, Attribute, Category, Measure, Schema, Tagger, Task
from shared.store.artifacts import Artifacts, ModelRecord, Provenance, table_digest
from shared.store.store import Store
from shared.text import StaticEncoder
from shared.version import VERSION

HERE = Path(__file__).parent
TEAM, DATASET, MODEL = "default", "pets", "v1"
TAGGING = Name(DATASET, "taggings", "t")
ENUMERATION = Name(DATASET, "enumerations", "e")
RANKING = Name(DATASET, "rankings", "r")
PREDICTION = Name(DATASET, "predictions", "p")
SELECTION = Name(DATASET, "selections", "s")
N, POOL = 300, 60
CLASSES = ("bear", "cat")
SCHEMA = Schema(
    Task.CLASSIFICATION,
    CLASSES,
    (
        Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, CLASSES, Tagger.GIVEN),
        Attribute("weather", Category.BACKGROUND, ("wet", "dry"), Tagger.GIVEN),
        Attribute(
            "pose",
            Category.MAIN_OBJECT,
            ("sitting", "lying", "climbing", NOT_VISIBLE),
            Tagger.VLM,
            "how it holds itself",
            sources=("direct",),
            locked=True,
        ),
        Attribute(
            "brightness",
            Category.GLOBAL,
            ("dark", "medium", "bright"),
            Tagger.MEASURED,
            measure=Measure("brightness", (0.3, 0.6)),
        ),
    ),
)
_LOOKED_AT = [2, 3]


def write(folder: Path) -> None:
    """A small dataset and all that is made of it, from seeded tags and scores."""
    artifacts = Artifacts(Store(folder.as_uri()), TEAM)
    rng = np.random.default_rng(0)
    codes = np.column_stack([rng.integers(0, len(a.tags), N + POOL) for a in SCHEMA.attributes]).astype(np.uint16)
    codes[(codes[:, 2] == 2) & (rng.random(N + POOL) < 0.8), 2] = 1  # few climb: slices of them are predicted
    labels = [CLASSES[code] for code in codes[:, 0]]
    ids = [f"i{i:03d}" for i in range(N + POOL)]
    sent = {
        "instance_id": ids,
        "image_uri": [f"file:///images/{i}.png" for i in ids],
        "label": pa.array(labels, mask=np.arange(N + POOL) >= N),
        "split": ["validation"] * N + ["pool"] * POOL,
        "weather": [SCHEMA.attributes[1].tags[code] for code in codes[:, 1]],
    }
    instances = check_instances(pa.table(sent), SCHEMA.task)
    part = artifacts.write_instances(DATASET, instances)
    artifacts.write_dataset(record_of(DATASET, SCHEMA.task, instances, [part], part, ["request"]))
    artifacts.write_schema(DATASET, SCHEMA, Provenance({"dataset": part}, prompt_digests={"attributes": "digest"}))
    _tag(artifacts, instances, codes)
    # Bears that lie in the dark are often taken for cats.
    hard = (codes[:, 0] == 0) & (codes[:, 2] == 1) & (codes[:, 3] == 0)
    wrong = rng.random(N + POOL) < np.where(hard, 0.8, 0.05)
    model = _score(artifacts, instances, [CLASSES[code ^ flip] for code, flip in zip(codes[:, 0], wrong, strict=True)])
    quiet = {"on_progress": lambda *_: None, "cancelled": lambda: False}
    enumerate_artifact(artifacts, ENUMERATION, TAGGING, "validation", 10, 3, 100_000, **quiet)
    rank_artifact(artifacts, RANKING, ENUMERATION, model, margin=0.1, permutations=4, seed=0, **quiet)
    ranked = open_ranking(artifacts, RANKING)
    limits = {"neighbours": 3, "max_per_class": 20, "max_origins": 5000}
    predict_by_substitution(ranked, PREDICTION, StaticEncoder(), **limits)
    wanted = Wanted(Method.LOWEST_MEAN, 20, "pool", rivals=(Method.RANDOM,))
    pick_artifact(artifacts, SELECTION, RANKING, wanted, read_file=no_file, open_image=no_file)


def _tag(artifacts: Artifacts, instances: pa.Table, codes: np.ndarray) -> None:
    """The tagging as service and workers make it; the image of the second instance cannot be read."""
    n = instances.num_rows
    lacking = np.zeros(codes.shape, bool)
    lacking[:, _LOOKED_AT] = True
    plan = Plan(n, groups_of(lacking), 100)
    found = codes[:, _LOOKED_AT].copy()
    found[1] = UNKNOWN
    shelf = Shelf(artifacts, TAGGING)
    known = Known(np.full(codes.shape, UNKNOWN, np.uint16), ~np.ones(codes.shape, bool))
    facts = {"dataset": "digest", "schema": SCHEMA.schema_id, "prompt_digest": "digest", "model": "m", "clip": ""}
    outline = shelf.write_plan(plan, instances, known, **facts)
    results = [
        PartResult(
            part.number,
            found[plan.rows_of(part)],
            {1: "the image is empty"} if part.number == 0 else {},
            Figures(Usage(part.count, 1000 * part.count, 20 * part.count), part.count, 0, int(part.number == 0)),
        )
        for part in plan.parts
    ]
    shelf.write_chunk(plan, results, len(SCHEMA.attributes))
    provenance = Provenance({"dataset": "digest"}, {"schema": SCHEMA.schema_id, "splits": []}, {"tag": "digest"}, "m-1")
    keys = {a.name: attribute_key(a, "digest", "m", "") for a in SCHEMA.attributes}
    shelf.close(plan, outline, instances, SCHEMA, {}, provenance, keys)


def _score(artifacts: Artifacts, instances: pa.Table, predicted: list[str]) -> ModelRecord:
    """Predicted labels with probabilities; the pool has no labels, so no scores."""
    probabilities = [[0.75, 0.25] if label == CLASSES[0] else [0.125, 0.875] for label in predicted]
    sent = {"predicted_label": predicted, "probabilities": probabilities}
    scores, metric = check_scores(pa.table({"instance_id": instances.column("instance_id"), **sent}), instances)
    values = scores.column("score").to_numpy()
    mean = float(np.nanmean(values))
    count = int((~np.isnan(values)).sum())
    model = ModelRecord(DATASET, MODEL, metric, table_digest(scores), count, mean, "2024-01-01T00:00:00Z", "request")
    artifacts.write_scores(model, scores)
    return model


def no_file(uri: str) -> bytes:
    raise AssertionError(f"{uri} was opened")


if __name__ == "__main__":
    folder = HERE / VERSION
    if folder.exists():
        sys.exit(f"{folder} is there: remove it first if {VERSION} is not released yet, else raise the version")
    write(folder)
    print(f"wrote {folder}", file=sys.stderr)
