"""An OpenAI-compatible server that answers like a decent model and misbehaves on demand.

    with ScriptedLLM() as server:
        server.fail(Fault.RATE_LIMIT)          # the next call; one fault a call, then it behaves
        ... base_url=server.base_url ...
        assert len(server.calls) == 2

`python -m tests.scripted_llm --port 8089` serves until it is interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import io
import json
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from PIL import Image

from tests import scripted_answers

MODEL = "scripted-1"
FORMATS = ("json_schema", "json_object", "text")


class Fault(StrEnum):
    """What goes wrong with one call."""

    RATE_LIMIT = auto()  # 429
    RATE_LIMIT_RETRY_AFTER = auto()  # 429 that says how long to wait
    QUOTA = auto()  # 429 that will not pass
    BAD_KEY = auto()  # 401
    NO_MODEL = auto()  # 404
    SERVER_ERROR = auto()  # 500
    GATEWAY_TIMEOUT = auto()  # 504: nobody knows whether the model behind has worked
    ECHO = auto()  # 400 that sends the whole request back
    FILTERED = auto()  # 400 of a content filter
    HTML = auto()  # 200 that is a web page
    HANG = auto()  # nothing until the caller hangs up
    DRIP = auto()  # blanks for ever: each read succeeds, no answer comes
    CUT_CONNECTION = auto()  # the connection ends within the body
    TRUNCATED = auto()  # cut JSON, finish_reason length
    CUT_JSON = auto()  # cut JSON, finish_reason stop
    PROSE = auto()  # JSON in a fence between prose
    REFUSAL = auto()
    EMPTY = auto()  # no content
    NO_CHOICES = auto()
    NO_USAGE = auto()  # does not tell what it counted
    RENAMED = auto()  # an attribute under another name
    MISSING = auto()  # an attribute left out
    FOREIGN_TAG = auto()  # a tag that is not in the set
    DUPLICATE = auto()  # an attribute twice
    MANY_TAGS = auto()  # 2000 tags for an attribute
    WRONG_TYPES = auto()  # numbers and lists in place of text


@dataclass
class Call:
    """One request to /v1/chat/completions."""

    body: dict[str, Any]
    authorization: str
    begin_s: float  # monotonic
    fault: Fault | None
    status: int = 0  # 0: not answered
    in_flight: int = 0  # calls being served when it came, itself included
    usage: dict[str, int] = field(default_factory=dict)  # as it was told

    @property
    def format(self) -> str:
        return self.body.get("response_format", {}).get("type", "text")

    @property
    def schema(self) -> dict[str, Any]:
        return _schema_of(self.body)

    @property
    def images(self) -> list[bytes]:
        return _images_of(self.body)


@dataclass
class ScriptedLLM:
    """The server; a context manager. Everything it was asked is in `calls`."""

    formats: tuple[str, ...] = FORMATS  # response_format types it takes; others get a 400
    reasoning: bool = False  # refuses max_tokens and temperature, as some models do
    latency_s: float = 0.0
    retry_after: str = "1"
    port: int = 0  # 0 takes a free one
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._faults: deque[Fault | None] = deque()
        self._in_flight = 0
        self.arrived = threading.Event()  # a call came
        # With the protocol named, asyncio turns Nagle's algorithm off; else each answer waits 40 ms for an ACK.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", self.port))
        self._socket.listen(1024)
        self.port = self._socket.getsockname()[1]
        config = uvicorn.Config(self._app(), log_level="critical", timeout_graceful_shutdown=1, lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def fail(self, *faults: Fault) -> None:
        """The next calls get `faults`, one each."""
        self._faults.extend(faults)

    def reset(self) -> None:
        """No faults ahead, no calls behind."""
        self._faults.clear()
        self.calls.clear()
        self.arrived.clear()
        self.retry_after = "1"

    def skip(self, count: int) -> None:
        """The next `count` calls go well."""
        self._faults.extend([None] * count)

    def __enter__(self) -> ScriptedLLM:
        self._thread.start()  # the socket listens already: whoever connects now is served
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()
        assert not self._thread.is_alive(), "the scripted server does not stop"

    def wait(self) -> None:
        """Until the server ends."""
        self._thread.join()

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)

        @app.get("/v1/models")
        async def models() -> Response:
            return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "tests"}]})

        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Response:
            body = await request.json()
            fault = self._faults.popleft() if self._faults else None
            self._in_flight += 1
            key = request.headers.get("authorization", "")
            call = Call(body, key, time.monotonic(), fault, in_flight=self._in_flight)
            self.calls.append(call)
            self.arrived.set()
            try:
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                response = await self._respond(call, request)
                call.status = response.status_code
                return response
            finally:
                self._in_flight -= 1

        return app

    async def _respond(self, call: Call, request: Request) -> Response:
        body = call.body
        match call.fault:
            case Fault.RATE_LIMIT:
                return _error(429, "Rate limit reached", "rate_limit_exceeded")
            case Fault.RATE_LIMIT_RETRY_AFTER:
                return _error(429, "Rate limit reached", "rate_limit_exceeded", {"Retry-After": self.retry_after})
            case Fault.QUOTA:
                return _error(429, "You exceeded your current quota", "insufficient_quota")
            case Fault.BAD_KEY:
                return _error(401, f"Incorrect API key provided: {call.authorization}", "invalid_api_key")
            case Fault.NO_MODEL:
                return _error(404, f"The model {body.get('model')} does not exist", "model_not_found")
            case Fault.SERVER_ERROR:
                return _error(500, "The server had an error", "server_error")
            case Fault.GATEWAY_TIMEOUT:
                return _error(504, "The upstream server gave no answer", "timeout")
            case Fault.ECHO:
                return _error(400, f"cannot serve {json.dumps(body)} for {call.authorization}", "bad_request")
            case Fault.FILTERED:
                return _error(400, "The request was filtered", "content_filter")
            case Fault.HTML:
                return HTMLResponse("<html><body>Welcome</body></html>")
            case Fault.HANG:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                return Response(status_code=499)
            case Fault.DRIP:
                return StreamingResponse(_drip(), media_type="application/json")
            case Fault.CUT_CONNECTION:
                headers = {"content-length": "10000"}
                return StreamingResponse(iter([b'{"id": "x", ']), headers=headers, media_type="application/json")
        if call.format not in self.formats:
            return _error(400, f"response_format of type {call.format} is not supported", "unsupported_value")
        if self.reasoning and "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
            return _error(400, text, "unsupported_parameter", param="max_tokens")
        if self.reasoning and "temperature" in body:
            return _error(400, "Unsupported value: 'temperature' does not support 0", "unsupported_value")
        return JSONResponse(_completion(call))


async def _drip() -> Any:
    while True:
        yield b" "
        await asyncio.sleep(0.05)


def _error(
    status: int, message: str, code: str, headers: dict[str, str] | None = None, param: str | None = None
) -> Response:
    error = {"message": message, "type": code, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def _completion(call: Call) -> dict[str, Any]:
    text = json.dumps(_spoilt(answer(call.body), call.fault), ensure_ascii=False)
    finish, refusal = "stop", None
    match call.fault:
        case Fault.TRUNCATED:
            text, finish = text[: len(text) // 2], "length"
        case Fault.CUT_JSON:
            text = text[: len(text) // 2]
        case Fault.PROSE:
            text = f"Sure! I looked at [all] of it {{closely}}.\n```json\n{text}\n```\nAnything else? {{}}"
        case Fault.REFUSAL:
            text, refusal = None, "I'm sorry, I can't help with that."
        case Fault.EMPTY:
            text = ""
        case Fault.DUPLICATE if text.startswith("{") and "[" not in text:
            text = text[:-1] + ", " + text[1:]  # a tagging: the same keys again
    message = {"role": "assistant", "content": text, "refusal": refusal}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    limit = call.body.get("max_tokens") or call.body.get("max_completion_tokens") or 10**9
    spent = {"prompt_tokens": _input_tokens(call), "completion_tokens": min(len(text or "") // 4, limit)}
    call.usage = {**spent, "total_tokens": sum(spent.values())}
    return {
        "id": f"chatcmpl-{hashlib.sha256(json.dumps(call.body).encode()).hexdigest()[:12]}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [] if call.fault is Fault.NO_CHOICES else [choice],
        "usage": None if call.fault is Fault.NO_USAGE else call.usage,
    }


def _input_tokens(call: Call) -> int:
    """A token for four bytes of text, and for each 28 x 28 pixels of an image."""
    parts = [p for m in call.body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    texts = [m["content"] for m in call.body["messages"] if isinstance(m["content"], str)]
    texts += [part["text"] for part in parts if part["type"] == "text"]
    texts.append(json.dumps(call.body.get("response_format", "")))
    return sum(len(text.encode()) for text in texts) // 4 + sum(_patches(image) for image in call.images)


def _patches(image: bytes) -> int:
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return -(-opened.width // 28) * -(-opened.height // 28)
    except OSError:
        return 0


def answer(body: dict[str, Any]) -> Any:
    """What a decent model says: read off the JSON schema, tags off the pixels of the image."""
    schema = _schema_of(body)
    seen = [_features(image) for image in _images_of(body)]
    said = scripted_answers.answer(body, schema, seen)
    if said is not None:
        return said
    last = seen[-1] if seen else np.full(5, 0.5)
    return {name: _tag(name, part["enum"], last) for name, part in schema.get("properties", {}).items()}


def _tag(name: str, tags: list[str], seen: np.ndarray) -> str:
    visible = [tag for tag in tags if tag != "not visible"] or tags
    which = hashlib.sha256(name.encode()).digest()[0] % len(seen)
    return visible[min(int(seen[which] * len(visible)), len(visible) - 1)]


def _features(image: bytes) -> np.ndarray:
    """(5,) in [0, 1]: brightness, contrast, where the light is (left to right, top to bottom), fineness."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            luma = np.asarray(opened.convert("L").resize((32, 32)), dtype=float) / 255
    except OSError:
        return np.frombuffer(hashlib.sha256(image).digest()[:5], dtype=np.uint8) / 256
    mass = luma.sum() + 1e-9
    across = (luma.sum(axis=0) * np.linspace(0, 1, 32)).sum() / mass
    down = (luma.sum(axis=1) * np.linspace(0, 1, 32)).sum() / mass
    fine = np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()
    spread = [luma.mean() * 1.5, luma.std() * 2.2, (across - 0.4) * 5, (down - 0.4) * 5, fine * 4]
    return np.clip(spread, 0, 1)


def _spoilt(value: Any, fault: Fault | None) -> Any:
    """`value` with `fault` in it, where the fault is one of content."""
    tagging = isinstance(value, dict) and all(isinstance(tag, str) for tag in value.values())
    if tagging:
        first = next(iter(value))
        match fault:
            case Fault.RENAMED:
                value[f"{first} of it"] = value.pop(first)
            case Fault.MISSING:
                del value[first]
            case Fault.FOREIGN_TAG:
                value[first] = "chartreuse-ish"
            case Fault.WRONG_TYPES:
                value = {name: [i, None, {}][i % 3] for i, name in enumerate(value)}
        return value
    kind = next((kind for kind, items in value.items() if items), next(iter(value)))
    listed = value[kind]
    match fault:
        case Fault.WRONG_TYPES if not listed:
            value[kind] = "object color"
        case _ if not listed:
            pass  # an answer that holds nothing has nothing to spoil
        case Fault.RENAMED:
            listed[0]["name"] = "the teddy bear's overall Appearance!"
        case Fault.MISSING:
            del listed[0]
        case Fault.FOREIGN_TAG:
            listed[0]["tags"] = ["unknown", "UNKNOWN", "a=b|c;d"]
        case Fault.DUPLICATE:
            upper = {key: text.upper() if isinstance(text, str) else text for key, text in listed[0].items()}
            listed += [upper, dict(listed[0])]
        case Fault.MANY_TAGS:
            listed[0]["tags"] = [f"tag {i}" for i in range(2000)]
        case Fault.WRONG_TYPES:
            listed[0]["name"] = 7
            listed[-1] = "object color"
    return value


def _schema_of(body: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of the answer: of the response format, else out of the messages."""
    wanted = body.get("response_format", {}).get("json_schema")
    if wanted:
        return wanted["schema"]
    decoder = json.JSONDecoder()
    for message in reversed(body["messages"]):
        text = message["content"] if isinstance(message["content"], str) else ""
        for start in (i for i, c in enumerate(text) if c == "{"):
            try:
                value, _ = decoder.raw_decode(text, start)
            except ValueError:
                continue
            if "properties" in value:
                return value
    return {}


def _images_of(body: dict[str, Any]) -> list[bytes]:
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def main() -> None:
    parser = argparse.ArgumentParser(description="An OpenAI-compatible server for tests.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--latency-s", type=float, default=0.0, help="seconds before each answer")
    arguments = parser.parse_args()
    with ScriptedLLM(port=arguments.port, latency_s=arguments.latency_s) as server:
        print(server.base_url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.wait()


if __name__ == "__main__":
    main()
