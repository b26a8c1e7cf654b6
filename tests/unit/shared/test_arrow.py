from __future__ import annotations

import asyncio
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import InvalidInput, TooLarge
from shared.rpc.arrow import MAX_MESSAGE, receive_table, send_batches, send_table

TAGS = pa.list_(pa.struct([("attribute", pa.string()), ("tag", pa.string())]))


def received(chunks, max_bytes: int = 1 << 30) -> pa.Table:
    async def stream():
        for chunk in chunks:
            yield chunk

    return asyncio.run(receive_table(stream(), max_bytes, "table"))


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Tables from empty to some MiB, with rows of very unequal size, nulls, lists, and many columns."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n = draw(st.sampled_from([0, 1, 2, 7, 1000, 40_000]))
    columns = {
        "id": pa.array([f"instance {i}" for i in range(n)], pa.string()),
        "count": pa.array(rng.integers(0, 1 << 40, n)),
        "mean": pa.array(rng.random(n), mask=rng.random(n) < 0.3),
        "flag": pa.array(rng.random(n) < 0.5),
    }
    if n <= 1000:
        sizes = np.where(rng.random(n) < 0.02, 900_000, rng.integers(0, 2000, n))
        sizes = np.where(np.cumsum(sizes) < 6_000_000, sizes, 3)
        columns["text"] = pa.array(["x" * int(size) for size in sizes], pa.string())
        pairs = [[{"attribute": "a", "tag": "t" * int(k)}] * int(k) for k in rng.integers(0, 4, n)]
        columns["tags"] = pa.array(pairs, TAGS)
        for i in range(draw(st.sampled_from([0, 300]))):
            columns[f"a column with a long name {i}"] = pa.array(rng.random(n))
    return pa.table(columns)


@settings(max_examples=30, deadline=None)
@given(tables(), st.integers(1, 1 << 20))
def test_any_table_arrives_as_it_was_sent_in_messages_of_at_most_1_mib(table, chunk):
    messages = list(send_table(table))
    assert max(map(len, messages)) <= MAX_MESSAGE
    assert received(messages).equals(table)
    whole = b"".join(messages)
    chunk = max(chunk, len(whole) // 1000)
    assert received(whole[i : i + chunk] for i in range(0, len(whole), chunk)).equals(table)


def test_a_slice_is_sent_without_the_rest():
    table = pa.table({"text": ["x" * 1000] * 5000}).slice(4990, 5)
    messages = list(send_table(table))
    assert sum(map(len, messages)) < 20_000
    assert received(messages).equals(table)


def test_batches_are_made_as_the_reader_takes_them():
    schema = pa.schema([("n", pa.int64())])
    made = []

    def batches():
        for i in range(3):
            made.append(i)
            yield pa.record_batch([pa.array([i])], schema=schema)

    messages = send_batches(schema, batches())
    next(messages)
    assert made == [0]
    assert list(messages)
    assert made == [0, 1, 2]


def test_a_table_over_the_limit_is_refused_with_the_limit():
    messages = list(send_table(pa.table({"n": list(range(10_000))})))
    size = sum(map(len, messages))
    assert received(messages, size).num_rows == 10_000
    with pytest.raises(TooLarge, match="table") as refused:
        received(messages, size - 1)
    assert refused.value.metadata == {"limit_bytes": str(size - 1)}


def stream_of(table: pa.Table, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@settings(max_examples=30, deadline=None)
@given(tables(), st.sampled_from([None, "lz4", "zstd"]), st.booleans())
def test_a_packed_table_arrives_where_it_fits_once_unpacked(table, compression, coded):
    if coded:
        texts = {"id": table["id"].dictionary_encode(), "view": table["id"].cast(pa.string_view())}
        table = pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **texts})
    data = stream_of(table, compression)
    assert received([data]).equals(table)
    if compression and table.nbytes > 2 * len(data):
        with pytest.raises(InvalidInput, match="unpacked"):
            received([data], len(data))


def packed(name: str) -> bytes:
    """A stream of few bytes that stands for a table of very many."""
    rows = 1 << 20
    long = "x" * rows
    if name in ("lz4", "zstd"):
        return stream_of(pa.table({"color": pa.array([long] * 64)}), name)
    if name == "compressed dictionary":
        values = pa.array([long * 32])
        return stream_of(pa.table({"color": pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), values)}), "zstd")
    if name == "nulls":
        return stream_of(pa.table({"color": pa.nulls(1 << 26)}))
    if name == "truth values":
        return stream_of(pa.table({"color": pa.array(np.zeros(16 * rows, dtype=bool))}))
    values, indices = pa.array([long[: rows // 8]]), pa.array(np.zeros(rows, dtype=np.int8))
    if name == "dictionary":
        return stream_of(pa.table({"color": pa.DictionaryArray.from_arrays(indices, values)}))
    if name == "dictionary of views":
        views = values.cast(pa.string_view())
        return stream_of(pa.table({"color": pa.DictionaryArray.from_arrays(indices, views)}))
    _, views, text = values.cast(pa.string_view()).buffers()
    many = np.tile(np.frombuffer(views, dtype=np.int32), rows // 8)
    return stream_of(
        pa.table({"color": pa.Array.from_buffers(pa.string_view(), rows // 8, [None, pa.py_buffer(many), text])})
    )


@pytest.mark.parametrize(
    "name",
    ["lz4", "zstd", "compressed dictionary", "nulls", "truth values", "dictionary", "dictionary of views", "views"],
)
def test_few_bytes_that_stand_for_very_many_are_refused_and_not_unpacked(name):
    data = packed(name)
    limit = 4 << 20
    assert len(data) < limit
    before = pa.default_memory_pool().max_memory()
    with pytest.raises(InvalidInput, match=r"table: takes [\d,]+ bytes once it is unpacked"):
        received([data], limit)
    assert pa.default_memory_pool().max_memory() - before < 8 * limit


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * 100, b"ARROW1\0\0" + b"\xff" * 200, b"\xff\xff\xff\xff\x10\0\0\0"])
def test_what_is_no_arrow_is_refused(data):
    with pytest.raises(InvalidInput, match="table"):
        received([data])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_arrow_is_refused_or_still_safe_to_read(data):
    table = pa.table(
        {
            "text": ["red", None, "blue"] * 20,
            "n": [1, 2, 3] * 20,
            "tags": pa.array([[{"attribute": "a", "tag": "b"}]] * 60, TAGS),
        }
    )
    whole = bytearray(b"".join(send_table(table)))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(InvalidInput):
        table = received([bytes(whole)])
        assert all(isinstance(name, str) for name in table.column_names)
        with suppress(UnicodeDecodeError):  # names inside a nested type; no door reads those
            table.to_pylist()


@pytest.mark.parametrize(
    "change", [(b"\5\0\0\0olive", b"\5\5\5\0olive"), (b"olive", b"\xff\xfeive"), (b"color", b"\xfftint")]
)
def test_offsets_that_point_elsewhere_and_text_that_is_no_utf8_are_refused(change):
    whole = b"".join(send_table(pa.table({"color": ["olive"]})))
    assert whole.count(change[0]) == 1
    with pytest.raises(InvalidInput, match="table"):
        received([whole.replace(*change)])
