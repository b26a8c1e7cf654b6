"""Results that wait for their reader: in memory while they are small, else in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator

IN_MEMORY = 32 << 20  # bytes
_LENGTH = 4


class Spill:
    """Messages, written once and then read once, so that a slow reader holds neither memory nor a core."""

    def __init__(self, messages: Iterable[bytes]) -> None:
        """Take all of `messages`; OSError when the temporary folder is full."""
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  # closed when it has been read
        for message in messages:
            self._file.write(len(message).to_bytes(_LENGTH, "little"))
            self._file.write(message)
        self._file.seek(0)

    def __iter__(self) -> Iterator[bytes]:
        """The messages as they came; what they took is given back after the last, or by `close`."""
        try:
            while length := self._file.read(_LENGTH):
                yield self._file.read(int.from_bytes(length, "little"))
        finally:
            self.close()

    def close(self) -> None:
        self._file.close()
