"""Tags of some instances: every tagger that the attributes name, in one pass over the images (paper 3.2.2)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.images.box import Box
from shared.images.reader import RGB, ImageReader
from shared.llm import Usage
from shared.schema import UNKNOWN, Attribute, Tagger

T = TypeVar("T")

SURROUNDINGS = 0.5  # of the box on each side: what is shown of an object where its background is tagged as well


@dataclass(frozen=True)
class Answer:
    """Codes (n, A) uint16 of n instances, the spend, and of the answers asked of a model how many stayed invalid."""

    codes: npt.NDArray[np.uint16]
    usage: Usage = field(default_factory=Usage)
    asked: int = 0
    invalid: int = 0


class ImageTagger(Protocol):
    """One way to read attributes off images. Only what `look` keeps outlives an open image, so that memory is flat."""

    def look(self, image: RGB, box: Box | None, attributes: Sequence[Attribute]) -> Any:
        """What `tag` needs of an (H, W, 3) uint8 image; called in a thread. HiBug2Error: it cannot be tagged."""
        ...

    async def tag(self, looks: Sequence[Any], labels: Sequence[str], attributes: Sequence[Attribute]) -> Answer:
        """The tags of the instances that were looked at; `labels` are their classes, "" where not known."""
        ...


Taggers = Mapping[Tagger, ImageTagger]


@dataclass(frozen=True)
class Tagged:
    """An answer about all of some instances, and why one could not be tagged ("" where it could)."""

    answer: Answer
    errors: tuple[str, ...]


async def tag_instances(
    instances: pa.Table, attributes: Sequence[Attribute], reader: ImageReader, taggers: Taggers
) -> Tagged:
    """Tag `instances` (columns as INSTANCES) with `attributes`, none of them given by the manifest.

    An image that cannot be read, or whose box is none of it, leaves all tags of its instance unknown and its reason in
    `errors`. Raises Unavailable when the storage or a model is away, Precondition when an attribute's tagger is not
    here, and whatever the taggers raise.
    """
    for attribute in attributes:
        if attribute.tagger not in taggers:
            raise _nobody(attribute)
    of = {t: [j for j, a in enumerate(attributes) if a.tagger is t] for t in taggers}
    of = {t: positions for t, positions in of.items() if positions}
    asked = {t: [attributes[j] for j in positions] for t, positions in of.items()}
    looks, errors = await asyncio.to_thread(_look_at_all, instances, reader, taggers, asked)
    seen = [i for i, error in enumerate(errors) if not error]
    labels = [label or "" for label in instances.column("label").to_pylist()]
    codes = np.full((instances.num_rows, len(attributes)), UNKNOWN, dtype=np.uint16)
    usage, count, invalid = Usage(), 0, 0
    if seen:
        shown = [labels[i] for i in seen]
        answers = await all_ended(taggers[t].tag([looks[i][t] for i in seen], shown, asked[t]) for t in of)
        for positions, answer in zip(of.values(), answers, strict=True):
            codes[np.ix_(seen, positions)] = answer.codes
            usage, count, invalid = usage + answer.usage, count + answer.asked, invalid + answer.invalid
    return Tagged(Answer(codes, usage, count, invalid), tuple(errors))


async def all_ended(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of `work`, done side by side. All of it ends before an error of some is raised: it is paid for."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return [result for result in found if not isinstance(result, BaseException)]


def boxes_of(instances: pa.Table) -> list[Box | None]:
    """The box of each instance, None where it is the whole image."""
    columns = (instances.column(c).to_pylist() for c in ("left_px", "top_px", "width_px", "height_px"))
    return [
        None if left is None else Box(left, top, width, height)
        for left, top, width, height in zip(*columns, strict=True)
    ]


def _look_at_all(
    instances: pa.Table, reader: ImageReader, taggers: Taggers, asked: Mapping[Tagger, Sequence[Attribute]]
) -> tuple[list[dict[Tagger, Any]], list[str]]:
    looks: list[dict[Tagger, Any]] = []
    errors: list[str] = []
    opened: dict[str, RGB] = {}  # objects of one image come one after the other
    for uri, box in zip(instances.column("image_uri").to_pylist(), boxes_of(instances), strict=True):
        try:
            if uri not in opened:
                opened = {}
                opened = {uri: reader.open(uri)}
            looks.append({t: taggers[t].look(opened[uri], box, attributes) for t, attributes in asked.items()})
            errors.append("")
        except (Unavailable, Precondition):
            raise  # the storage, not the image: worth another try, or an operator's hand
        except HiBug2Error as error:
            looks.append({})
            errors.append(str(error))
    return looks, errors


def _nobody(attribute: Attribute) -> Precondition:
    if attribute.tagger is Tagger.VLM:
        return Precondition(
            f"attribute '{attribute.name}' is tagged by a language model and none is configured; "
            "set HIBUG2_LLM_BASE_URL and HIBUG2_LLM_MODEL for the tagging workers"
        )
    if attribute.tagger is Tagger.CLIP:
        return Precondition(
            f"attribute '{attribute.name}' is tagged by CLIP and no model is configured; set HIBUG2_CLIP_MODEL and "
            "HIBUG2_CLIP_WEIGHTS for the tagging service and its workers"
        )
    return Precondition(f"attribute '{attribute.name}' asks for {attribute.tagger} tagging, which is not here")
