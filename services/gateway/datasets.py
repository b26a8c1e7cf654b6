"""Instances at the door: a table of any origin becomes a checked table of instances, or is refused as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import HiBug2Error, InvalidInput, Unavailable, Violation, invalid, refuse
from shared.images.box import Box, check_box
from shared.images.reader import ImageReader
from shared.schema import Task, is_name
from shared.store.artifacts import INSTANCES, KEYPOINTS, DatasetRecord, now

SPLITS = ("train", "validation", "pool", "test")
BOX = ("left_px", "top_px", "width_px", "height_px")
MAX_TEXT = 1024
MAX_GIVEN = 64
_BYTES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_binary_view,
)
_BLOCK = 64  # images that a thread opens in one go: small ones cost less than a hand-over
_SHOWN = 20  # violations found before the search for more is given up


def check_instances(table: pa.Table, task: Task) -> pa.Table:
    """`table` as instances (columns and types as INSTANCES), rows in their order.

    Known columns are those of INSTANCES but `given`; every other column becomes an entry of `given`. A missing
    split is validation. Raises InvalidInput with a violation per fault, rows counted from 0.
    """
    if table.num_rows == 0:
        raise invalid("instances", "there are none; a dataset needs at least one")
    missing = [c for c in ("instance_id", "image_uri") if c not in table.column_names]
    refuse(Violation(f"instances.{c}", "this column is missing") for c in missing)
    if len(set(table.column_names)) != table.num_columns:
        raise invalid("instances", "two columns have the same name")
    columns = {
        "instance_id": _text(table, "instance_id"),
        "image_uri": _text(table, "image_uri"),
        "label": _blank_to_null(_text(table, "label")),
        "split": pc.fill_null(_blank_to_null(_text(table, "split")), "validation"),
        **{name: _number(table, name) for name in BOX},
        "keypoints": _keypoints(table),
        "kind": pa.array(["object"] * table.num_rows, pa.string()),
        "given": _given(table),
    }
    found = [
        *_text_faults("instance_id", columns["instance_id"]),
        *_text_faults("image_uri", columns["image_uri"]),
        *_duplicates(columns["instance_id"]),
        *_label_faults(columns["label"]),
        *_split_faults(columns["split"]),
        *_box_faults(columns, task),
    ]
    refuse(found)
    return pa.table(list(columns.values()), schema=INSTANCES)


def _text(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    column = table.column(name)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind) or any(is_bytes(kind) for is_bytes in _BYTES):
        raise invalid(f"instances.{name}", f"holds {column.type}, not text")
    try:
        return column.cast(kind).cast(pa.string()).combine_chunks()
    except pa.ArrowException as error:
        raise invalid(f"instances.{name}", f"holds {column.type}, which has no text: {error}") from error


def _blank_to_null(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)


def _number(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.float64())
    column = table.column(name)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise invalid(f"instances.{name}", f"holds {column.type}, not numbers")
    return column.cast(pa.float64(), safe=False).combine_chunks()  # a whole number of any size is near enough


def _keypoints(table: pa.Table) -> pa.Array:
    if "keypoints" not in table.column_names:
        return pa.nulls(table.num_rows, KEYPOINTS)
    column = table.column("keypoints")
    try:
        kind = getattr(column.type, "value_type", pa.null())
        strange = {kind.field(i).name for i in range(kind.num_fields)} - {f.name for f in KEYPOINTS.value_type}
        if strange:
            raise pa.ArrowTypeError(f"there is a field '{min(strange)}'")
        return column.cast(KEYPOINTS).combine_chunks()
    except pa.ArrowException as error:
        raise invalid("instances.keypoints", f"is no list of keypoint, x_px, y_px, visibility: {error}") from error


def _given(table: pa.Table) -> pa.Array:
    names = [c for c in table.column_names if c not in INSTANCES.names or c == "given"]
    if len(names) > MAX_GIVEN:
        raise invalid("instances", f"{len(names)} further columns; at most {MAX_GIVEN} are kept, leave some out")
    columns = [_blank_to_null(_text(table, name)) for name in names]
    keys: list[str] = []
    values: list[str] = []
    offsets = [0]
    for row in zip(*(c.to_pylist() for c in columns), strict=True) if columns else ():
        held = [(n, v) for n, v in zip(names, row, strict=True) if v is not None]
        keys += [n for n, _ in held]
        values += [v for _, v in held]
        offsets.append(len(keys))
    if not columns:
        offsets = [0] * (table.num_rows + 1)
    return pa.MapArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(keys, pa.string()), pa.array(values, pa.string())
    )


def _rows(mask: pa.Array | npt.NDArray[np.bool_]) -> Iterator[int]:
    held = pc.fill_null(mask, fill_value=False).to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask
    yield from np.flatnonzero(held)[:_SHOWN].tolist()


def _text_faults(name: str, values: pa.Array) -> Iterator[Violation]:
    for row in _rows(pc.fill_null(pc.equal(pc.utf8_length(values), 0), fill_value=True)):
        yield Violation(f"instances[{row}].{name}", "is empty")
    for row in _rows(pc.greater(pc.utf8_length(values), MAX_TEXT)):
        yield Violation(f"instances[{row}].{name}", f"is longer than {MAX_TEXT} characters")


def _duplicates(ids: pa.Array) -> Iterator[Violation]:
    first = pc.index_in(ids, value_set=ids).to_numpy(zero_copy_only=False)
    again = np.flatnonzero(first != np.arange(len(ids)))
    for row in again[:_SHOWN].tolist():
        yield Violation(f"instances[{row}].instance_id", f"'{ids[row]}' is also the id of row {int(first[row])}")


def _label_faults(labels: pa.Array) -> Iterator[Violation]:
    for label in pc.unique(labels).to_pylist():
        if label is not None and (not is_name(label) or label != label.strip()):
            row = pc.index(labels, label).as_py()
            text = "is 1 to 80 characters without = | ; control characters, blanks at its ends or a comma first"
            yield Violation(f"instances[{row}].label", text)


def _split_faults(splits: pa.Array) -> Iterator[Violation]:
    for row in _rows(pc.invert(pc.is_in(splits, value_set=pa.array(SPLITS)))):
        yield Violation(f"instances[{row}].split", f"'{splits[row]}' is not one of {', '.join(SPLITS)}")


def _box_faults(columns: dict[str, pa.Array], task: Task) -> Iterator[Violation]:
    given = np.column_stack([columns[name].is_valid().to_numpy(zero_copy_only=False) for name in BOX])
    partly = given.any(axis=1) & ~given.all(axis=1)
    for row in _rows(partly):
        yield Violation(f"instances[{row}].box", f"give all of {', '.join(BOX)} or none")
    if task is Task.DETECTION:
        for row in _rows(~given.any(axis=1)):
            yield Violation(f"instances[{row}].box", "is missing; an instance of a detection dataset has a box")
    values = [columns[name].to_pylist() for name in BOX]
    shown = 0
    for row in np.flatnonzero(given.all(axis=1)).tolist():
        try:
            check_box(Box(*(v[row] for v in values)), f"instances[{row}].box")
        except InvalidInput as error:
            yield from error.violations
            shown += 1
        if shown >= _SHOWN:
            return


def check_images(instances: pa.Table, reader: ImageReader, threads: int) -> None:
    """Open every image once and hold its boxes against its size; InvalidInput names the rows whose image is bad.

    Storage that is away (Unavailable) is no fault of the images and is passed on.
    """
    uris = instances.column("image_uri").to_pylist()
    rows_of: dict[str, list[int]] = {}
    for row, uri in enumerate(uris):
        rows_of.setdefault(uri, []).append(row)
    columns = [instances.column(name).to_pylist() for name in BOX]

    def check(uri: str) -> list[Violation]:
        rows = rows_of[uri]
        try:
            height, width = reader.open(uri).shape[:2]
        except Unavailable:
            raise
        except HiBug2Error as error:
            return [Violation(f"instances[{rows[0]}].image_uri", str(error))]
        found: list[Violation] = []
        for row in rows:
            left, top, box_width, box_height = (c[row] for c in columns)
            if left is None:
                continue
            try:
                check_box(Box(left, top, box_width, box_height), f"instances[{row}].box", (width, height))
            except InvalidInput as error:
                found += error.violations
        return found

    def check_block(block: list[str]) -> list[Violation]:
        return [violation for uri in block for violation in check(uri)]

    found: list[Violation] = []
    with ThreadPoolExecutor(threads) as pool:
        unique = list(rows_of)
        blocks = [unique[i : i + _BLOCK] for i in range(0, len(unique), _BLOCK)]
        for start in range(0, len(blocks), threads):
            for violations in pool.map(check_block, blocks[start : start + threads]):
                found += violations
            if len(found) >= _SHOWN:
                break
    refuse(found)


def record_of(
    dataset: str,
    task: Task,
    instances: pa.Table,
    parts: Sequence[str],
    digest: str,
    request_ids: Sequence[str],
    create_time: str = "",
) -> DatasetRecord:
    """The record of a dataset whose instances are `instances`, stored as `parts`."""
    counts = pc.value_counts(instances.column("split").combine_chunks())
    splits = {str(entry["values"]): entry["counts"].as_py() for entry in counts}
    labels = sorted(v for v in pc.unique(instances.column("label")).to_pylist() if v is not None)
    return DatasetRecord(
        dataset=dataset,
        task=task,
        parts=tuple(parts),
        digest=digest,
        instance_count=instances.num_rows,
        splits={s: splits[s] for s in SPLITS if s in splits},
        main_objects=tuple(labels),
        create_time=create_time or now(),
        request_ids=tuple(r for r in request_ids if r),
    )
