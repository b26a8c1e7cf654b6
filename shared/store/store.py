"""The artifact store: bytes, JSON and Parquet under one fsspec URL. A file is complete or absent."""

from __future__ import annotations

import io
import json
import posixpath
import uuid
from collections.abc import Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from shared.errors import DataLoss, NotFound, Unavailable


class Store:
    """Files below `url`; paths are relative and use `/`. Blocking: async code calls it in a thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, root = fsspec.core.url_to_fs(url)
        self._root = root.rstrip("/")
        self._local = isinstance(self._fs, LocalFileSystem)

    def _path(self, path: str) -> str:
        return posixpath.join(self._root, path)

    def write(self, path: str, data: bytes) -> None:
        """Write `data`, replacing what was there; other readers see the old bytes or the new, never a part."""
        target = self._path(path)
        try:
            if not self._local:
                self._fs.pipe_file(target, data)  # object stores publish a put as a whole
                return
            self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
            partial = f"{target}.{uuid.uuid4().hex}.partial"
            try:
                self._fs.pipe_file(partial, data)
                self._fs.mv(partial, target)
            finally:
                if self._fs.exists(partial):
                    self._fs.rm_file(partial)
        except OSError as error:
            raise Unavailable(f"the store cannot write {path}: {error}") from error

    def read(self, path: str) -> bytes:
        """The bytes at `path`; NotFound when there are none."""
        try:
            data: bytes = self._fs.cat_file(self._path(path))
        except FileNotFoundError as error:
            raise NotFound(f"the store holds no {path}") from error
        except OSError as error:
            raise Unavailable(f"the store cannot read {path}: {error}") from error
        return data

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(self._path(path)))

    def names(self, path: str) -> list[str]:
        """Names right below `path`, sorted; empty when there is nothing. Unfinished writes are left out."""
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
        if self._fs.exists(target):
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

    def read_table(self, path: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The Parquet table at `path`; NotFound when absent, DataLoss when it is none."""
        try:
            return pq.read_table(pa.BufferReader(self.read(path)), columns=columns)
        except pa.ArrowInvalid as error:
            raise DataLoss(f"{path} in the store is not Parquet: {error}") from error
