"""Rankings of two models as their readers ask for them, held against plain Python on the same instances."""

from __future__ import annotations

import math
import statistics
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hibug2.v1 import slice_pb2 as pb
from hibug2.v1 import types_pb2
from services.enumeration import families, lattice, ranking
from services.enumeration.ranking import rank_artifact
from services.enumeration.slice_server import SliceServicer
from services.enumeration.slices import enumerate_artifact
from services.enumeration.statistics import halves
from services.gateway.datasets import check_instances, record_of
from shared.errors import InvalidInput
from shared.names import Name
from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import (
    SCORES,
    Artifacts,
    Manifest,
    ModelRecord,
    Provenance,
    TagTable,
    tags_to_arrow,
)
from shared.store.store import Store

ROWS, MIN_COUNT, DEPTH, MARGIN = 900, 10, 3, 0.1
DATASET, TAGGING, ENUMERATION = "pets", Name("pets", "taggings", "t"), Name("pets", "enumerations", "e")
V1, V2 = (str(Name(DATASET, "rankings", model)) for model in ("v1", "v2"))
TAGS = {
    MAIN_OBJECT: ("cat", "dog", "owl"),
    "mood": ("calm", "wild"),
    "light": ("dark", "dim", "bright", "x"),
    "fur": ("no", "yes"),
}
SCHEMA = Schema(
    Task.CLASSIFICATION, (), tuple(Attribute(name, Category.GLOBAL, tags, Tagger.VLM) for name, tags in TAGS.items())
)
NUMBERS = (
    "depth", "count", "scored_count", "mean", "drop", "parent_drop", "error_share", "interval_low", "interval_high",
    "p_value", "q_value", "family", "rank",
)  # fmt: skip


class Data:
    """Tags, scores of both models, and the slices that they make."""

    def __init__(self) -> None:
        rng = np.random.default_rng(8)
        self.codes = np.column_stack([rng.integers(0, len(tags), ROWS) for tags in TAGS.values()]).astype(np.uint16)
        self.codes[rng.random(self.codes.shape) < 0.02] = UNKNOWN
        dark_cat = self.holds({MAIN_OBJECT: ["cat"], "light": ["dark"]})
        wild_dog = self.holds({MAIN_OBJECT: ["dog"], "mood": ["wild"]})
        first = np.where(dark_cat, 0.3, np.where(wild_dog, 0.5, 0.9))
        second = np.where(dark_cat, 0.95, np.where(wild_dog, 0.2, 0.9))
        self.scores = np.column_stack([rng.random(ROWS) < chance for chance in (first, second)]).astype(float)
        self.scores[rng.choice(ROWS, 30, replace=False), 0] = np.nan

    def holds(self, terms: dict[str, list[str]]) -> np.ndarray:
        held = np.ones(len(self.codes), dtype=bool)
        for name, tags in terms.items():
            column = list(TAGS).index(name)
            held &= np.isin(self.codes[:, column], [TAGS[name].index(tag) for tag in tags])
        return held

    def mean(self, tags: Any, column: int) -> float:
        """The mean score of a slice."""
        return float(np.nanmean(self.scores[self.holds({t.attribute: [t.tag] for t in tags}), column]))


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


@pytest.fixture(scope="module")
def servicer(data: Data, tmp_path_factory: pytest.TempPathFactory) -> SliceServicer:
    folder: Path = tmp_path_factory.mktemp("store")
    artifacts = Artifacts(Store(folder.as_uri()), "default")
    ids = [f"i{row}" for row in range(ROWS)]
    table = pa.table({"instance_id": ids, "image_uri": ids, "split": ["validation"] * ROWS})
    instances = check_instances(table, SCHEMA.task)
    part = artifacts.write_instances(DATASET, instances)
    artifacts.write_dataset(record_of(DATASET, SCHEMA.task, instances, [part], part, []))
    artifacts.write_schema(DATASET, SCHEMA, Provenance({}))
    artifacts.write_part(TAGGING, "tags", tags_to_arrow(TagTable(pa.array(ids), data.codes, SCHEMA)))
    artifacts.complete(TAGGING, Manifest(Provenance({}, {"schema": SCHEMA.schema_id}), {}))
    quiet = {"on_progress": lambda *_: None, "cancelled": lambda: False}
    enumerate_artifact(artifacts, ENUMERATION, TAGGING, "validation", MIN_COUNT, DEPTH, 10_000, **quiet)
    for column, model in enumerate(("v1", "v2")):
        known = {"instance_id": ids, "score": pa.array(data.scores[:, column], from_pandas=True)}
        scores = pa.table({name: known.get(name, [None] * ROWS) for name in SCORES.names}, schema=SCORES)
        record = ModelRecord(DATASET, model, "accuracy", model, ROWS, 0.0, "")
        artifacts.write_scores(record, scores)
        ranking = Name(DATASET, "rankings", model)
        rank_artifact(artifacts, ranking, ENUMERATION, record, margin=MARGIN, permutations=4, seed=0, **quiet)
    return SliceServicer(artifacts.store)


async def listed(
    servicer: SliceServicer, filter_text: str = "", order_by: str = "", size: int = 1000
) -> list[pb.Slice]:
    """All pages of the first model's error slices."""
    found: list[pb.Slice] = []
    token = ""
    while True:
        request = pb.ListSlicesRequest(
            parent=V1, filter=filter_text, order_by=order_by, page_size=size, page_token=token
        )
        response = await servicer.ListSlices(request, None)
        found += response.slices
        token = response.next_page_token
        if not token:
            assert response.total_count == len(found)
            return found


async def streamed(servicer: SliceServicer, filter_text: str = "") -> list[dict[str, Any]]:
    request = pb.ReadSlicesRequest(parent=V1, filter=filter_text)
    pieces = [response.arrow async for response in servicer.ReadSlices(request, None)]
    rows = pa.ipc.open_stream(b"".join(pieces)).read_all().to_pylist()
    return [{**row, "depth": len(row["tags"])} for row in rows]


def ranks(slices: list[pb.Slice]) -> list[int]:
    return [found.rank for found in slices]


@pytest.mark.parametrize("name", NUMBERS)
async def test_every_number_of_a_ranking_filters_and_orders(servicer: SliceServicer, name: str) -> None:
    rows = await streamed(servicer)
    assert len(rows) > 10
    assert not any(row[name] is None or math.isnan(row[name]) for row in rows)
    middle = statistics.median_low(row[name] for row in rows)
    for sign, holds in {
        "<": lambda x: x < middle,
        "<=": lambda x: x <= middle,
        "=": lambda x: x == middle,
        ">=": lambda x: x >= middle,
        ">": lambda x: x > middle,
    }.items():
        expected = [row["rank"] for row in rows if holds(row[name])]
        text = f"{name} {sign} {middle!r}"
        assert ranks(await listed(servicer, text)) == expected
        assert [row["rank"] for row in await streamed(servicer, text)] == expected
    rising = sorted(rows, key=lambda row: (row[name], row["rank"]))
    falling = sorted(rows, key=lambda row: (-row[name], row["rank"]))
    assert ranks(await listed(servicer, order_by=name)) == [row["rank"] for row in rising]
    # Pages are cut from one and the same order.
    assert ranks(await listed(servicer, order_by=f"{name} desc", size=3)) == [row["rank"] for row in falling]


async def test_tags_attributes_and_the_class_filter(servicer: SliceServicer) -> None:
    rows = await streamed(servicer)
    pairs = {row["rank"]: {(p["attribute"], p["tag"]) for p in row["tags"]} for row in rows}
    for text, holds in {
        'class = "cat"': lambda has: (MAIN_OBJECT, "cat") in has,
        "class = dog AND count >= 30": lambda has: (MAIN_OBJECT, "dog") in has,
        "tag = dark": lambda has: ("light", "dark") in has,
        f'attribute = "{MAIN_OBJECT}"': lambda has: MAIN_OBJECT in {a for a, _ in has},
        "attribute = light AND tag = dark": lambda has: ("light", "dark") in has,
        "tag = dark AND tag = cat": lambda has: {("light", "dark"), (MAIN_OBJECT, "cat")} <= has,
    }.items():
        expected = [
            row["rank"] for row in rows if holds(pairs[row["rank"]]) and ("AND count" not in text or row["count"] >= 30)
        ]
        assert ranks(await listed(servicer, text)) == expected
        assert expected, text


async def test_every_slice_is_what_its_instances_say(servicer: SliceServicer, data: Data) -> None:
    overall, loss = np.nanmean(data.scores[:, 0]), np.nansum(1 - data.scores[:, 0])
    means = []
    for found in await listed(servicer):
        held = data.holds({t.attribute: [t.tag] for t in found.tags})
        scores = data.scores[held, 0][~np.isnan(data.scores[held, 0])]
        assert (found.instance_count, found.score.scored_count) == (held.sum(), len(scores))
        assert found.score.mean == pytest.approx(scores.mean())
        assert found.score.drop == pytest.approx(overall - scores.mean())
        assert found.score.error_share == pytest.approx((1 - scores).sum() / loss)
        assert found.score.interval_low <= found.score.mean <= found.score.interval_high
        means.append(found.score.mean)
    assert means == sorted(means)
    surest = (await listed(servicer, order_by="p_value"))[0]
    assert {(t.attribute, t.tag) for t in surest.tags} == {(MAIN_OBJECT, "cat"), ("light", "dark")}


async def test_an_enumeration_has_no_scores_to_filter_by(servicer: SliceServicer) -> None:
    for field in ("rank", "mean", "p_value"):
        with pytest.raises(InvalidInput, match="depth, count"):
            await servicer.ListSlices(pb.ListSlicesRequest(parent=str(ENUMERATION), filter=f"{field} > 0"), None)


@pytest.mark.parametrize(
    "terms",
    [
        {MAIN_OBJECT: ["cat", "owl"]},
        {MAIN_OBJECT: ["cat", "dog"], "light": ["dark", "dim", "x"], "fur": ["yes"]},
        {"light": ["dark"], MAIN_OBJECT: ["cat"]},
    ],
)
async def test_a_hypothesis_may_hold_any_of_several_tags(
    servicer: SliceServicer, data: Data, terms: dict[str, list[str]]
) -> None:
    asked = [pb.AnyOf(attribute=name, tags=tags) for name, tags in terms.items()]
    found = await servicer.EvaluateHypothesis(pb.EvaluateHypothesisRequest(parent=V1, terms=asked), None)
    held = data.holds(terms)
    scores = data.scores[held, 0][~np.isnan(data.scores[held, 0])]
    assert (found.instance_count, found.score.scored_count) == (held.sum(), len(scores))
    assert found.score.mean == pytest.approx(scores.mean())
    assert 0 < found.score.p_value <= 1


async def test_what_is_confirmed_was_found_on_one_half_and_holds_on_the_other(
    servicer: SliceServicer, data: Data
) -> None:
    search = halves(data.scores[:, 0], 3)
    found = await servicer.ConfirmSlices(pb.ConfirmSlicesRequest(parent=V1, seed=3, page_size=1000), None)
    assert found.total_count == len(found.slices) > 0
    assert found.confirmed_count == sum(one.q_value <= 0.05 for one in found.slices if one.HasField("q_value")) > 0
    for one in found.slices:
        held = data.holds({t.attribute: [t.tag] for t in one.tags})
        ours, other = (data.scores[held & half, 0] for half in (search, ~search))
        assert one.found_count == (~np.isnan(ours)).sum()
        assert one.found_mean == pytest.approx(np.nanmean(ours))
        assert one.held_count == (~np.isnan(other)).sum()
        if one.held_count:
            assert one.held_mean == pytest.approx(np.nanmean(other))


async def test_versions_side_by_side(servicer: SliceServicer, data: Data) -> None:
    found = await servicer.CompareModels(pb.CompareModelsRequest(rankings=[V1, V2], page_size=1000), None)
    overall = [np.nanmean(data.scores[:, k]) for k in (0, 1)]
    kinds = {kind: [d for d in found.versions if d.change == kind] for kind in pb.VersionChange.values()}
    assert {c.change: c.slice_count for c in found.changes} == {
        kind: len(some) for kind, some in kinds.items() if kind != pb.VERSION_CHANGE_UNSPECIFIED
    }
    for kind, some in kinds.items():
        for one in some:
            before, after = (data.mean(one.tags, k) for k in (0, 1))
            assert (one.first_mean, one.second_mean) == (pytest.approx(before), pytest.approx(after))
            was, is_ = before < overall[0] - MARGIN, after < overall[1] - MARGIN
            assert (
                kind
                == {
                    (True, False): pb.VERSION_CHANGE_FIXED,
                    (False, True): pb.VERSION_CHANGE_NEW,
                    (True, True): pb.VERSION_CHANGE_REGRESSED if after < before else pb.VERSION_CHANGE_KEPT,
                }[was, is_]
            )

    def named(some: list[pb.SliceDifference], **tags: str) -> bool:
        asked = {(MAIN_OBJECT, tags.pop("main")), *tags.items()}
        return any({(t.attribute, t.tag) for t in one.tags} == asked for one in some)

    assert named(kinds[pb.VERSION_CHANGE_FIXED], main="cat", light="dark")
    assert named(kinds[pb.VERSION_CHANGE_REGRESSED], main="dog", mood="wild")
    assert named(list(found.worse), main="dog", mood="wild")
    assert all(one.difference < 0 for one in found.worse)
    assert 0 <= found.average_overlap <= 1
    assert [o.share for o in found.overlaps] == [pytest.approx(found.average_overlap)]


async def test_the_gate_has_limits_for_all_for_the_grave_and_for_one_slice(servicer: SliceServicer) -> None:
    async def verdict(**limits: Any) -> pb.CheckGateResponse:
        return await servicer.CheckGate(pb.CheckGateRequest(baseline=V1, candidate=V2, **limits), None)

    def stopped(found: pb.CheckGateResponse) -> set[frozenset[tuple[str, str]]]:
        return {frozenset((t.attribute, t.tag) for t in v.tags) for v in found.violations}

    wild_dog = frozenset({(MAIN_OBJECT, "dog"), ("mood", "wild")})
    strict = await verdict(max_drop=0.1)
    assert not strict.passed
    assert wild_dog in stopped(strict)
    assert (await verdict(max_drop=0.9)).passed
    grave = pb.GateSeverity(severity="grave", below=0.3, max_drop=0.05)
    assert wild_dog in stopped(await verdict(max_drop=0.9, severities=[grave]))
    assert (await verdict(max_drop=0.9, severities=[pb.GateSeverity(severity="none", below=0.99, max_drop=0)])).passed
    tags = [types_pb2.AttributeTag(attribute=a, tag=t) for a, t in sorted(wild_dog)]
    own = await verdict(max_drop=0.9, thresholds=[pb.GateThreshold(tags=tags, max_drop=0.05)])
    assert stopped(own) == {wild_dog}
    assert own.violations[0].max_drop == 0.05
    spared = await verdict(max_drop=0.1, thresholds=[pb.GateThreshold(tags=tags, max_drop=0.9)])
    assert wild_dog not in stopped(spared)


class Ranked:
    """One more ranking of the first model, with what it said of its progress."""

    def __init__(self, servicer: SliceServicer, name: str, cancel_at: int | None = None) -> None:
        self.artifacts = Artifacts(servicer._store, "default")
        self.name = Name(DATASET, "rankings", name)
        self.looks = 0
        self.told: list[tuple[int, int]] = []
        self._cancel_at = cancel_at

    def make(self) -> None:
        record = self.artifacts.model(DATASET, "v1")
        rank_artifact(
            self.artifacts,
            self.name,
            ENUMERATION,
            record,
            margin=MARGIN,
            permutations=9,
            seed=0,
            on_progress=lambda done, total: self.told.append((done, total)),
            cancelled=self._cancelled,
        )

    def _cancelled(self) -> bool:
        self.looks += 1
        return self.looks == self._cancel_at


def test_a_ranking_tells_its_progress_and_stops_wherever_it_is_cancelled(
    servicer: SliceServicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.enumeration.work_units._LOOK_SECONDS", 60.0)  # not more often on a slow machine
    whole = Ranked(servicer, "whole")
    whole.make()
    assert all(0 <= done <= total for done, total in whole.told)
    assert [done for done, _ in whole.told] == sorted(done for done, _ in whole.told)
    assert whole.told[-1][0] == whole.told[-1][1]
    assert len({done / total for done, total in whole.told}) >= 5  # the scores, three batches of shuffles, the families
    for at in range(1, whole.looks + 1):
        stopped = Ranked(servicer, f"stopped-{at}", cancel_at=at)
        with pytest.raises(lattice.Cancelled):
            stopped.make()
        assert stopped.looks == at
        assert not stopped.artifacts.is_complete(stopped.name)


@pytest.mark.parametrize(
    "step", ["find_error_slices", "slice_significance", "permuted_scores", "found_by_chance", "tag_blame"]
)
def test_who_cancels_a_ranking_does_not_wait_for_a_long_step(
    servicer: SliceServicer, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    begun, let_go = threading.Event(), threading.Event()

    def long(*_: object, **__: object) -> None:
        begun.set()
        assert let_go.wait(60), "the ranking waited"

    monkeypatch.setattr(ranking, step, long)
    stopped = Ranked(servicer, f"in-{step.replace('_', '-')}")
    monkeypatch.setattr(stopped, "_cancelled", begun.is_set)
    try:
        with pytest.raises(lattice.Cancelled):
            stopped.make()
    finally:
        let_go.set()
    assert not stopped.artifacts.is_complete(stopped.name)


@pytest.mark.parametrize("limit", ["slices", "bytes"])
async def test_families_are_made_of_the_surest_where_not_all_can_be_grouped(
    servicer: SliceServicer, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    rows = await streamed(servicer)
    by_p = sorted(rows, key=lambda row: (row["p_value"], row["rank"]))
    most = 7
    if limit == "slices":
        monkeypatch.setattr(ranking, "MAX_FAMILY_SLICES", most)
    else:
        size = sum(8 * -(-ROWS // 64) + 4 * row["count"] for row in by_p[:most])
        monkeypatch.setattr(families, "MAX_BYTES", size)
    some = Ranked(servicer, limit)
    some.make()
    table = some.artifacts.read_part(some.name, "error_slices")
    told_by = dict(enumerate(table.column("family").to_pylist(), 1))
    grouped = {row["rank"] for row in by_p[:most]}
    assert {rank for rank, leader in told_by.items() if leader} == grouped
    members = some.artifacts.read_part(some.name, "families").column("members").to_pylist()
    assert sorted(rank for ranks in members for rank in ranks) == sorted(grouped)
    assert all(told_by[rank] == ranks[0] for ranks in members for rank in ranks)
