"""A server for `hibug2 enumerate` where no gateway runs but the platform is installed beside the client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points

from hibug2.connection import DEFAULT_ADDRESS, given_address

ENTRY_POINTS = "hibug2.embedded"
_PROBE_S = 0.5


@contextmanager
def enumeration_address(address: str | None) -> Iterator[str]:
    """The address to enumerate at: the one given, the local gateway when it is up, else an embedded server.

    The embedded server is the entry point `enumeration` of the group `hibug2.embedded`: a callable that returns a
    context manager yielding an address. Without it the default address is yielded, and the call will say that
    nothing answers there.
    """
    named = given_address(address)
    if named is not None or _answers(DEFAULT_ADDRESS):
        yield named or DEFAULT_ADDRESS
        return
    found = tuple(entry_points(group=ENTRY_POINTS, name="enumeration"))
    if not found:
        yield DEFAULT_ADDRESS
        return
    with found[0].load()() as embedded:
        yield embedded


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_PROBE_S):
            return True
    except OSError:
        return False
