"""Reads what users have: folders of images, manifests, predictions, tables of tags. No network here.

Every function returns the Arrow table that the contract asks for, or raises a UserError that names the column.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from hibug2.errors import UserError

SPLITS = ("train", "validation", "pool", "test")
_SPLIT_ALIASES = {"val": "validation"}
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_IDS = ("instance_id", "id")
_URIS = ("image_uri", "uri")
_BOX = {
    "left_px": ("left_px", "left", "x"),
    "top_px": ("top_px", "top", "y"),
    "width_px": ("width_px", "width", "w"),
    "height_px": ("height_px", "height", "h"),
}
_PREDICTED = ("predicted_label", "predicted")
_PROBABILITY = re.compile(r"^(prob|p)_")
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def read_table(path: str | os.PathLike[str]) -> pa.Table:
    """The CSV or Parquet file at `path`; all columns of a CSV are strings, an empty cell is null.

    Raises UserError when the file is missing, has another ending, cannot be read, repeats a column or has no rows.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(str(path), "there is no such file")
    try:
        if file.suffix in {".parquet", ".pq"}:
            table = pa.parquet.read_table(file)
        elif file.suffix == ".csv" or file.name.endswith(".csv.gz"):
            table = _read_csv(file)
        else:
            raise UserError(str(path), "is neither .csv nor .parquet; convert it to one of them")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}") from error
    return _check_shape(table, str(path))


def _read_csv(file: Path) -> pa.Table:
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(file, parse_options=parse) as reader:
        names = reader.schema.names
    # As text throughout: 007 stays 007, and what a column means is decided by who reads it.
    convert = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    return pa.csv.read_csv(file, parse_options=parse, convert_options=convert)


def as_table(source: Any, field: str) -> pa.Table:
    """`source` as an Arrow table: a path (CSV, Parquet), a pyarrow Table, a DataFrame, or a dict of columns."""
    if isinstance(source, str | os.PathLike):
        return read_table(source)
    try:
        if isinstance(source, pa.Table):
            table = source
        elif type(source).__module__.split(".")[0] == "pandas":
            table = pa.Table.from_pandas(source, preserve_index=False)
        else:
            table = pa.table(source)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(field, f"is no path, Arrow table or DataFrame: {error}") from error
    return _check_shape(table, field)


def _check_shape(table: pa.Table, field: str) -> pa.Table:
    repeated = [name for name, times in Counter(table.column_names).items() if times > 1]
    if repeated:
        raise UserError(field, f"has the column '{repeated[0]}' more than once; rename one")
    if table.num_rows == 0:
        raise UserError(field, "holds no rows")
    return table


def as_instances(source: Any) -> pa.Table:
    """Instances as `CreateDataset` takes them, from a folder of images or a manifest (path, table, DataFrame).

    Columns: instance_id, image_uri, label, split (strings); left_px, top_px, width_px, height_px (float64) where
    the manifest has boxes; every other column as given. Relative image paths of a manifest file are taken from
    its folder, of a table from the working folder.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return read_folder(path)
        return _manifest_instances(as_table(path, "images"), path.parent)
    return _manifest_instances(as_table(source, "images"), Path.cwd())


def read_folder(folder: str | os.PathLike[str]) -> pa.Table:
    """Instances of `<class>/x.png`, or `<split>/<class>/x.png` where the folders at the top are named as splits.

    Images of the pool need no class folder: they have no label. Files are taken in the order of their paths.
    """
    root = Path(os.path.abspath(folder))  # noqa: PTH100  # resolve() would follow links out of the user's prefix
    paths = sorted(_images(root))
    if not paths:
        raise UserError(str(folder), f"holds no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    has_splits = _has_splits({path.parts[0] for path in paths if len(path.parts) > 1}, folder)
    labels: list[str | None] = []
    splits: list[str] = []
    for path in paths:
        folders = list(path.parts[:-1])
        split = _split_name(folders.pop(0)) if has_splits and folders else "validation"
        if not folders and split != "pool":
            wanted = "<split>/<class>/" if has_splits else "<class>/"
            raise UserError(
                str(folder),
                f"{path} lies in no class folder; order the images as {wanted}{path.name}, or give a manifest",
            )
        labels.append(folders[0] if folders else None)
        splits.append(split)
    return pa.table(
        {
            "instance_id": pa.array([path.as_posix() for path in paths], pa.string()),
            "image_uri": pa.array([(root / path).as_uri() for path in paths], pa.string()),
            "label": pa.array(labels, pa.string()),
            "split": pa.array(splits, pa.string()),
        }
    )


def _images(root: Path) -> Iterator[Path]:
    for at, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in _IMAGE_SUFFIXES:
                yield (Path(at) / name).relative_to(root)


def _split_name(name: str) -> str:
    return _SPLIT_ALIASES.get(name, name)


def _has_splits(tops: set[str], folder: str | os.PathLike[str]) -> bool:
    named = {name for name in tops if _split_name(name) in SPLITS}
    others = sorted(tops - named)
    # "pool" and "test" alone may be classes; a train or validation folder among classes is a mistake.
    if others and any(_split_name(name) in {"train", "validation"} for name in named):
        raise UserError(
            str(folder), f"has split folders ({', '.join(sorted(named))}) beside others ({', '.join(others[:3])})"
        )
    return bool(named) and not others


def _manifest_instances(table: pa.Table, base: Path) -> pa.Table:
    uri_column = _find(table, _URIS)
    if uri_column is None:
        raise _missing(table, "image_uri", "uri (or image_uri)")
    used = {uri_column}
    given_uris = _texts(table, uri_column)
    _refuse_null(given_uris, uri_column)
    uris = given_uris.to_pylist()
    box = _box_columns(table)
    used.update(box.values())

    columns: dict[str, Any] = {}
    id_column = _find(table, _IDS)
    if id_column is not None:
        used.add(id_column)
        ids = _texts(table, id_column)
        _refuse_null(ids, id_column)
        columns["instance_id"] = ids
        _refuse_repeats(ids.to_pylist(), id_column, "every instance needs its own")
    else:
        if not box:
            _refuse_repeats(uris, uri_column, "give an id column, or boxes")
        columns["instance_id"] = pa.array(_numbered(uris), pa.string())
    columns["image_uri"] = pa.array([_absolute_uri(uri, base) for uri in uris], pa.string())
    if "label" in table.column_names:
        used.add("label")
        columns["label"] = _texts(table, "label")
    if "split" in table.column_names:
        used.add("split")
        splits = pc.fill_null(_texts(table, "split"), "validation")
        columns["split"] = pc.if_else(pc.equal(splits, "val"), "validation", splits)
    else:
        columns["split"] = pa.repeat(pa.scalar("validation"), table.num_rows)
    for name, column in box.items():
        columns[name] = _numbers(table, column)
    for name in table.column_names:
        if name in used:
            continue
        if name in columns:
            raise UserError(name, f"is there beside '{id_column or uri_column}'; keep one of them")
        columns[name] = table[name]
    return pa.table(columns)


def _box_columns(table: pa.Table) -> dict[str, str]:
    found = {name: column for name, aliases in _BOX.items() if (column := _find(table, aliases)) is not None}
    # A width and a height without a corner are the image's, not a box.
    if "left_px" not in found and "top_px" not in found:
        return {}
    missing = [name for name in _BOX if name not in found]
    if missing:
        raise UserError(missing[0], f"is missing: a box needs {', '.join(_BOX)} (or x, y, w, h)")
    return found


def _numbered(uris: Sequence[str]) -> list[str]:
    """`uris`, made unique: the first of equals stays, the next become uri#2, uri#3, …"""
    taken = set(uris)
    seen: Counter[str] = Counter()
    names: list[str] = []
    for uri in uris:
        seen[uri] += 1
        name = uri
        while seen[uri] > 1 and (name := f"{uri}#{seen[uri]}") in taken:
            seen[uri] += 1
        taken.add(name)
        names.append(name)
    return names


def _absolute_uri(uri: str, base: Path) -> str:
    if _SCHEME.match(uri):
        return uri
    return Path(os.path.abspath(base / uri)).as_uri()  # noqa: PTH100  # as above


def as_scores(source: Any) -> pa.Table:
    """Scores as `AddScores` takes them, from a CSV or Parquet path, a table or a DataFrame.

    Columns: instance_id (string), and score (float64), predicted_label (string) or both; probabilities (list of
    float64; columns prob_… or p_… are joined in their order) and confidence (float64) where given.
    """
    table = as_table(source, "scores")
    id_column = _find(table, (*_IDS, *reversed(_URIS)))
    if id_column is None:
        raise _missing(table, "instance_id", "id (or instance_id, uri)")
    columns: dict[str, Any] = {"instance_id": _texts(table, id_column)}
    _refuse_null(columns["instance_id"], id_column)
    predicted = _find(table, _PREDICTED)
    if "score" in table.column_names:
        columns["score"] = _numbers(table, "score")
    if predicted is not None:
        columns["predicted_label"] = _texts(table, predicted)
    if len(columns) == 1:
        raise _missing(table, "score", "score, or predicted (or predicted_label)")
    if "confidence" in table.column_names:
        columns["confidence"] = _numbers(table, "confidence")
    per_class = [name for name in table.column_names if _PROBABILITY.match(name)]
    if "probabilities" in table.column_names:
        columns["probabilities"] = _number_lists(table, "probabilities")
    elif per_class:
        parts = [_numbers(table, name).combine_chunks() for name in per_class]
        rows = zip(*(part.to_pylist() for part in parts), strict=True)
        columns["probabilities"] = pa.array(map(list, rows), pa.list_(pa.float64()))
    return pa.table(columns)


def as_attributes(source: Any, scores: Sequence[str]) -> pa.Table:
    """A table for `EnumerateTable`: the columns `scores` as float64, every other column as the text of its tags.

    Null and the empty cell are unknown. Numbers become tags by their text, whole ones without a fraction.
    """
    table = as_table(source, "table")
    for name in scores:
        if name not in table.column_names:
            raise _missing(table, "scores", f"'{name}'")
    if len(set(scores)) != len(scores):
        raise UserError("scores", "names a column twice")
    if len(scores) == len(table.column_names):
        raise UserError("scores", "names every column; at least one must be left as an attribute")
    columns = {name: _numbers(table, name) if name in scores else _tags(table, name) for name in table.column_names}
    return pa.table(columns)


def _tags(table: pa.Table, name: str) -> pa.ChunkedArray:
    texts = _texts(table, name)
    # A whole-number column with gaps is often written as 1.0, 2.0: the tag is still 1.
    if pc.all(pc.match_substring_regex(texts, r"^-?[0-9]+\.0$"), min_count=1).as_py():
        texts = pc.replace_substring_regex(texts, r"\.0$", "")
    return texts


def _find(table: pa.Table, names: Sequence[str]) -> str | None:
    return next((name for name in names if name in table.column_names), None)


def _missing(table: pa.Table, field: str, wanted: str) -> UserError:
    shown = ", ".join(table.column_names[:12]) + (", …" if len(table.column_names) > 12 else "")
    return UserError(field, f"no column {wanted}; the columns are {shown}")


def _refuse_null(column: pa.ChunkedArray, name: str) -> None:
    bad = pc.index(pc.fill_null(pc.equal(column, ""), True), True).as_py()
    if bad >= 0:
        raise UserError(name, f"is empty in row {bad + 1}")


def _refuse_repeats(values: Sequence[str], name: str, remedy: str) -> None:
    first: dict[str, int] = {}
    for row, value in enumerate(values, start=1):
        if first.setdefault(value, row) != row:
            raise UserError(name, f"'{value}' is there twice (rows {first[value]} and {row}); {remedy}")


def _texts(table: pa.Table, name: str) -> pa.ChunkedArray:
    """The column as strings; NaN becomes null."""
    column = table[name]
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_boolean(kind):
        return pc.if_else(column, "True", "False")
    if pa.types.is_floating(kind):
        # Adding zero turns -0 into 0.
        column = pc.add(pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column), pa.scalar(0, kind))
    elif pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise UserError(name, f"holds {kind} values; text, numbers and booleans can be read")
    try:
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise UserError(name, f"holds {kind} values that are no text: {error}") from error


def _numbers(table: pa.Table, name: str) -> pa.ChunkedArray:
    """The column as float64; an empty cell is null."""
    column = table[name]
    try:
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.int8())
        return column.cast(pa.float64())
    except pa.ArrowException as error:
        raise UserError(name, f"holds a value that is no number: {error}") from error


def _number_lists(table: pa.Table, name: str) -> pa.ChunkedArray:
    try:
        return table[name].cast(pa.list_(pa.float64()))
    except pa.ArrowException as error:
        raise UserError(
            name, f"must be a list of numbers (Parquet), or give a column prob_… for each class: {error}"
        ) from error
