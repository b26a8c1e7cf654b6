"""People edit the schema of a dataset through the real gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from hibug2 import Client, HiBug2Error, UserError, messages, schema_text


@pytest.fixture
def edited(client: Client, images: Path) -> Iterator[str]:
    paths = sorted((images / "images").glob("*.png"))[:6]
    rows = [{"uri": path.as_uri(), "label": "ab"[i % 2], "split": "validation"} for i, path in enumerate(paths)]
    client.create_dataset("edited", pa.Table.from_pylist(rows))
    yield "edited"
    client.delete_dataset("edited")


def test_a_users_own_list_starts_a_dataset_and_comes_back_as_it_was(
    client: Client, edited: str, tmp_path: Path
) -> None:
    (tmp_path / "own.yaml").write_text("attributes:\n  object pose: [sitting, lying]\n  is wet: [yes, no] # by eye\n")
    own = client.import_schema(edited, tmp_path / "own.yaml")
    assert list(own.main_objects) == ["a", "b"]
    locked = client.edit_schema(edited, [("lock", "is wet"), ("add", "global:weather=sun,rain,not visible")])
    assert client.schema(edited).name == locked.name != own.name
    (tmp_path / "out.yaml").write_text("# mine\n" + schema_text.to_yaml(messages.schema_to_json(locked)))
    assert client.import_schema(edited, tmp_path / "out.yaml").name == locked.name
    assert client.import_schema(edited, messages.schema_to_json(locked)).name == locked.name
    assert {schema.name for schema in client.schemas(edited)} == {own.name, locked.name}
    with pytest.raises(UserError, match="'is wet' is locked"):
        client.edit_schema(edited, [("drop", "is wet")])
    with pytest.raises(HiBug2Error) as refused:
        client.edit_schema(edited, [("unlock", "is wet"), ("rename-tag", "is wet:no=dry")])
    assert [v.field for v in refused.value.violations] == ["schema.attributes[1].tags"]
    assert client.schema(edited).name == locked.name
