"""The channel under the client: where an address leads, and with which certificates."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import grpc

from hibug2.errors import UserError

_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.enable_retries", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


def open_channel(address: str) -> grpc.Channel:
    """A channel to `address`: https://host[:port] with TLS, http://host[:port] without, host:port as HIBUG2_TLS_CA_FILE
    says: with TLS where it is set.

    That file (PEM) says who may have signed the gateway's certificate; without it the public authorities may.
    HIBUG2_TLS_CERT_FILE and HIBUG2_TLS_KEY_FILE are shown to a gateway that asks callers for a certificate.
    UserError for a file that cannot be read.
    """
    scheme, host = target(address)
    authority = _pem("HIBUG2_TLS_CA_FILE")
    if scheme == "http" or (not scheme and authority is None):
        return grpc.insecure_channel(host, options=_OPTIONS)
    chain, key = _pem("HIBUG2_TLS_CERT_FILE"), _pem("HIBUG2_TLS_KEY_FILE")
    if (chain is None) != (key is None):
        raise UserError("HIBUG2_TLS_CERT_FILE", "goes together with HIBUG2_TLS_KEY_FILE; one of them is not set")
    return grpc.secure_channel(host, grpc.ssl_channel_credentials(authority, key, chain), options=_OPTIONS)


def target(address: str) -> tuple[str, str]:
    """Scheme (https, http or none) and what gRPC connects to: ("https", "host:443") for https://host/."""
    for scheme, port in (("https", 443), ("http", 80)):
        if address.startswith(f"{scheme}://"):
            host = address.removeprefix(f"{scheme}://").rstrip("/")
            named = host.rpartition("]")[2] if host.startswith("[") else host  # an IPv6 address is full of colons
            return scheme, host if ":" in named else f"{host}:{port}"
    return "", address


def _pem(variable: str) -> bytes | None:
    file = os.environ.get(variable)
    if not file:
        return None
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(variable, f"{file} cannot be read: {error.strerror}") from error
