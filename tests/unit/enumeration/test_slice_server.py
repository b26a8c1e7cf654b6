"""Stored slices as their readers get them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hibug2.v1 import slice_pb2 as pb
from services.enumeration.slice_server import SliceServicer
from shared.names import Name
from shared.schema import Attribute, Category, Schema, Tagger, Task
from shared.store.artifacts import Artifacts, Manifest, Provenance, item_columns
from shared.store.store import Store

NAME, TAGGING = Name("pets", "enumerations", "e"), Name("pets", "taggings", "t")
SCHEMA = Schema(
    Task.CLASSIFICATION,
    (),
    tuple(Attribute(name, Category.GLOBAL, ("x", "y"), Tagger.VLM) for name in ("mood", "light", "pose")),
)
ITEMS = np.array([[0, -1], [1, 2], [2, 5], [3, 4]], np.int32)
ATTRIBUTES = [["mood"], ["mood", "light"], ["light", "pose"], ["light", "pose"]]


@pytest.fixture
def artifacts(tmp_path):
    made = Artifacts(Store(tmp_path.as_uri()), "default")
    made.write_schema("pets", SCHEMA, Provenance({}))
    made.write_part(NAME, "slices", pa.table({**item_columns(ITEMS), "count": pa.array([40, 30, 20, 10])}))
    parameters = {"schema": SCHEMA.schema_id, "tagging": str(TAGGING), "split": "validation"}
    made.complete(NAME, Manifest(Provenance({}, parameters), {"slice_count": len(ITEMS)}))
    return made


async def listed(servicer: SliceServicer, filter_text: str = "") -> list[pb.Slice]:
    request = pb.ListSlicesRequest(parent=str(NAME), filter=filter_text)
    return list((await servicer.ListSlices(request, None)).slices)


async def read(servicer: SliceServicer, filter_text: str = "") -> pa.Table:
    request = pb.ReadSlicesRequest(parent=str(NAME), filter=filter_text)
    pieces = [response.arrow async for response in servicer.ReadSlices(request, None)]
    return pa.ipc.open_stream(b"".join(pieces)).read_all()


async def test_what_a_check_doubts_is_told_of_slices_that_are_open_already(artifacts):
    servicer = SliceServicer(artifacts.store)
    assert [list(s.doubtful) for s in await listed(servicer)] == [[]] * 4
    assert (await read(servicer)).column("doubtful").to_pylist() == [[]] * 4
    assert len(await listed(servicer, "doubtful = 0")) == 4
    for doubted in ({"light"}, {"mood", "pose"}, set()):
        told = [{"attribute": name, "doubt": "so so" if name in doubted else ""} for name in SCHEMA.names()]
        artifacts.write_quality(TAGGING, {"attributes": told})
        expected = [[name for name in names if name in doubted] for names in ATTRIBUTES]
        assert [list(s.doubtful) for s in await listed(servicer)] == expected
        assert (await read(servicer)).column("doubtful").to_pylist() == expected
        clean = [i for i, names in enumerate(expected) if not names]
        assert [s.instance_count for s in await listed(servicer, "doubtful = 0")] == [
            (40, 30, 20, 10)[i] for i in clean
        ]
        assert (await read(servicer, "doubtful = 0 AND count > 5")).num_rows == len(clean)
