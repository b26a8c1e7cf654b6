"""The CLIP tagger: of each tag set the tag whose phrase lies nearest to the image, without a call (paper 3.2.2).

Its answer is always one of the tags, never "unknown". It is cheap and coarse: how far it can be trusted is what a
check of the tags tells (`quality.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.tagging.tagger import SURROUNDINGS, Answer
from shared.clip import squared, weights_digest
from shared.images.box import Box
from shared.images.reader import RGB, crop
from shared.schema import Attribute, Category

_REVISION = 1  # of phrases and views: raised when either changes, so that earlier tags are not taken over
_KEPT = 20_000  # embedded tag sets, one an attribute and class: for 1,000 classes about 250 MB
_LABEL_CHARS = 80

Vectors = npt.NDArray[np.float32]


class Embedder(Protocol):
    """What tagging needs of a CLIP model."""

    @property
    def side_px(self) -> int: ...

    def texts(self, texts: Sequence[str]) -> Vectors:
        """Unit-norm rows (n, d)."""
        ...

    def images(self, images: Sequence[RGB]) -> Vectors:
        """Unit-norm rows (n, d) of images (side_px, side_px, 3)."""
        ...


@dataclass(frozen=True)
class Views:
    """Squared images of an instance: the object itself, and with its surroundings; None where nobody asks for it."""

    near: RGB | None
    wide: RGB | None


class ClipTagger:
    """Holds each image against the phrases of each tag set. One batch at a time, whoever asks."""

    def __init__(self, model: Embedder) -> None:
        self._model = model
        self._turn = Lock()  # a batch takes all cores; two at once would only take the memory of two
        self._phrases = lru_cache(maxsize=_KEPT)(self._embed_phrases)

    def look(self, image: RGB, box: Box | None, attributes: Sequence[Attribute]) -> Views:
        """What is to be seen of the object in `box`; without a box both views are the whole image.

        InvalidInput when the box is none of this image.
        """
        side = self._model.side_px
        categories = {attribute.category for attribute in attributes}
        near = box is not None and Category.MAIN_OBJECT in categories
        wide = box is None or bool(categories - {Category.MAIN_OBJECT})
        return Views(
            squared(crop(image, box), side) if near and box is not None else None,
            squared(image if box is None else crop(image, box, SURROUNDINGS), side) if wide else None,
        )

    async def tag(self, looks: Sequence[Views], labels: Sequence[str], attributes: Sequence[Attribute]) -> Answer:
        return Answer(await asyncio.to_thread(self._codes, looks, labels, attributes))

    def _codes(
        self, looks: Sequence[Views], labels: Sequence[str], attributes: Sequence[Attribute]
    ) -> npt.NDArray[np.uint16]:
        """(n, A) uint16."""
        codes = np.empty((len(looks), len(attributes)), dtype=np.uint16)
        classes = np.array(labels, dtype=object)
        shown = [view for look in looks for view in (look.near, look.wide) if view is not None]
        wide, near = _places(looks)
        with self._turn:
            rows = self._model.images(shown)
            for j, attribute in enumerate(attributes):
                is_object = attribute.category is Category.MAIN_OBJECT
                seen = rows[near if is_object else wide]
                for label in set(labels) if is_object else [""]:
                    here = classes == label if is_object else slice(None)
                    phrases = self._phrases(attribute.name, attribute.tags, label)
                    codes[here, j] = (seen[here] @ phrases.T).argmax(axis=1)
        return codes

    def _embed_phrases(self, name: str, tags: tuple[str, ...], label: str) -> Vectors:
        return self._model.texts(phrases(name, tags, label))


def _places(looks: Sequence[Views]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(n,) and (n,), where among all views of `looks` the wide one of each is, and the near one; else its only one."""
    count = np.array([(look.near is not None) + (look.wide is not None) for look in looks], dtype=np.int64)
    near = np.cumsum(count) - count
    return near + count - 1, near


def phrases(name: str, tags: Sequence[str], label: str = "") -> list[str]:
    """What is said of an image for each of `tags` of the attribute `name`; `label` is its class, "" where it is open.

    A question is answered in words, for "yes" and "no" show nothing: "is occluded" becomes "occluded" and "not
    occluded". "not visible" is a tag like the others, so that all phrases of a set differ in the tag alone.
    """
    start = f"a photo of a {label[:_LABEL_CHARS]}" if label else "a photo"
    if not name.casefold().startswith("is "):
        return [f"{start}, {name}: {tag}" for tag in tags]
    what = name[3:].strip()
    said = {"yes": what, "no": f"not {what}"}
    return [f"{start}, {said.get(tag.casefold(), f'{what}: {tag}')}" for tag in tags]


def clip_id(model: str, weights: str) -> str:
    """What tags of CLIP depend on beside the attribute: model, weights and phrases; "" where no model is configured.

    Precondition when the weights are a file that is not here.
    """
    return f"{model}@{weights_digest(weights)}/{_REVISION}" if model else ""
