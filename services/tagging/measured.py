"""The measured tagger: tags read off pixels and boxes, without a model (paper 3.2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from services.tagging.tagger import Answer
from shared.errors import invalid
from shared.images.box import Box
from shared.images.measures import MEASURES, measure
from shared.images.reader import RGB
from shared.schema import UNKNOWN, Attribute


def measured_codes(
    images: Iterable[NDArray[np.uint8]], boxes: Iterable[Box | None], attributes: Sequence[Attribute]
) -> NDArray[np.uint16]:
    """Tag codes (n, len(attributes)) uint16 of n images, each (H, W, 3) uint8 RGB, and the box of each or None.

    A numeric measure gets the tag its edges cut, a categorical one the tag it names; what cannot be measured, and a
    tag that the attribute does not have, gets UNKNOWN. Images are taken one after the other, so a generator keeps
    memory small. Raises InvalidInput for an attribute that is not measured, or whose edges or tags do not suit its
    measure.
    """
    for attribute in attributes:
        _check_measurable(attribute)
    names = [attribute.measure.name for attribute in attributes if attribute.measure]
    rows = [measure(image, box, names) for image, box in zip(images, boxes, strict=True)]
    values = np.array(rows, dtype=np.float64).reshape(len(rows), len(attributes))
    codes = np.full(values.shape, UNKNOWN, dtype=np.uint16)
    for i, attribute in enumerate(attributes):
        codes[:, i] = _codes(values[:, i], attribute)
    return codes


class MeasuredTagger:
    """Measures each image while it is open."""

    def look(self, image: RGB, box: Box | None, attributes: Sequence[Attribute]) -> NDArray[np.uint16]:
        codes: NDArray[np.uint16] = measured_codes([image], [box], attributes)[0]
        return codes

    async def tag(
        self, looks: Sequence[NDArray[np.uint16]], labels: Sequence[str], attributes: Sequence[Attribute]
    ) -> Answer:
        return Answer(np.stack(looks))


def _codes(values: NDArray[np.float64], attribute: Attribute) -> NDArray[np.uint16]:
    codes = np.full(values.shape, UNKNOWN, dtype=np.uint16)
    if attribute.measure is None:
        return codes
    known = np.isfinite(values)
    kind, edges = MEASURES[attribute.measure.name], attribute.measure.edges
    if kind.numeric:
        codes[known] = np.searchsorted(edges, values[known], side="right")
    else:
        own = np.array([attribute.code(tag) for tag in kind.tags], dtype=np.uint16)
        codes[known] = own[values[known].astype(np.int64)]
    return codes


def _check_measurable(attribute: Attribute) -> None:
    field = f"attribute '{attribute.name}'"
    if attribute.measure is None:
        raise invalid(field, "names no measure, so it cannot be measured; give it another tagger")
    kind = MEASURES.get(attribute.measure.name)
    if kind is None:
        raise invalid(field, f"'{attribute.measure.name}' is not a measure; choose from {', '.join(MEASURES)}")
    if kind.numeric != bool(attribute.measure.edges):
        wanted = "edges that cut its values into tags" if kind.numeric else "no edges, its values are tags"
        raise invalid(field, f"the measure '{kind.name}' needs {wanted}")
    if kind.numeric and len(attribute.measure.edges) != len(attribute.tags) - 1:
        raise invalid(field, f"{len(attribute.measure.edges)} edges do not cut {len(attribute.tags)} tags")
    strange = [tag for tag in attribute.tags if kind.tags and tag not in kind.tags]
    if strange:
        raise invalid(
            field, f"the measure '{kind.name}' never gives '{strange[0]}'; choose from {', '.join(kind.tags)}"
        )
