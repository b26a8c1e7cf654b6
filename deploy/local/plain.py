"""One machine needs no TLS: certificates that the environment names are for a gateway elsewhere."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "tls_cert_file": "",
    "tls_key_file": "",
    "tls_client_ca_file": "",
    "tls_ca_file": "",
    "health_port": 0,
}
