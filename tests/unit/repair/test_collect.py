"""What to collect where the pool has too little."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from redis.asyncio import Redis

from hibug2.v1 import repair_pb2 as pb
from services.repair.collect import data_needs, describe, needs, prompt
from services.repair.config import Settings
from services.repair.methods import ErrorSlices
from services.repair.server import RepairServicer
from shared.errors import InvalidInput
from shared.schema import MAIN_OBJECT, Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import items_of
from tests.unit.shared.world import OFFSETS, RANKING, TAGGING, N, World

SCHEMA = Schema(
    Task.CLASSIFICATION,
    ("bear", "cat"),
    (
        Attribute(MAIN_OBJECT, Category.MAIN_OBJECT, ("bear", "cat"), Tagger.GIVEN),
        Attribute("fur color", Category.MAIN_OBJECT, ("brown", "not visible"), Tagger.VLM),
        Attribute("is the head turned away", Category.MAIN_OBJECT, ("yes", "no"), Tagger.VLM),
        Attribute("place", Category.BACKGROUND, ("zoo", "house"), Tagger.VLM),
        Attribute("brightness", Category.GLOBAL, ("dark", "bright"), Tagger.MEASURED),
    ),
)


def errors(items, family):
    n = len(items)
    mean = np.linspace(0.1, 0.5, n)
    return ErrorSlices(np.array(items, np.int32), mean, 0.8 - mean, np.full(n, 10), np.zeros(n), np.array(family))


def test_only_slices_of_which_the_pool_has_too_little_and_one_of_each_family():
    found = needs(SCHEMA, errors([[0, -1], [1, 2], [6, 8], [0, 9]], [1, 1, 3, 0]), np.array([2, 0, 10, 9]), 10)
    assert [(n.slice, n.pool_count, n.missing_count) for n in found] == [(0, 2, 8), (3, 9, 1)]
    assert found[0].tags == ((MAIN_OBJECT, "bear"),)
    assert found[0].mean == 0.1


def test_it_is_said_in_words_and_to_a_generator():
    tags = ((MAIN_OBJECT, "bear"), ("fur color", "not visible"), ("is the head turned away", "yes"), ("place", "zoo"))
    assert describe(SCHEMA, tags, 2, 10) == (
        "Collect 8 images with main object bear, fur color not visible, the head turned away, place zoo; "
        "the pool has 2."
    )
    assert describe(SCHEMA, tags[:1], 0, 1) == "Collect 1 image with main object bear; the pool has none."
    assert prompt(SCHEMA, tags) == (
        "A realistic photo of bear. The object: fur color not visible, the head turned away. The background: place zoo."
    )
    assert prompt(SCHEMA, (("is the head turned away", "no"), ("brightness", "dark"))) == (
        "A realistic photo of one of these: bear, cat. The object: not the head turned away. "
        "The whole image: brightness dark."
    )
    scene = replace(SCHEMA, task=Task.DETECTION)
    assert prompt(scene, tags[:1]) == "A realistic scene with bear."
    assert describe(scene, tags[:1], 0, 2).startswith("Collect 2 objects")


def test_fewer_than_one_is_no_wish():
    with pytest.raises(InvalidInput, match="wanted_count"):
        needs(SCHEMA, errors([[0, -1]], [0]), np.array([0]), -1)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


async def test_what_is_wanted_of_doubtful_tags_says_so(world):
    servicer = RepairServicer(Settings(), Redis(), world.artifacts.store)
    for doubtful in ("", "so so"):
        world.artifacts.write_quality(TAGGING, {"attributes": [{"attribute": "place", "doubt": doubtful}]})
        request = pb.ListDataNeedsRequest(parent=str(RANKING), wanted_count=1000)
        needed = (await servicer.ListDataNeeds(request, None)).needs
        assert any("place" in need.doubtful for need in needed) == bool(doubtful)
        for need in needed:
            names = [tag.attribute for tag in need.tags]
            assert list(need.doubtful) == ["place"] * (doubtful != "" and "place" in names)


def test_the_pool_is_counted_by_the_class_that_the_model_predicts(world):
    found = data_needs(world.artifacts, RANKING, "pool", 1000)
    items = items_of(world.artifacts.read_part(RANKING, "error_slices"))
    assert [n.slice for n in found] == list(range(len(items)))
    codes = world.codes[N:].copy()
    codes[:, 0] = [("bear", "cat").index(name) for name in world.predicted[N:]]
    held = [set(row) for row in (codes + OFFSETS[:-1]).tolist()]
    for need, row in zip(found, items.tolist(), strict=True):
        assert need.pool_count == sum({i for i in row if i >= 0} <= tags for tags in held)
        assert need.pool_count + need.missing_count == 1000
    world.score_anew(["cat"] * len(world.ids))
    assert data_needs(world.artifacts, RANKING, "pool", 1000) == found  # by the scores that were ranked
    nothing = data_needs(world.artifacts, RANKING, "train", 0)
    assert [n.pool_count for n in nothing] == [0] * len(items)
