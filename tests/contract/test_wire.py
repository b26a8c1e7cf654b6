"""What a request meets on its way, on real sockets."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from shared.llm.wire import Broken, Rejected, Wire

BODY = b'{"messages": []}'


@asynccontextmanager
async def saying(*answers: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives each request the next of `answers` and hangs up; its address, and what it was sent."""
    left, heard = list(answers), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        heard.append(head + await reader.readexactly(int(length.split(b":")[1])))
        writer.write(left.pop(0))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heard


def http(status: str, body: bytes = b"", *headers: str, kind: str = "application/json") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", "connection: close"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


@pytest.fixture
async def wire() -> AsyncIterator[Callable[..., Wire]]:
    made: list[Wire] = []

    def make(base_url: str, key: str = "sk-1") -> Wire:
        made.append(Wire(base_url, key))
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def test_the_body_arrives_with_the_key_below_the_base_url(wire):
    async with saying(http("200 OK", b'{"choices": []}')) as (host, heard):
        assert await wire(f"http://{host}/some/v1/").post(BODY) == {"choices": []}
    head, _, body = heard[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /some/v1/chat/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer sk-1" in head
    assert body == BODY


async def test_user_and_password_of_the_address_stand_for_the_key(wire):
    async with saying(http("200 OK", b"{}")) as (host, heard):
        await wire(f"http://me:secret@{host}/v1").post(BODY)
    assert b"Authorization: Basic " + base64.b64encode(b"me:secret") in heard[0]
    assert b"sk-1" not in heard[0]


async def test_a_server_that_hangs_up_without_a_word_may_have_worked(wire):
    async with saying(b"", b"HTTP/1.1 200 OK\r\ncontent-le", http("200 OK", b'{"a": 1}')[:-3]) as (host, _):
        for _ in range(3):
            with pytest.raises(Broken) as caught:
                await wire(f"http://{host}/v1").post(BODY)
            assert caught.value.sent


async def test_what_never_left_was_not_sent(wire):
    async with saying() as (gone, _):
        pass
    for base_url in (f"http://{gone}/v1", "http://no.such.host.invalid/v1", "http://127.0.0.1:0/v1"):
        with pytest.raises(Broken) as caught:
            await wire(base_url).post(BODY)
        assert not caught.value.sent


async def test_a_redirect_is_followed_with_the_body(wire):
    async with (
        saying(http("200 OK", b'{"here": 1}')) as (there, heard),
        saying(http("307 Temporary Redirect", b"", f"location: http://{there}/v2")) as (host, _),
    ):
        assert await wire(f"http://{host}/v1").post(BODY) == {"here": 1}
    assert heard[0].endswith(BODY)
    assert b"sk-1" not in heard[0]  # the key is for the endpoint that was named


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (b'{"error": {"message": "too long", "code": "ctx", "type": "bad", "param": "messages"}}', "ctx", "too long"),
        (b'{"message": "too long", "code": 400}', "", "too long"),
        (b'{"error": "too long"}', "", "too long"),
        (b"<html>too long", "", "<html>too long"),
        (b"[]", "", "status 400"),
        (b"", "", "status 400"),
    ],
)
async def test_whatever_form_an_error_has_its_words_are_found(wire, answer, code, message):
    async with saying(http("400 Bad Request", answer, "retry-after: 3")) as (host, _):
        with pytest.raises(Rejected) as caught:
            await wire(f"http://{host}/v1").post(BODY)
    error = caught.value
    assert (error.status, error.code, error.message) == (400, code, message)
    assert error.headers.get("Retry-After") == "3"


async def test_what_is_no_json_is_told_from_what_should_be(wire):
    async with saying(http("200 OK", b"<html>", kind="text/html"), http("200 OK", b'{"cut')) as (host, _):
        there = wire(f"http://{host}/v1")
        assert await there.post(BODY) == "<html>"
        with pytest.raises(json.JSONDecodeError):
            await there.post(BODY)


async def test_a_proxy_of_the_environment_is_used(wire, monkeypatch):
    async with saying(http("200 OK", b"{}")) as (proxy, heard):
        monkeypatch.setenv("http_proxy", f"http://{proxy}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        await wire("http://model.invalid/v1").post(BODY)
    assert heard[0].startswith(b"POST http://model.invalid/v1/chat/completions ")
