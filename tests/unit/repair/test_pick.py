"""Picks as an artifact of a small dataset in a store."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from services.repair.methods import BY_SLICES, Method
from services.repair.pick import Wanted, check_asked, class_codes, pick_artifact, pool_of, read_picks
from shared.errors import InvalidInput, NotFound, Precondition
from shared.names import Name
from shared.schema import UNKNOWN, Task
from shared.store.artifacts import Provenance, items_of
from tests.unit.shared.world import OFFSETS, POOL, RANKING, SCHEMA, TAGGING, N, World

NAME = Name("pets", "selections", "s")
WANTED = Wanted(Method.LOWEST_MEAN, 1000, "pool")
PROBABLE = [m for m in Method if m in ("least_confidence", "margin", "entropy", "slices_and_margin")]


def no_file(uri: str):
    raise AssertionError(f"{uri} was opened")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def probable(tmp_path_factory) -> World:
    """A world whose model gave probabilities for its two classes."""
    found = World(tmp_path_factory.mktemp("probable"))
    scores = found.artifacts.scores(found.model)
    rng = np.random.default_rng(0)
    best = rng.uniform(0.5, 1, scores.num_rows)
    is_bear = np.array([label == "bear" for label in scores.column("predicted_label").to_pylist()])
    bear = np.where(is_bear, best, 1 - best)
    column = pa.array(np.column_stack([bear, 1 - bear]).astype(np.float32).tolist(), pa.list_(pa.float32()))
    scores = scores.drop_columns(["probabilities", "confidence"])
    scores = scores.append_column("confidence", pa.array(best)).append_column("probabilities", column)
    found.artifacts.write_scores(found.model, scores)
    return found


def picked(world: World, wanted: Wanted = WANTED, read_file=no_file, open_image=no_file) -> tuple[pa.Table, dict]:
    pick_artifact(world.artifacts, NAME, RANKING, wanted, read_file=read_file, open_image=open_image)
    return read_picks(world.artifacts, NAME, None)[0], dict(world.artifacts.manifest(NAME).summary)


def ids_of(picks: pa.Table) -> list[str]:
    return picks.column("instance_id").to_pylist()


@pytest.mark.parametrize("method", [Method.LOWEST_MEAN, Method.DROP_SUPPORT, Method.P_VALUE, Method.SINGLE_ATTRIBUTE])
@pytest.mark.parametrize("spread", [False, True])
def test_each_pick_matches_the_slice_that_asked_for_it(world, method, spread):
    picks, summary = picked(world, replace(WANTED, method=method, spread=spread))
    errors = world.artifacts.read_part(RANKING, "error_slices")
    assert errors.num_rows > 0
    assert summary["pick_count"] == picks.num_rows
    assert picks.num_rows > 0 or method is Method.SINGLE_ATTRIBUTE
    assert summary["pool_count"] == POOL
    codes = world.codes.copy()
    codes[:, 0] = [SCHEMA.attributes[0].code(name) for name in world.predicted]
    items = items_of(picks)
    asked = items_of(errors)
    for row, pick in enumerate(picks.to_pylist()):
        instance = world.ids.index(pick["instance_id"])
        assert instance >= N
        assert pick["pool_index"] == instance - N
        assert pick["predicted_label"] == world.predicted[instance]
        assert items[row].tolist() == asked[pick["slice_rank"] - 1].tolist()
        assert pick["slice_mean"] == pick["value"] == errors.column("mean")[pick["slice_rank"] - 1].as_py()
        held = (codes[instance] + OFFSETS[:-1]).tolist()
        assert {item for item in items[row].tolist() if item >= 0} <= set(held)
    if method is Method.LOWEST_MEAN and not spread:
        assert picks.column("slice_rank").to_pylist() == sorted(picks.column("slice_rank").to_pylist())


def test_picks_go_by_the_scores_that_were_ranked(tmp_path):
    world = World(tmp_path)
    before, _ = picked(world)
    world.score_anew(["cat"] * len(world.ids))
    assert picked(world)[0].equals(before)
    assert world.artifacts.manifest(NAME).provenance.inputs["scores"] == world.model.digest


def test_no_more_than_the_budget_is_picked(world):
    assert picked(world, replace(WANTED, budget=2))[0].num_rows == 2
    picks, summary = picked(world, replace(WANTED, method=Method.RANDOM, budget=7))
    assert picks.num_rows == summary["pick_count"] == 7
    assert picks.column("slice_rank").to_pylist() == [0] * 7
    assert len(set(ids_of(picks))) == 7


def test_a_seed_fixes_the_random_draw(world):
    wanted = [replace(WANTED, method=Method.RANDOM, budget=20, seed=seed) for seed in (1, 1, 2)]
    one, again, other = (ids_of(picked(world, w)[0]) for w in wanted)
    assert one == again != other


@pytest.mark.parametrize("method", [Method.LOWEST_MEAN, Method.RANDOM, Method.K_CENTER])
def test_without_error_slices_nothing_is_asked_for_and_the_file_can_be_read(method, tmp_path):
    world = World(tmp_path, fails=False)
    assert world.artifacts.read_part(RANKING, "error_slices").num_rows == 0
    picks, summary = picked(world, replace(WANTED, method=method, budget=5, rivals=(Method.RANDOM,)))
    expected = 0 if method is Method.LOWEST_MEAN else 5
    assert picks.num_rows == summary["pick_count"] == expected
    assert {"instance_id", "image_uri", "slice_rank", "slice_mean"} <= set(picks.column_names)
    assert summary["unmatched_slice_count"] == 0


@pytest.mark.parametrize("method", list(Method))
def test_who_asks_for_error_slices_is_told_that_there_are_none(world, method, tmp_path):
    wanted = replace(WANTED, method=method)
    check_asked(world.artifacts, RANKING, wanted)
    good = World(tmp_path, fails=False)
    if method in BY_SLICES:
        with pytest.raises(Precondition, match="no error slices to pick for; rank with a lower margin"):
            check_asked(good.artifacts, RANKING, wanted)
    else:
        check_asked(good.artifacts, RANKING, wanted)


def test_rivals_pick_as_many_beside(probable):
    rivals = tuple(Method)
    own, summary = picked(probable, replace(WANTED, rivals=rivals))
    told = {m["method"]: m for m in summary["methods"]}
    assert list(told) == ["lowest_mean", *(m for m in rivals if m is not Method.LOWEST_MEAN)]
    codes = probable.codes.copy()
    codes[:, 0] = [SCHEMA.attributes[0].code(name) for name in probable.predicted]
    items = items_of(probable.artifacts.read_part(RANKING, "error_slices"))
    failing = {
        probable.ids[row]
        for row in range(N, N + POOL)
        for slice_ in items
        if {i for i in slice_.tolist() if i >= 0} <= set((codes[row] + OFFSETS[:-1]).tolist())
    }
    for method in rivals:
        picks, _ = read_picks(probable.artifacts, NAME, method)
        assert picks.num_rows == told[method]["pick_count"] <= own.num_rows
        assert len(set(ids_of(picks))) == picks.num_rows
        assert told[method]["shared_count"] == len(set(ids_of(picks)) & set(ids_of(own)))
        assert told[method]["matching_count"] == len(set(ids_of(picks)) & failing)


def test_a_method_that_did_not_pick_is_named(world):
    picked(world, replace(WANTED, rivals=(Method.RANDOM,)))
    with pytest.raises(InvalidInput, match=r"no picks by margin; it has lowest_mean, random"):
        read_picks(world.artifacts, NAME, Method.MARGIN)
    with pytest.raises(NotFound):
        read_picks(world.artifacts, Name("pets", "selections", "none"), None)


@pytest.mark.parametrize("method", PROBABLE)
def test_methods_that_need_probabilities_say_so(world, method):
    with pytest.raises(Precondition, match="add its scores with"):
        picked(world, replace(WANTED, method=method))


@pytest.mark.parametrize("method", list(Method))
def test_a_quota_and_exclusions_hold_for_every_method(probable, method):
    left_out = tuple(probable.ids[N : N + 20])
    wanted = replace(WANTED, method=method, class_quota=3, excluded_ids=(*left_out, "elsewhere"))
    picks, _ = picked(probable, wanted)
    assert not set(ids_of(picks)) & set(left_out)
    labels = picks.column("predicted_label").to_pylist()
    assert all(labels.count(name) <= 3 for name in set(labels))
    if method not in ("single_attribute", "p_value", "drop_support", "lowest_mean", "slices_and_margin"):
        assert len(labels) == 6


def test_near_copies_and_broken_images_are_left_out(world):
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(POOL)]
    uris = {f"file:///images/{name}.png": i for i, name in enumerate(world.ids[N:])}

    def open_image(uri):
        i = uris[uri]
        if i == 7:
            raise NotFound("gone")
        return np.clip(pictures[i // 2].astype(int) + i % 2, 0, 255).astype(np.uint8)  # each is there twice

    wanted = replace(WANTED, method=Method.RANDOM, without_near_copies=True)
    picks, summary = picked(world, wanted, open_image=open_image)
    pairs = [row // 2 for row in picks.column("pool_index").to_pylist()]
    assert sorted(pairs) == list(range(POOL // 2))
    assert summary["near_copies"] == POOL // 2 - 1
    assert summary["unreadable"] == 1


def test_k_center_is_far_from_what_is_known_and_goes_by_the_embeddings(world):
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(N + POOL, 5)).astype(np.float32)
    sink = io.BytesIO()
    order = rng.permutation(N + POOL)
    ids = [world.ids[i] for i in order]
    pq.write_table(pa.table({"instance_id": ids, "embedding": vectors[order].tolist()}), sink)
    wanted = replace(WANTED, method=Method.K_CENTER, budget=8, embeddings_uri="file:///e.parquet")
    picks, _ = picked(world, wanted, read_file=lambda _: sink.getvalue())
    known = list(vectors[:N].astype(float))
    for row in picks.column("pool_index").to_pylist():
        distance = [min(np.sum((v - k) ** 2) for k in known) for v in vectors[N:].astype(float)]
        assert distance[row] == pytest.approx(max(distance), rel=1e-4)
        known.append(vectors[N + row].astype(float))


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (None, "is no Parquet file"),
        ({"instance_id": ["i400"]}, "is no Parquet file"),
        ({"instance_id": ["i400"], "embedding": [[1.0]]}, "lacks 59 instances of the pool"),
        ({"instance_id": ["i400", "i401"], "embedding": [[1.0], [1.0, 2.0]]}, "different lengths"),
        ({"instance_id": ["i400"], "embedding": [[float("nan")]]}, "not finite"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(world, table, what):
    sink = io.BytesIO(b"nothing")
    if table is not None:
        pq.write_table(pa.table(table), sink)
    wanted = replace(WANTED, method=Method.K_CENTER, embeddings_uri="file:///e.parquet")
    with pytest.raises(InvalidInput, match=what):
        picked(world, wanted, read_file=lambda _: sink.getvalue())


@pytest.mark.parametrize(
    ("ids", "vector"),
    [
        ([f"i{i}" for i in range(20_000)], [0.5] * 256),  # 20 MB of vectors
        (["x" * 10_000] * 2_000, [0.5]),  # 20 MB of ids
    ],
)
def test_a_small_file_of_embeddings_that_gets_large_is_refused_with_the_limit(world, monkeypatch, ids, vector):
    sink = io.BytesIO()
    pq.write_table(pa.table({"instance_id": ids, "embedding": [vector] * len(ids)}), sink)
    assert len(sink.getvalue()) < 1 << 20
    monkeypatch.setattr("services.repair.pick.MAX_VECTOR_BYTES", 1 << 20)
    wanted = replace(WANTED, method=Method.K_CENTER, embeddings_uri="file:///e.parquet")
    with pytest.raises(InvalidInput, match="holds more than 1,048,576 bytes of ids and vectors"):
        picked(world, wanted, read_file=lambda _: sink.getvalue())


def as_detection(world: World) -> None:
    """Three instances of the world become three objects of one image."""
    artifacts = world.artifacts
    schema = replace(SCHEMA, task=Task.DETECTION)
    artifacts.write_schema("pets", schema, Provenance({}))
    for name in (TAGGING, RANKING):
        manifest = artifacts.manifest(name)
        parameters = {**manifest.provenance.parameters, "schema": schema.schema_id}
        artifacts.complete(name, replace(manifest, provenance=replace(manifest.provenance, parameters=parameters)))
    record = artifacts.dataset("pets")
    instances = artifacts.instances(record)
    uris = pa.array([f"file:///images/{i // 3}.png" for i in range(instances.num_rows)])
    at = instances.schema.get_field_index("image_uri")
    part = artifacts.write_instances("pets", instances.set_column(at, instances.schema.field(at), uris))
    artifacts.write_dataset(replace(record, task=Task.DETECTION, parts=(part,)))


@pytest.mark.parametrize("method", [Method.LOWEST_MEAN, Method.RANDOM])
def test_in_detection_an_image_is_picked_once_with_the_object_that_asked_for_it(tmp_path, method):
    world = World(tmp_path)
    as_detection(world)
    seen = []
    wanted = replace(WANTED, method=method, without_near_copies=True)
    rng = np.random.default_rng(0)

    def open_image(uri):
        seen.append(uri)
        return rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)

    picks, summary = picked(world, wanted, open_image=open_image)
    first = N // 3  # the first image with a pool instance; its first object is of the validation split
    assert summary["pool_count"] == len({i // 3 for i in range(N, N + POOL)})
    assert picks["image_uri"].to_pylist() == seen
    assert len(set(seen)) == len(seen) == summary["pick_count"] > 0
    errors = items_of(world.artifacts.read_part(RANKING, "error_slices"))
    codes = world.codes.copy()
    codes[:, 0] = [SCHEMA.attributes[0].code(name) for name in world.predicted]
    for pick in picks.to_pylist():
        instance = world.ids.index(pick["instance_id"])
        assert pick["image_uri"] == f"file:///images/{instance // 3}.png"
        assert pick["pool_index"] == instance // 3 - first
        if method is Method.LOWEST_MEAN:
            asked = errors[pick["slice_rank"] - 1]
            assert {i for i in asked.tolist() if i >= 0} <= set((codes[instance] + OFFSETS[:-1]).tolist())
    if method is Method.LOWEST_MEAN:
        values = picks["value"].to_pylist()
        assert values == sorted(values)
    assert read_picks(world.artifacts, NAME, None)[1][0] == ("main object", "bear")


def test_tags_of_another_schema_are_not_picked_from(tmp_path):
    world = World(tmp_path)
    manifest = world.artifacts.manifest(TAGGING)
    provenance = replace(manifest.provenance, parameters={"schema": "0123456789abcdef"})
    world.artifacts.complete(TAGGING, replace(manifest, provenance=provenance))
    with pytest.raises(
        Precondition, match="has the schema 0123456789abcdef, and datasets/pets/rankings/r was made with"
    ):
        picked(world)


def test_tags_and_instances_of_the_pool_are_in_one_order(world):
    tags, rows = pool_of(world.artifacts, TAGGING, "pool")
    assert tags.instance_ids.to_pylist() == rows.column("instance_id").to_pylist() == world.ids[N:]
    with pytest.raises(Precondition, match="'test'"):
        pool_of(world.artifacts, TAGGING, "test")


def test_the_class_is_what_the_model_says_else_the_label(world):
    rows = pa.table({"instance_id": ["a", "b", "c", "d"], "label": ["cat", "cat", None, "cow"]})
    scores = pa.table({"instance_id": ["a", "c", "d"], "predicted_label": ["bear", None, None]})
    assert class_codes(SCHEMA, rows, scores).tolist() == [0, 1, UNKNOWN, UNKNOWN]


def test_the_methods_differ(probable):
    """Each rival is a rule of its own, not another's under a new name."""
    wanted = [replace(WANTED, method=m, budget=12) for m in ("random", "least_confidence", "k_center", "lowest_mean")]
    found = [tuple(ids_of(picked(probable, replace(w, method=Method(w.method)))[0])) for w in wanted]
    assert all(a != b for a, b in itertools.combinations(found, 2))
