from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import DataLoss, NotFound, Unavailable
from shared.metrics import STORE_WRITE_FAILURES
from shared.store.store import Store

TABLE = pa.table({"n": list(range(500)), "text": [f"row {i}" for i in range(500)]})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store((tmp_path / "store").as_uri())


def files(tmp_path: Path) -> list[str]:
    return sorted(str(p.relative_to(tmp_path / "store")) for p in (tmp_path / "store").rglob("*") if p.is_file())


@pytest.mark.parametrize("url", ["file://{}", "{}", "memory://{}"])
def test_what_is_written_is_read_whatever_the_storage(url, tmp_path):
    store = Store(url.format(tmp_path))
    assert store.names("a") == []
    assert not store.exists("a/b.json")
    store.write_json("a/b.json", {"é": [1, 2.5, None]})
    store.write_table("a/c.parquet", TABLE)
    store.write("a/d/e", b"\0\1")
    assert store.read_json("a/b.json") == {"é": [1, 2.5, None]}
    assert store.read_table("a/c.parquet").equals(TABLE)
    assert store.read_table("a/c.parquet", ["n"]).column_names == ["n"]
    assert store.read("a/d/e") == b"\0\1"
    assert store.names("a") == ["b.json", "c.parquet", "d"]
    store.delete("a")
    store.delete("a")
    assert store.names("a") == []
    with pytest.raises(NotFound, match=r"a/d/e"):
        store.read("a/d/e")


def test_a_folder_with_a_blank_and_a_percent_sign_is_that_folder(tmp_path):
    folder = tmp_path / "my data 50%"
    Store(folder.as_uri()).write("a", b"x")
    assert (folder / "a").read_bytes() == b"x"


def test_a_reader_sees_one_write_or_another_never_a_part(store):
    versions = [bytes([i]) * 300_000 for i in range(8)]
    store.write("file", versions[0])
    ended = threading.Event()

    def write(version: bytes) -> None:
        for _ in range(10):
            store.write("file", version)

    def read() -> int:
        count = 0
        while not ended.is_set() or not count:
            assert store.read("file") in versions
            assert store.names("") == ["file"]
            count += 1
        return count

    with ThreadPoolExecutor(10) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for writer in [pool.submit(write, version) for version in versions]:
            writer.result()
        ended.set()
        assert all(reader.result() for reader in readers)


@pytest.mark.parametrize("fails", ["while the bytes go out", "before the file is in place"])
def test_a_write_that_fails_leaves_what_was_there_and_no_litter(fails, store, tmp_path, monkeypatch):
    store.write("a/file", b"old")

    def half(_, path, data, **__):
        Path(path).write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    if fails == "while the bytes go out":
        monkeypatch.setattr(LocalFileSystem, "pipe_file", half)
    else:
        monkeypatch.setattr(Path, "replace", refuse)
    failures = STORE_WRITE_FAILURES._value.get()
    for path in ("a/file", "a/other"):
        with pytest.raises(Unavailable, match=path):
            store.write(path, b"new and longer")
    assert STORE_WRITE_FAILURES._value.get() == failures + 2
    assert store.read("a/file") == b"old"
    assert files(tmp_path) == ["a/file"]


def test_an_unfinished_write_of_a_process_that_died_is_not_listed(store, tmp_path):
    store.write("a/file", b"x")
    (tmp_path / "store/a/other.0123.partial").write_bytes(b"half")
    assert store.names("a") == ["file"]


def test_what_is_no_json_is_data_loss(store):
    for data in (b"", b"{", b"\xff", b'{"a": 1}}'):
        store.write("a.json", data)
        with pytest.raises(DataLoss, match=r"a\.json"):
            store.read_json("a.json")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parquet_that_is_cut_or_damaged_is_data_loss_or_still_a_table(tmp_path_factory, data):
    store = Store(tmp_path_factory.mktemp("store").as_uri())
    store.write_table("t.parquet", TABLE)
    whole = store.read("t.parquet")
    if data.draw(st.booleans()):
        store.write("t.parquet", whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(DataLoss, match=r"t\.parquet"):
            store.read_table("t.parquet")
        return
    at = data.draw(st.integers(0, len(whole) - 1))
    store.write("t.parquet", whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    with suppress(DataLoss):
        store.read_table("t.parquet")


def test_nan_is_not_written_as_json(store):
    with pytest.raises(ValueError, match="JSON"):
        store.write_json("a.json", float("nan"))
    assert not store.exists("a.json")


def test_storage_that_fails_is_unavailable(store, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    store.write("a", b"x")
    for name in ("cat_file", "exists", "ls", "rm"):
        with monkeypatch.context() as patched:
            patched.setattr(LocalFileSystem, name, fail)
            ask = {"cat_file": store.read, "exists": store.exists, "ls": store.names, "rm": store.delete}[name]
            with pytest.raises(Unavailable, match="Input/output error"):
                ask("a")


def test_two_may_delete_at_once(store):
    for i in range(200):
        store.write(f"a/{i}", b"x")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store.delete, ["a"] * 4))
    assert not store.exists("a")


@pytest.mark.parametrize("url", ["file://{}", "memory://{}"])
def test_batches_make_one_table_and_a_fault_among_them_none(url, tmp_path):
    store = Store(url.format(tmp_path / "store"))
    batches = TABLE.to_batches(max_chunksize=60)
    assert store.write_batches("a/b.parquet", TABLE.schema, iter(batches)) == TABLE.num_rows
    assert store.read_table("a/b.parquet").equals(TABLE)

    def broken():
        yield batches[0]
        raise NotFound("the rest is gone")

    with pytest.raises(NotFound):
        store.write_batches("a/b.parquet", TABLE.schema, broken())
    assert store.read_table("a/b.parquet").equals(TABLE)
    assert store.names("a") == ["b.parquet"]
    with pytest.raises(NotFound):
        store.write_batches("a/new.parquet", TABLE.schema, broken())
    assert store.names("a") == ["b.parquet"]
