"""One pass over the images of a part, by every tagger that its attributes name."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tagging.tagger import Answer, tag_instances
from shared.errors import Precondition, Unavailable, invalid
from shared.images.box import Box
from shared.llm import Usage
from shared.schema import UNKNOWN, Attribute, Category, Tagger
from shared.store.artifacts import INSTANCES

LOOKING = (Tagger.MEASURED, Tagger.VLM, Tagger.CLIP)
TAGS = tuple(f"t{i}" for i in range(60))


@dataclass
class Reader:
    """Images of one pixel that holds their number; those of `bad` cannot be read."""

    bad: frozenset[int]
    opened: list[str] = field(default_factory=list)

    def open(self, uri: str) -> np.ndarray:
        self.opened.append(uri)
        if int(uri) in self.bad:
            raise invalid("image", f"{uri} is none")
        return np.full((1, 1, 3), int(uri), np.uint8)


@dataclass
class Fake:
    """Tags an image by its number, its box, its class and the attribute's own number."""

    shift: int

    def look(self, image: np.ndarray, box: Box | None, attributes: list[Attribute]) -> int:
        return int(image[0, 0, 0]) + (0 if box is None else int(box.left))

    async def tag(self, looks: list[int], labels: list[str], attributes: list[Attribute]) -> Answer:
        codes = [
            [look + len(label) + self.shift + int(attribute.name) for attribute in attributes]
            for look, label in zip(looks, labels, strict=True)
        ]
        return Answer(np.array(codes, np.uint16), Usage(calls=len(looks)), len(looks) * len(attributes), self.shift)


def instances(rows: list[tuple[int, int | None, str | None]]) -> pa.Table:
    columns = {
        "instance_id": [f"i{i}" for i in range(len(rows))],
        "image_uri": [str(image) for image, _, _ in rows],
        "label": [label for _, _, label in rows],
        "left_px": [left for _, left, _ in rows],
        **{name: [None if left is None else 1 for _, left, _ in rows] for name in ("top_px", "width_px", "height_px")},
    }
    return pa.table({name: columns.get(name, [None] * len(rows)) for name in INSTANCES.names}, schema=INSTANCES)


def attributes(taggers: list[Tagger]) -> list[Attribute]:
    return [Attribute(str(i), Category.GLOBAL, TAGS, tagger) for i, tagger in enumerate(taggers)]


rows_of_images = st.lists(
    st.tuples(st.integers(0, 4), st.none() | st.integers(0, 5), st.sampled_from([None, "cat", "bear"])),
    min_size=1,
    max_size=8,
)


@given(rows_of_images, st.lists(st.sampled_from(LOOKING), min_size=1, max_size=6), st.frozensets(st.integers(0, 4)))
def test_each_attribute_gets_the_tags_of_its_tagger_and_an_image_is_opened_once(rows, named, bad):
    reader = Reader(bad)
    fakes = {tagger: Fake(7 * i) for i, tagger in enumerate(LOOKING)}
    tagged = asyncio.run(tag_instances(instances(rows), attributes(named), reader, fakes))
    good = [image not in bad for image, _, _ in rows]
    for i, (image, left, label) in enumerate(rows):
        expected = [image + (left or 0) + len(label or "") + fakes[t].shift + j for j, t in enumerate(named)]
        assert tagged.answer.codes[i].tolist() == (expected if good[i] else [UNKNOWN] * len(named))
        assert bool(tagged.errors[i]) != good[i]
    assert tagged.answer.asked == sum(good) * len(named)
    assert tagged.answer.usage.calls == sum(good) * len(set(named))
    assert tagged.answer.invalid == any(good) * sum(fakes[tagger].shift for tagger in set(named))
    runs = Counter(uri for uri, _ in groupby(str(image) for image, _, _ in rows))
    opened = Counter(reader.opened)
    assert all(opened[uri] == count for uri, count in runs.items() if int(uri) not in bad)


@pytest.mark.parametrize("missing", LOOKING)
def test_a_tagger_that_is_not_here_is_named_before_anything_is_read(missing):
    reader = Reader(frozenset())
    here = {tagger: Fake(0) for tagger in LOOKING if tagger is not missing}
    with pytest.raises(Precondition, match="attribute '1'"):
        asyncio.run(tag_instances(instances([(1, None, None)]), attributes([*here, missing][1:]), reader, here))
    assert reader.opened == []


def test_when_one_tagger_fails_the_others_come_to_their_end():
    """What they ask for is paid, and found again in the cache of answers."""
    ended = []

    class Fails(Fake):
        async def tag(self, *given):
            raise Unavailable("the model is away")

    class Slow(Fake):
        async def tag(self, *given):
            await asyncio.sleep(0)
            ended.append(True)
            return await super().tag(*given)

    taggers = {Tagger.VLM: Fails(0), Tagger.CLIP: Slow(0)}
    with pytest.raises(Unavailable):
        asyncio.run(
            tag_instances(instances([(1, None, None)]), attributes(list(taggers)), Reader(frozenset()), taggers)
        )
    assert ended == [True]


def test_a_storage_that_is_away_is_no_fault_of_the_image():
    class Away(Reader):
        def open(self, uri):
            raise Unavailable("away")

    with pytest.raises(Unavailable):
        asyncio.run(
            tag_instances(
                instances([(1, None, None)]), attributes([Tagger.VLM]), Away(frozenset()), {Tagger.VLM: Fake(0)}
            )
        )
