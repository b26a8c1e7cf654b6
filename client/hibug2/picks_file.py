"""Picks as files that training code reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from hibug2.errors import UserError


def writer(target: Path) -> Callable[[pa.Table, Path], None]:
    """What writes the picks of a table into a file of the kind that the name of `target` tells; UserError for others.

    .csv, .parquet, .jsonl: a row a pick; in CSV the tags are one text. .coco.json: a COCO image list, the id of an
    image is its place in the pool. .index.json: these places alone, as `torch.utils.data.Subset` takes them.
    """
    for suffix, write in _WRITERS.items():
        if target.name.lower().endswith(suffix):
            return write
    raise UserError("--out", f"'{target.name}' tells no format; end it in one of {', '.join(_WRITERS)}")


def _csv(picks: pa.Table, path: Path) -> None:
    texts = [", ".join(f"{tag['attribute']}: {tag['tag']}" for tag in tags) for tags in picks["tags"].to_pylist()]
    column = picks.schema.get_field_index("tags")
    pa.csv.write_csv(picks.set_column(column, "tags", pa.array(texts, pa.string())), path)


def _parquet(picks: pa.Table, path: Path) -> None:
    pa.parquet.write_table(picks, path)


def _jsonl(picks: pa.Table, path: Path) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in picks.to_pylist())
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _coco(picks: pa.Table, path: Path) -> None:
    images = [
        {
            "id": row["pool_index"],
            "file_name": row["image_uri"],
            "instance_id": row["instance_id"],
            "slice_rank": row["slice_rank"],
            "slice_mean": row["slice_mean"],
            "tags": {tag["attribute"]: tag["tag"] for tag in row["tags"]},
        }
        for row in picks.to_pylist()
    ]
    document: dict[str, Any] = {"info": {"description": "images to label"}, "images": images}
    path.write_text(
        json.dumps({**document, "annotations": [], "categories": []}, ensure_ascii=False, indent=1), encoding="utf-8"
    )


def _index(picks: pa.Table, path: Path) -> None:
    path.write_text(json.dumps(picks["pool_index"].to_pylist()), encoding="utf-8")


_WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".coco.json": _coco,
    ".index.json": _index,
}
