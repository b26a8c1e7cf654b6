"""The artifact store: bytes, JSON and Parquet under one fsspec URL. A file is complete or absent."""

from __future__ import annotations

import io
import json
import posixpath
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from shared import metrics
from shared.errors import DataLoss, NotFound, Unavailable


class Store:
    """Files below `url`; paths are relative and use `/`. Blocking: async code calls it in a thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        # fsspec takes the path of a file URL as it is written, %20 and all
        self._fs, root = fsspec.core.url_to_fs(unquote(url) if url.startswith("file:") else url)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def _path(self, path: str) -> str:
        return posixpath.join(self._root, path)

    def write(self, path: str, data: bytes) -> None:
        """Write `data`, replacing what was there; other readers see the old bytes or the new, never a part."""
        target = self._path(path)
        with _told("write", path):
            if not self._local:
                self._fs.pipe_file(target, data)  # object stores publish a put as a whole
                return
            self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
            partial = f"{target}.{uuid.uuid4().hex}.partial"
            try:
                self._fs.pipe_file(partial, data)
                Path(partial).replace(target)
            finally:
                if self._fs.exists(partial):
                    self._fs.rm_file(partial)

    def read(self, path: str) -> bytes:
        """The bytes at `path`; NotFound when there are none."""
        with _told("read", path):
            try:
                data: bytes = self._fs.cat_file(self._path(path))
            except FileNotFoundError as error:
                raise NotFound(f"the store holds no {path}") from error
        return data

    def exists(self, path: str) -> bool:
        with _told("read", path):
            return bool(self._fs.exists(self._path(path)))

    def names(self, path: str) -> list[str]:
        """Names right below `path`, sorted; empty when there is nothing. Unfinished writes are left out."""
        with _told("list", path):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._path(path), detail=False)
            except FileNotFoundError:
                return []
        names = (posixpath.basename(str(name).rstrip("/")) for name in found)
        return sorted(name for name in names if name and not name.endswith(".partial"))

    def delete(self, path: str) -> None:
        """Remove `path` and all below it; nothing happens when it is absent."""
        target = self._path(path)
        with _told("delete", path):
            while self._fs.exists(target):
                with suppress(FileNotFoundError):  # another deletes there as well, or puts a write in place
                    self._fs.rm(target, recursive=True)

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode())

    def read_json(self, path: str) -> Any:
        """NotFound when absent, DataLoss when it is no JSON."""
        try:
            return json.loads(self.read(path))
        except ValueError as error:
            raise DataLoss(f"{path} in the store is not JSON: {error}") from error

    def write_table(self, path: str, table: pa.Table) -> None:
        """Write `table` as Parquet (zstd)."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.write(path, sink.getvalue())

    def write_batches(self, path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
        """Write `batches` as one Parquet file (zstd) as they come, and return the number of rows.

        They are spilled to a file, so memory holds one of them. An error of `batches` leaves what was there.
        """
        target = self._path(path)
        with _told("write", path):
            if not self._local:
                with tempfile.NamedTemporaryFile(suffix=".parquet") as spill:
                    rows = _spill(spill.name, schema, batches)
                    self._fs.put_file(spill.name, target)
                return rows
            self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
            partial = Path(f"{target}.{uuid.uuid4().hex}.partial")
            try:
                rows = _spill(str(partial), schema, batches)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        return rows

    def read_table(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The Parquet table at `path`; NotFound when absent, DataLoss when it is none."""
        data = self.read(path)
        try:
            return pq.read_table(pa.BufferReader(data), columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise DataLoss(f"{path} in the store is not Parquet: {error}") from error


def _spill(file: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    rows = 0
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


@contextmanager
def _told(doing: str, path: str) -> Iterator[None]:
    """What the storage raises, as Unavailable."""
    try:
        yield
    except OSError as error:
        if doing == "write":
            metrics.STORE_WRITE_FAILURES.inc()
        raise Unavailable(f"the store cannot {doing} {path}: {error}") from error
