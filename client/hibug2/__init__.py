"""HiBug2 for Python: find, explain and repair the error slices of a vision model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hibug2.client import Client
    from hibug2.errors import HiBug2Error, RunStopped, UserError, Violation

__all__ = ["Client", "HiBug2Error", "RunStopped", "UserError", "Violation"]


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `hibug2 --help` does not wait for grpc and pyarrow.
    if name == "Client":
        from hibug2.client import Client

        return Client
    if name in __all__:
        from hibug2 import errors

        return getattr(errors, name)
    raise AttributeError(f"module 'hibug2' has no attribute '{name}'")
