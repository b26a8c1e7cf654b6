"""Arrow tables through gRPC streams: IPC stream bytes in messages of at most 1 MiB."""

from __future__ import annotations

import asyncio
import io
import struct
from collections.abc import AsyncIterator, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import TooLarge, invalid

MAX_MESSAGE = 1 << 20
_TARGET = MAX_MESSAGE // 2  # a batch is sized by an estimate; half leaves room for its error
_OFFSET = 4  # bytes that say where a text ends
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
# Numbers and fields of Arrow's Message.fbs, which pyarrow does not show.
_DICTIONARY, _BATCH = 2, 3
_SIZE = 8  # bytes before a buffer that say how many it takes unpacked
_HEADER_KIND, _HEADER, _DICTIONARY_DATA, _BUFFERS, _COMPRESSION = 1, 2, 1, 2, 3


async def receive_table(chunks: AsyncIterator[bytes], max_bytes: int, field: str) -> pa.Table:
    """The table whose IPC stream arrives as `chunks`; TooLarge past `max_bytes`, InvalidInput for what is no Arrow.

    A few bytes may stand for very many: compressed, in a dictionary, as views or nulls. InvalidInput also where the
    table, written out plainly, is larger than `max_bytes`; what is compressed is unpacked only where it is not.
    """
    buffer = io.BytesIO()
    async for chunk in chunks:
        if buffer.tell() + len(chunk) > max_bytes:
            raise TooLarge(f"{field}: more than {max_bytes} bytes; send it in parts", {"limit_bytes": str(max_bytes)})
        buffer.write(chunk)
    if buffer.tell() == 0:
        raise invalid(field, "no Arrow data came after the header")
    # Unpacking and checking a large table takes seconds, in which others want to be answered.
    return await asyncio.to_thread(_read_table, pa.py_buffer(buffer.getbuffer()), max_bytes, field)


def _read_table(data: pa.Buffer, max_bytes: int, field: str) -> pa.Table:
    try:
        size = sum(_unpacked_bytes(message) for message in pa.ipc.MessageReader.open_stream(data))
        if size <= max_bytes:
            table = pa.ipc.open_stream(data).read_all()
            table.validate(full=True)  # IPC trusts offsets and text; a stranger's may point anywhere
            size = sum(_plain_bytes(column) for column in table.columns)
    except (pa.ArrowException, OSError, ValueError, struct.error) as error:  # ValueError: a name that is no UTF-8
        raise invalid(field, f"is no Arrow IPC stream: {error}") from error
    if size > max_bytes:
        raise invalid(field, f"takes {size:,} bytes once it is unpacked, more than {max_bytes:,}; send it in parts")
    return table


def _unpacked_bytes(message: pa.ipc.Message) -> int:
    """What the buffers of a message say that they take once they are unpacked; unpacking holds them to it."""
    head = memoryview(message.metadata)
    root = struct.unpack_from("<I", head)[0]
    kind, batch = _field(head, root, _HEADER_KIND), _linked(head, root, _HEADER)
    if not kind or head[kind] not in (_DICTIONARY, _BATCH):
        return 0
    if head[kind] == _DICTIONARY:
        batch = _linked(head, batch, _DICTIONARY_DATA)
    vector = _linked(head, batch, _BUFFERS)
    if not vector or not _field(head, batch, _COMPRESSION):
        return int(message.body.size)
    count = struct.unpack_from("<I", head, vector)[0]
    places = np.frombuffer(head, dtype="<i8", count=2 * count, offset=vector + 4).reshape(count, 2)
    places = places[places[:, 1] >= _SIZE]
    said = [struct.unpack_from("<q", message.body, offset)[0] for offset in places[:, 0].tolist()]
    return sum(max(size, length) for size, length in zip(said, places[:, 1].tolist(), strict=True))  # -1: as it was


def _field(head: memoryview, table: int, number: int) -> int:
    """Where field `number` of the flatbuffer table at `table` lies; 0 where it is absent, as in an absent table."""
    if not table:
        return 0
    layout = table - struct.unpack_from("<i", head, table)[0]
    entry = 4 + 2 * number
    if entry >= struct.unpack_from("<H", head, layout)[0]:
        return 0
    offset = struct.unpack_from("<H", head, layout + entry)[0]
    return table + int(offset) if offset else 0


def _linked(head: memoryview, table: int, number: int) -> int:
    """Where the table or vector that field `number` refers to lies; 0 where the field is absent."""
    field = _field(head, table, number)
    return field + int(struct.unpack_from("<I", head, field)[0]) if field else 0


def _plain_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of a column without dictionaries and views; four for a null or a truth value, which are hardly any."""
    kind, chunks = column.type, column.chunks
    if pa.types.is_dictionary(kind):
        return sum(_dictionary_bytes(chunk) for chunk in chunks)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return sum(_view_bytes(chunk) for chunk in chunks)
    if pa.types.is_null(kind) or pa.types.is_boolean(kind):
        return _OFFSET * len(column)
    return int(column.nbytes)


def _dictionary_bytes(chunk: pa.DictionaryArray) -> int:
    """Bytes of the values that the indices name, one by one."""
    values = chunk.dictionary
    width = _OFFSET * len(chunk)
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        sizes = pa.array(_view_sizes(values))
    elif any(is_kind(values.type) for is_kind in _TEXT):
        sizes = pc.binary_length(values)
    else:
        return width + int(values.nbytes / max(1, len(values)) * len(chunk))
    return width + (pc.sum(sizes.take(chunk.indices).cast(pa.int64())).as_py() or 0)


def _view_bytes(chunk: pa.Array) -> int:
    return _OFFSET * len(chunk) + int(_view_sizes(chunk).sum())


def _view_sizes(chunk: pa.Array) -> npt.NDArray[np.int64]:
    """(n,) bytes of each view: the first of the four numbers that it is made of."""
    views = np.frombuffer(chunk.buffers()[1], dtype=np.int32).reshape(-1, 4)
    return views[chunk.offset : chunk.offset + len(chunk), 0].astype(np.int64)


class _Sink(io.RawIOBase):
    """Collects what an IPC writer writes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self.data += view
        return view.nbytes

    def take(self) -> bytes:
        out = bytes(self.data)
        self.data.clear()
        return out


def send_table(table: pa.Table) -> Iterator[bytes]:
    """`table` as the messages of one IPC stream: a batch a message, at most 1 MiB each where a row allows it."""
    rows = max(1, int(table.num_rows * _TARGET / max(table.nbytes, 1))) if table.num_rows else 1
    return send_batches(table.schema, table.combine_chunks().to_batches(max_chunksize=min(rows, 1 << 20)))


def send_batches(schema: pa.Schema, batches: Iterator[pa.RecordBatch] | list[pa.RecordBatch]) -> Iterator[bytes]:
    """The messages of one IPC stream of `batches`; a batch that came out too large is halved."""
    sink = _Sink()
    limit = MAX_MESSAGE - schema.serialize().size - 64  # the first message carries the schema as well
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            waiting = [batch]
            while waiting:
                part = waiting.pop()
                if pa.ipc.get_record_batch_size(part) > limit and part.num_rows > 1:
                    half = part.num_rows // 2
                    waiting += [part.slice(half), part.slice(0, half)]
                    continue
                writer.write_batch(part)
                yield sink.take()
    yield sink.take()
