"""Arrow tables through gRPC streams: IPC stream bytes in messages of at most 1 MiB."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator

import pyarrow as pa

from shared.errors import TooLarge, invalid

MAX_MESSAGE = 1 << 20
_TARGET = MAX_MESSAGE // 2  # a batch is sized by an estimate; half leaves room for its error


async def receive_table(chunks: AsyncIterator[bytes], max_bytes: int, field: str) -> pa.Table:
    """The table whose IPC stream arrives as `chunks`; TooLarge past `max_bytes`, InvalidInput for what is no Arrow."""
    buffer = io.BytesIO()
    async for chunk in chunks:
        if buffer.tell() + len(chunk) > max_bytes:
            raise TooLarge(f"{field}: more than {max_bytes} bytes; send it in parts", {"limit_bytes": str(max_bytes)})
        buffer.write(chunk)
    if buffer.tell() == 0:
        raise invalid(field, "no Arrow data came after the header")
    try:
        table = pa.ipc.open_stream(pa.BufferReader(buffer.getvalue())).read_all()
        table.validate(full=True)  # IPC trusts offsets and text; a stranger's may point anywhere
        return table
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
        raise invalid(field, f"is no Arrow IPC stream: {error}") from error


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
