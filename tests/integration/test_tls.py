"""TLS and mutual TLS with real certificates: who is let in, and how certificates change without a restart."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import AsyncExitStack, contextmanager
from functools import partial

import grpc
import pyarrow as pa
import pytest
import trustme
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY
from redis.exceptions import RedisError

from deploy.local.stack import Stack
from hibug2 import Client, HiBug2Error
from hibug2 import channel as client_channel
from services.gateway import config as gateway_config
from services.gateway import server as gateway
from shared.config import ServiceSettings
from shared.errors import InvalidInput
from shared.queue.stream import Priority, WorkQueue
from shared.queue.stream import connect as connect_redis
from shared.rpc import channel as platform_channel
from shared.rpc.channel import connect
from shared.rpc.probe import healthy
from shared.rpc.server import start
from tests.integration.certificates import Mount, issue
from tests.integration.waiting import eventually
from tests.log_settings import restored_logs

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def stranger() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(autouse=True)
def _asked_once(monkeypatch):
    """Who is refused is refused at once: retries would only take time."""
    for module, name in ((platform_channel, "OPTIONS"), (client_channel, "_OPTIONS")):
        monkeypatch.setattr(module, name, [("grpc.enable_retries", 0)])


@pytest.fixture
def mount(tmp_path, authority) -> Mount:
    made = Mount(tmp_path / "tls")
    made.put(authority, issue(authority))
    return made


@pytest.fixture
async def exits():
    async with AsyncExitStack() as stack:
        yield stack


def settings(**more) -> ServiceSettings:
    return ServiceSettings(listen="127.0.0.1:0", metrics_port=0, drain_s=0.2, **more)


async def served(exits: AsyncExitStack, **more) -> str:
    running = await start(settings(**more), lambda server: [])
    exits.push_async_callback(running.stop)
    return running.address


async def check(address: str, with_settings: ServiceSettings | None) -> int:
    async with connect(address, with_settings) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return answer.status


async def is_refused(address: str, with_settings: ServiceSettings | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await check(address, with_settings)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


def shown(address: str, authority: trustme.CA, own: trustme.LeafCert | None = None) -> int:
    """The serial number of the certificate that a server shows to a new connection."""
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    if own is not None:
        own.configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True)).serial_number


def serial(certificate: trustme.LeafCert) -> int:
    return x509.load_pem_x509_certificate(certificate.cert_chain_pems[0].bytes()).serial_number


async def test_services_with_certificates_of_one_authority_talk(exits, mount):
    address = await served(exits, **mount.settings())
    assert await check(address, settings(**mount.settings())) == SERVING


async def test_who_shows_no_certificate_is_refused(exits, mount):
    address = await served(exits, **mount.settings())
    await is_refused(address, settings(tls_ca_file=str(mount.folder / "ca.crt")))
    await is_refused(address, None)  # and so is who speaks no TLS


async def test_without_a_client_authority_anybody_may_call_with_tls(exits, mount):
    address = await served(exits, **mount.settings(callers=False))
    assert await check(address, settings(tls_ca_file=str(mount.folder / "ca.crt"))) == SERVING
    await is_refused(address, None)


async def test_a_certificate_of_another_authority_is_refused_on_both_sides(exits, mount, tmp_path, authority, stranger):
    address = await served(exits, **mount.settings())
    other = Mount(tmp_path / "other")
    other.put(stranger, issue(stranger))
    await is_refused(address, settings(**other.settings()))  # knows not the server, nor is known to it
    other.put(authority, issue(stranger))
    await is_refused(address, settings(**other.settings()))  # is not known to the server
    other.put(stranger, issue(authority))
    await is_refused(address, settings(**other.settings()))  # does not know the server


async def test_a_new_certificate_is_served_without_a_restart_and_old_connections_live(exits, mount, authority):
    own = issue(authority)
    address = await served(exits, **mount.settings())
    channel = await exits.enter_async_context(connect(address, settings(**mount.settings())))
    watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watching.read()).status == SERVING
    renewed = issue(authority, days=60)
    assert await asyncio.to_thread(shown, address, authority, own) != serial(renewed)
    mount.put(authority, renewed)
    assert await asyncio.to_thread(shown, address, authority, own) == serial(renewed)
    # a call after the change, on the channel that was made before; and the stream is still there
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == SERVING
    reading = asyncio.ensure_future(watching.read())
    done, _ = await asyncio.wait([reading], timeout=0.3)
    assert not done
    watching.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_channel_takes_a_new_authority_and_calls_in_flight_go_on(exits, mount, authority, stranger):
    old = await served(exits, **mount.settings())
    channel = await exits.enter_async_context(connect(old, settings(**mount.settings())))
    stub = health_pb2_grpc.HealthStub(channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watching.read()).status == SERVING
    mount.put(stranger, issue(stranger))  # all of it changes: server, caller, and whom they trust
    assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)).status == SERVING
    await is_refused(old, settings(tls_ca_file=str(mount.folder / "ca.crt")))
    reading = asyncio.ensure_future(watching.read())
    done, _ = await asyncio.wait([reading], timeout=0.3)
    assert not done
    watching.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_an_authority_is_changed_and_nobody_is_refused_meanwhile(exits, tmp_path, authority, stranger):
    """Each service takes the files of a step in its own time: old and new ones talk, both ways."""
    both = authority.cert_pem.bytes() + stranger.cert_pem.bytes()
    steps = [
        (issue(authority), authority.cert_pem.bytes()),
        (issue(authority), both),
        (issue(stranger), both),
        (issue(stranger), stranger.cert_pem.bytes()),
    ]
    mounts = [Mount(tmp_path / name) for name in ("first", "second")]

    def put(mount: Mount, step: int) -> None:
        own, trusted = steps[step]
        chain = b"".join(pem.bytes() for pem in own.cert_chain_pems)
        mount.put_files(chain, own.private_key_pem.bytes(), trusted)

    for mount in mounts:
        put(mount, 0)
    addresses = [await served(exits, **mount.settings()) for mount in mounts]
    for step in range(1, len(steps)):
        for mount in mounts:
            put(mount, step)
            for server, caller in ((addresses[0], mounts[1]), (addresses[1], mounts[0])):
                assert await check(server, settings(**caller.settings())) == SERVING
    outsider = Mount(tmp_path / "outsider")
    outsider.put(authority, issue(authority))
    await is_refused(addresses[0], settings(**outsider.settings()))  # the old one is worth nothing now


def expiry(mount: Mount) -> float:
    name = "hibug2_tls_certificate_expiry_seconds"
    value = REGISTRY.get_sample_value(name, {"file": str(mount.folder / "tls.crt")})
    assert value is not None
    return value


async def test_files_that_cannot_be_used_change_nothing_until_they_can(exits, mount, authority):
    own = issue(authority)
    before = await served(exits, **mount.settings())
    first = await asyncio.to_thread(shown, before, authority, own)
    good, other = issue(authority, days=90), issue(authority)
    ca, chain = authority.cert_pem.bytes(), good.cert_chain_pems[0].bytes()
    for contents in [
        (chain, other.private_key_pem.bytes(), ca),  # the key of another
        (b"nonsense", good.private_key_pem.bytes(), ca),
        (b"", good.private_key_pem.bytes(), ca),
        (chain, good.private_key_pem.bytes(), b"nonsense"),
    ]:
        mount.put_files(*contents)
        assert await asyncio.to_thread(shown, before, authority, own) == first
        assert await check(before, settings(**_files(mount, authority, own))) == SERVING
    assert expiry(mount) == pytest.approx(30 * 86400, abs=600)
    mount.put(authority, good)
    assert expiry(mount) == pytest.approx(90 * 86400, abs=600)  # without any call
    assert await asyncio.to_thread(shown, before, authority, own) == serial(good)


def _files(mount: Mount, authority: trustme.CA, own: trustme.LeafCert) -> dict[str, str]:
    folder = mount.folder.parent / "caller"
    if not folder.exists():
        Mount(folder).put(authority, own)
    return {
        f"tls_{what}_file": str(folder / name)
        for what, name in (("cert", "tls.crt"), ("key", "tls.key"), ("ca", "ca.crt"))
    }


async def test_a_file_that_cannot_be_used_is_told_with_its_variable_at_the_start(tmp_path, authority):
    one, other, ca = issue(authority), issue(authority), authority.cert_pem.bytes()
    chain, key = one.cert_chain_pems[0].bytes(), one.private_key_pem.bytes()
    mount = Mount(tmp_path / "tls")
    for variable, contents in [
        ("HIBUG2_TLS_CERT_FILE", (b"nonsense", key, ca)),
        ("HIBUG2_TLS_KEY_FILE", (chain, b"nonsense", ca)),
        ("HIBUG2_TLS_KEY_FILE", (chain, other.private_key_pem.bytes(), ca)),
        ("HIBUG2_TLS_CLIENT_CA_FILE", (chain, key, b"nonsense")),
    ]:
        mount.put_files(*contents)
        with pytest.raises(InvalidInput, match=variable):
            await start(settings(**mount.settings()), lambda server: [])


async def test_a_file_that_is_missing_is_told_with_its_variable(tmp_path):
    with pytest.raises(InvalidInput, match=r"HIBUG2_TLS_CERT_FILE: .*/none cannot be read"):
        await start(settings(tls_cert_file=str(tmp_path / "none"), tls_key_file=str(tmp_path / "none")), lambda _: [])
    with pytest.raises(InvalidInput, match="HIBUG2_TLS_CA_FILE"):
        connect("localhost:1", settings(tls_ca_file=str(tmp_path / "none")))


async def test_the_health_port_needs_no_certificate_and_tells_when_the_server_drains(mount):
    port = free_port()
    running = await start(settings(health_port=port, **mount.settings()), lambda server: [])
    probe = f"127.0.0.1:{port}"
    try:
        assert await asyncio.to_thread(healthy, probe)
        assert not await asyncio.to_thread(healthy, running.address, 0.5)
        async with grpc.aio.insecure_channel(probe) as channel:
            watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watching.read()).status == SERVING
            stopping = asyncio.create_task(running.stop())
            assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await stopping
        assert not await asyncio.to_thread(healthy, probe, 0.5)
    finally:
        await running.stop()


async def test_a_health_port_that_is_taken_is_told_with_its_setting_and_nothing_is_left_open(exits, mount):
    port = free_port()
    await served(exits, health_port=port)
    with pytest.raises(OSError, match="HIBUG2_HEALTH_PORT"):
        await start(settings(health_port=port, **mount.settings()), lambda server: [])


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def fetched(url: str, authority: trustme.CA, own: trustme.LeafCert | None = None) -> str:
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    if own is not None:
        own.configure_cert(context)
    with urllib.request.urlopen(url, timeout=10, context=context) as page:
        return page.read().decode()


async def pages(exits: AsyncExitStack, redis_url: str, tmp_path, **more) -> str:
    port = free_port()
    running = await gateway.start_server(
        gateway_config.Settings(
            listen="127.0.0.1:0",
            metrics_port=0,
            drain_s=0.2,
            http_host="127.0.0.1",
            http_port=port,
            redis_url=redis_url,
            store_url=(tmp_path / "store").as_uri(),
            **more,
        )
    )
    exits.push_async_callback(running.stop)
    return f"127.0.0.1:{port}"


async def test_the_pages_are_served_with_tls_and_a_new_certificate_is_taken(
    exits, mount, redis_url, tmp_path, authority, stranger
):
    address = await pages(exits, redis_url, tmp_path, **mount.settings(callers=False))
    page = await asyncio.to_thread(fetched, f"https://{address}/", authority)  # asks the gateway's own gRPC server
    assert "<html" in page
    with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
        await asyncio.to_thread(fetched, f"https://{address}/healthz", stranger)
    renewed = issue(authority)
    mount.put(authority, renewed)
    assert await asyncio.to_thread(shown, address, authority) == serial(renewed)
    assert "serving" in await asyncio.to_thread(fetched, f"https://{address}/healthz", authority)


async def test_pages_ask_for_a_certificate_where_grpc_does(exits, mount, redis_url, tmp_path, authority, stranger):
    address = await pages(exits, redis_url, tmp_path, **mount.settings())
    for own in (None, issue(stranger)):
        with pytest.raises(OSError):  # noqa: PT011 - a reset or an alert, as the moment has it
            await asyncio.to_thread(fetched, f"https://{address}/healthz", authority, own)
    assert "serving" in await asyncio.to_thread(fetched, f"https://{address}/healthz", authority, issue(authority))
    mount.put(stranger, issue(stranger))
    assert "serving" in await asyncio.to_thread(fetched, f"https://{address}/healthz", stranger, issue(stranger))
    with pytest.raises(OSError):  # noqa: PT011
        await asyncio.to_thread(fetched, f"https://{address}/healthz", stranger, issue(authority))


async def test_a_client_reaches_a_platform_whose_services_all_ask_for_certificates(exits, mount, tmp_path, monkeypatch):
    stack = await exits.enter_async_context(Stack(tmp_path / "stack", (), workers=0, settings=mount.settings()))
    port = stack.address.rpartition(":")[2]
    for name, file in (("CA", "ca.crt"), ("CERT", "tls.crt"), ("KEY", "tls.key")):
        monkeypatch.setenv(f"HIBUG2_TLS_{name}_FILE", str(mount.folder / file))
    table = pa.table({"pose": ["sitting"] * 5 + ["lying"] * 5, "right": [0.0] * 5 + [1.0] * 5})

    def slices(address: str) -> int:
        with Client(address, timeout_s=5) as client:
            return client.enumerate(table, ["right"], depth=1, min_count=5).num_rows

    # through the gateway to the engine; an address alone is TLS where the authority is named
    assert await asyncio.to_thread(slices, f"https://localhost:{port}") == 2
    assert await asyncio.to_thread(slices, f"localhost:{port}") == 2
    for address in (
        f"http://localhost:{port}",
        stack.backends["enumeration_address"].replace("127.0.0.1", "http://127.0.0.1"),
    ):
        with pytest.raises(HiBug2Error) as failure:
            await asyncio.to_thread(slices, address)
        assert failure.value.reason == "UNREACHABLE"
    monkeypatch.delenv("HIBUG2_TLS_CERT_FILE")
    monkeypatch.delenv("HIBUG2_TLS_KEY_FILE")
    with pytest.raises(HiBug2Error, match="HIBUG2_TLS_CA_FILE"):
        await asyncio.to_thread(slices, f"https://localhost:{port}")


def test_certificates_for_a_gateway_elsewhere_are_nothing_to_the_local_engine(mount, monkeypatch):
    from deploy.local.embedded import enumeration

    for name, file in (("CA", "ca.crt"), ("CERT", "tls.crt"), ("KEY", "tls.key")):
        monkeypatch.setenv(f"HIBUG2_TLS_{name}_FILE", str(mount.folder / file))
    table = pa.table({"pose": ["sitting"] * 5, "right": [0.0] * 5})
    with restored_logs(), enumeration() as address, Client(address, timeout_s=10) as client:
        assert client.enumerate(table, ["right"], depth=1, min_count=5).num_rows == 1


# Redis

# What the platform's scripts and commands need, on its own keys; nothing that looks at or changes the server.
RULES = ["~hibug2:*", "+@all", "-@admin", "-@dangerous", "+info"]


@contextmanager
def redis_with_tls(folder, mount: Mount):
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server here (Debian's package redis-server); the embedded one has no TLS")
    port = free_port()
    options = {
        "port": "0",
        "tls-port": str(port),
        "bind": "127.0.0.1",
        "tls-cert-file": str(mount.folder / "tls.crt"),
        "tls-key-file": str(mount.folder / "tls.key"),
        "tls-ca-cert-file": str(mount.folder / "ca.crt"),
        "tls-auth-clients": "no",
        "save": "",
        "dir": str(folder),
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    users = ["--user", "default", "off", "--user", "platform", "on", ">sesame", *RULES]
    process = subprocess.Popen([server, *arguments, *users], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield port, process
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=10)
        sys.stdout.write(output.decode(errors="replace"))  # shown when the test fails


async def answers(client) -> bool:
    try:
        return bool(await client.ping())
    except RedisError:
        return False


async def test_redis_is_reached_with_tls_as_a_user_who_may_do_little(tmp_path, mount, stranger):
    with redis_with_tls(tmp_path, mount) as (port, _):
        where = f"127.0.0.1:{port}/0?ssl_ca_certs={mount.folder / 'ca.crt'}"
        client = connect_redis(f"rediss://platform:sesame@{where}")
        await eventually(partial(answers, client), 10)
        queue = WorkQueue(client, "test")
        await queue.ensure()
        await queue.offer(Priority.BATCH, "team", "job", [(0, b"work")], 1, 10)
        (entry,) = await queue.take("worker")
        assert entry.payload == b"work"
        await queue.done(entry)
        assert (await queue.backlog()).total == 0
        for refused in ("FLUSHALL", "CONFIG GET *", "ACL LIST"):
            with pytest.raises(RedisError, match="no permissions"):
                await client.execute_command(*refused.split())
        with pytest.raises(RedisError, match=r"(?i)no permissions"):
            await client.get("other:key")
        await client.aclose()
        foreign = tmp_path / "foreign.crt"
        foreign.write_bytes(stranger.cert_pem.bytes())
        for wrong in (
            f"rediss://platform:wrong@{where}",
            f"rediss://{where}",
            f"redis://platform:sesame@127.0.0.1:{port}/0",
            f"rediss://platform:sesame@127.0.0.1:{port}/0?ssl_ca_certs={foreign}",
        ):
            other = connect_redis(wrong)
            assert not await answers(other)
            await other.aclose()
