"""Tags that the user already has: the class, and columns of the manifest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shared.schema import MAIN_OBJECT, UNKNOWN, Attribute


def given_codes(instances: pa.Table, attributes: Sequence[Attribute]) -> npt.NDArray[np.uint16]:
    """(n, len(attributes)) uint16 codes read off the manifest; UNKNOWN where it says nothing or what is no tag."""
    codes = np.full((instances.num_rows, len(attributes)), UNKNOWN, dtype=np.uint16)
    given = [dict(row or ()) for row in instances.column("given").to_pylist()]
    labels = instances.column("label").to_pylist()
    for j, attribute in enumerate(attributes):
        position = {tag: i for i, tag in enumerate(attribute.tags)}
        values = labels if attribute.name == MAIN_OBJECT else [row.get(attribute.name) for row in given]
        codes[:, j] = [position.get(v, UNKNOWN) if v is not None else UNKNOWN for v in values]
    return codes
