"""Arrow IPC streams over gRPC messages, both ways, without holding the whole stream."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa

PIECE_BYTES = 1 << 20
_BATCH_ROWS = 16_384


class _Sink(io.RawIOBase):
    """Takes what the Arrow writer writes until it is cut into pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.pending = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self.pending += view
        return view.nbytes

    def full_pieces(self) -> Iterator[bytes]:
        while len(self.pending) >= PIECE_BYTES:
            yield bytes(self.pending[:PIECE_BYTES])
            del self.pending[:PIECE_BYTES]


def table_pieces(table: pa.Table) -> Iterator[bytes]:
    """The Arrow IPC stream of `table` as bytes objects of at most 1 MiB; joined they are the stream."""
    sink = _Sink()
    with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
            writer.write_batch(batch)
            yield from sink.full_pieces()
    yield from sink.full_pieces()
    if sink.pending:
        yield bytes(sink.pending)


class PieceFile(io.RawIOBase):
    """A readable file over pieces of a stream; holds one piece and what was asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end; everything when `size` is negative or None."""
        wanted = None if size is None or size < 0 else size
        taken = bytearray()
        while wanted is None or len(taken) < wanted:
            if not self._piece:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._piece = memoryview(piece)
                continue
            part = self._piece if wanted is None else self._piece[: wanted - len(taken)]
            taken += part
            self._piece = self._piece[len(part) :]
        return bytes(taken)


def open_pieces(pieces: Iterator[bytes]) -> pa.RecordBatchReader:
    """A reader of the Arrow IPC stream that `pieces` make when joined; ArrowInvalid when they do not."""
    return pa.ipc.open_stream(pa.PythonFile(PieceFile(pieces), mode="r"))
