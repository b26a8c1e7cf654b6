"""TLS from mounted PEM files (cert-manager's tls.crt, tls.key and ca.crt), read again when they change.

Servers look at every handshake, channels at every call; what is connected already stays so. While new files cannot be
used, such as a certificate whose key is not there yet, the last good ones serve on.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from shared import logs, metrics
from shared.config import ServiceSettings
from shared.errors import HiBug2Error, invalid

log = logs.get("tls")

_TRIES = 5  # to read files that are being replaced
_LATE_S = 60.0  # a call that was begun on a channel gets so long to be on its way before the channel is closed
_DRAIN_S = 24 * 3600.0


@dataclass(frozen=True)
class Identity:
    """A certificate chain and its key, in PEM. `expires` is in seconds since 1970."""

    chain: bytes
    key: bytes
    expires: float


@dataclass(frozen=True)
class Material:
    """All that was read at one time; None for what the settings do not name."""

    identity: Identity | None
    client_ca: bytes | None
    ca: bytes | None


class Pems:
    """The PEM files that `settings` name. Safe to use from several threads."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Read them; InvalidInput, naming the variable, for one that cannot be read or used."""
        self._files = {
            "HIBUG2_TLS_CERT_FILE": settings.tls_cert_file,
            "HIBUG2_TLS_KEY_FILE": settings.tls_key_file,
            "HIBUG2_TLS_CLIENT_CA_FILE": settings.tls_client_ca_file,
            "HIBUG2_TLS_CA_FILE": settings.tls_ca_file,
        }
        self._lock = threading.Lock()
        self._stamp = self._stamped()
        self._material = self._read()
        if self._material.identity is not None:
            gauge = metrics.CERTIFICATE_EXPIRY.labels(settings.tls_cert_file)
            gauge.set_function(self._expires)  # asked when metrics are read, so that new files are seen without a call

    def current(self) -> Material:
        """What the files hold now, or what they last held that could be used."""
        with self._lock:
            stamp = self._stamped()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._material = self._read()
                    log.info("certificates read again")
                except HiBug2Error as error:
                    log.warning("new certificates cannot be used; the old ones stay", error=str(error))
            return self._material

    def _expires(self) -> float:
        identity = self.current().identity
        return identity.expires - time.time() if identity else 0.0

    def _stamped(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_stamp(file) for file in self._files.values() if file)

    def _read(self) -> Material:
        found = self._contents()
        for _ in range(_TRIES):  # a mount is swapped between two reads: then both are not of one time
            again = self._contents()
            if again == found:
                break
            found = again
        chain, key, client_ca, ca = (found[name] for name in self._files)
        for name in ("HIBUG2_TLS_CLIENT_CA_FILE", "HIBUG2_TLS_CA_FILE"):
            if (pem := found[name]) is not None:
                _check_authority(name, self._files[name], pem)
        return Material(_identity(self._files, chain, key) if chain and key else None, client_ca, ca)

    def _contents(self) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for name, file in self._files.items():
            try:
                found[name] = Path(file).read_bytes() if file else None
            except OSError as error:
                raise invalid(name, f"{file} cannot be read: {error.strerror}") from error
            if found[name] == b"":
                raise invalid(name, f"{file} is empty")
        return found


def _stamp(file: str) -> tuple[int, ...]:
    try:
        stat = Path(file).stat()
    except OSError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _identity(files: dict[str, str], chain: bytes, key: bytes) -> Identity:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise invalid("HIBUG2_TLS_CERT_FILE", "TLS needs the extra `tls`: hibug2-platform[tls]") from error
    name, file = "HIBUG2_TLS_CERT_FILE", files["HIBUG2_TLS_CERT_FILE"]
    try:
        certificates = x509.load_pem_x509_certificates(chain)
        name, file = "HIBUG2_TLS_KEY_FILE", files["HIBUG2_TLS_KEY_FILE"]
        private = load_pem_private_key(key, None)
    except (ValueError, TypeError) as error:  # TypeError: a key with a passphrase
        raise invalid(name, f"{file} cannot be used: {error}") from error
    if certificates[0].public_key() != private.public_key():
        raise invalid(name, f"{file} is not the key of the certificate in {files['HIBUG2_TLS_CERT_FILE']}")
    return Identity(chain, key, min(c.not_valid_after_utc.timestamp() for c in certificates))


def _check_authority(name: str, file: str, pem: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode())
    except (ValueError, ssl.SSLError) as error:
        raise invalid(name, f"{file} holds no certificate that can be used: {error}") from error


def server_credentials(pems: Pems) -> grpc.ServerCredentials | None:
    """What a gRPC server listens with: the certificate of the moment; None where there is none.

    Callers must show a certificate that the client CA signed where one is named.
    """

    def configuration() -> grpc.ServerCertificateConfiguration:
        material = pems.current()
        assert material.identity is not None  # noqa: S101 - files that were named stay named
        pair = (material.identity.key, material.identity.chain)
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=material.client_ca)

    material = pems.current()
    if material.identity is None:
        return None
    return grpc.dynamic_ssl_server_credentials(configuration(), configuration, material.client_ca is not None)


def http_context(settings: ServiceSettings) -> ssl.SSLContext | None:
    """The same for HTTP: a context whose every handshake takes the certificate of the moment."""
    pems = Pems(settings)
    if pems.current().identity is None:
        return None
    made: tuple[Material, ssl.SSLContext] = (pems.current(), _http_context(settings, pems.current()))

    def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal made
        material = pems.current()
        if material != made[0]:
            try:
                made = material, _http_context(settings, material)
            except (OSError, ssl.SSLError) as error:  # replaced once more since; the next handshake sees it
                log.warning("new certificates not taken", error=str(error))
        connection.context = made[1]

    made[1].sni_callback = renew
    return made[1]


def _http_context(settings: ServiceSettings, material: Material) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)  # takes files, no bytes
    if material.client_ca is not None:
        context.load_verify_locations(cadata=material.client_ca.decode())
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class RenewedChannel(grpc.aio.Channel):
    """A channel with TLS that is made anew when its files change; calls in flight end on the one that they began on."""

    def __init__(self, pems: Pems, make: Callable[[grpc.ChannelCredentials], grpc.aio.Channel]) -> None:
        self._pems = pems
        self._make = make
        self._material = pems.current()
        self._channel = make(_channel_credentials(self._material))
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> grpc.aio.Channel:
        """The channel that the next call takes."""
        material = self._pems.current()
        if material != self._material:
            task = asyncio.ensure_future(_leave(self._channel))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            self._material, self._channel = material, self._make(_channel_credentials(material))
        return self._channel

    async def __aenter__(self) -> RenewedChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        leaving = list(self._leaving)
        for task in leaving:
            task.cancel()
        await asyncio.gather(self._channel.close(grace), *leaving, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current.channel_ready()

    def unary_unary(self, *args: Any, **more: Any) -> Any:
        return lambda *call, **options: self.current.unary_unary(*args, **more)(*call, **options)

    def unary_stream(self, *args: Any, **more: Any) -> Any:
        return lambda *call, **options: self.current.unary_stream(*args, **more)(*call, **options)

    def stream_unary(self, *args: Any, **more: Any) -> Any:
        return lambda *call, **options: self.current.stream_unary(*args, **more)(*call, **options)

    def stream_stream(self, *args: Any, **more: Any) -> Any:
        return lambda *call, **options: self.current.stream_stream(*args, **more)(*call, **options)


async def _leave(channel: grpc.aio.Channel) -> None:
    """Close `channel` when its calls are done."""
    try:
        await asyncio.sleep(_LATE_S)
        await channel.close(_DRAIN_S)
    except asyncio.CancelledError:
        await channel.close()
        raise


def _channel_credentials(material: Material) -> grpc.ChannelCredentials:
    identity = material.identity
    return grpc.ssl_channel_credentials(
        material.ca, identity.key if identity else None, identity.chain if identity else None
    )
