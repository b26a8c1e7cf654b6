"""Tags of some instances: every tagger that the schema names, in one pass over the images (paper 3.2.2)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from services.tagging.given import given_codes
from services.tagging.measured import measured_codes
from services.tagging.plan import needs_image
from services.tagging.vlm import vlm_codes
from shared.errors import HiBug2Error, Precondition, Unavailable
from shared.images.box import Box
from shared.images.reader import RGB, ImageReader, crop, resized_jpeg
from shared.llm import LLM, Usage
from shared.prompting import Prompt
from shared.schema import UNKNOWN, Schema, Tagger

VLM_SIDE_PX = 768
_CROP_MARGIN = 0.5  # of the box on each side: the background is tagged as well


@dataclass(frozen=True)
class Tagged:
    """Codes (n, A) uint16 of n instances, why an instance could not be tagged ("" when it could), and the spend."""

    codes: npt.NDArray[np.uint16]
    errors: list[str]
    usage: Usage = field(default_factory=Usage)
    invalid_answers: int = 0


async def tag_instances(
    instances: pa.Table, schema: Schema, reader: ImageReader, llm: LLM | None, prompt: Prompt | None
) -> Tagged:
    """Tag `instances` (columns as INSTANCES) with `schema`.

    An image that cannot be read leaves its instance's image tags unknown and its reason in `errors`. Raises
    Unavailable when the storage or the LLM is away, Precondition when the schema asks for an LLM and none is set.
    """
    n, attributes = instances.num_rows, schema.attributes
    codes = np.full((n, len(attributes)), UNKNOWN, dtype=np.uint16)
    errors = [""] * n
    usage, invalid = Usage(), 0
    of = {t: [j for j, a in enumerate(attributes) if a.tagger is t] for t in Tagger}
    if of[Tagger.CLIP]:
        raise Precondition(
            f"attribute '{attributes[of[Tagger.CLIP][0]].name}' asks for CLIP tagging, which is not here"
        )
    if of[Tagger.VLM] and (llm is None or prompt is None):
        raise Precondition(
            f"attribute '{attributes[of[Tagger.VLM][0]].name}' is tagged by a language model and none is configured; "
            "set HIBUG2_LLM_BASE_URL and HIBUG2_LLM_MODEL for the tagging workers"
        )
    if of[Tagger.GIVEN]:
        codes[:, of[Tagger.GIVEN]] = given_codes(instances, [attributes[j] for j in of[Tagger.GIVEN]])
    if not needs_image(schema):
        return Tagged(codes, errors)

    boxes = boxes_of(instances)
    images, errors = await asyncio.to_thread(_open_all, reader, instances.column("image_uri").to_pylist())
    readable = [i for i, image in enumerate(images) if image is not None]
    opened = [image for image in images if image is not None]
    if of[Tagger.MEASURED] and opened:
        measured = await asyncio.to_thread(
            measured_codes, opened, [boxes[i] for i in readable], [attributes[j] for j in of[Tagger.MEASURED]]
        )
        codes[np.ix_(readable, of[Tagger.MEASURED])] = measured
    if of[Tagger.VLM] and llm is not None and prompt is not None:
        asked = tuple(attributes[j] for j in of[Tagger.VLM])
        labels = instances.column("label").to_pylist()
        answers = await asyncio.gather(
            *(
                vlm_codes(llm, prompt, _shown(image, boxes[i]), labels[i] or "", asked)
                for i, image in zip(readable, opened, strict=True)
            )
        )
        for i, (answer, spent, wrong) in zip(readable, answers, strict=True):
            codes[i, of[Tagger.VLM]] = answer
            usage, invalid = usage + spent, invalid + wrong
    return Tagged(codes, errors, usage, invalid)


def boxes_of(instances: pa.Table) -> list[Box | None]:
    """The box of each instance, None where it is the whole image."""
    columns = (instances.column(c).to_pylist() for c in ("left_px", "top_px", "width_px", "height_px"))
    return [
        None if left is None else Box(left, top, width, height)
        for left, top, width, height in zip(*columns, strict=True)
    ]


def _open_all(reader: ImageReader, uris: list[str]) -> tuple[list[RGB | None], list[str]]:
    images: list[RGB | None] = []
    errors: list[str] = []
    opened: dict[str, RGB] = {}  # objects of one image come one after the other
    for uri in uris:
        try:
            if uri not in opened:
                opened = {uri: reader.open(uri)}
            images.append(opened[uri])
            errors.append("")
        except (Unavailable, Precondition):
            raise  # the storage, not the image: worth another try, or an operator's hand
        except HiBug2Error as error:
            images.append(None)
            errors.append(str(error))
    return images, errors


def _shown(image: RGB, box: Box | None) -> bytes:
    """What a vision model is shown: the object with its surroundings."""
    return resized_jpeg(image if box is None else crop(image, box, _CROP_MARGIN), VLM_SIDE_PX)
