"""One chat completion over HTTP: what is sent, what comes back, and what went wrong on the way.

On aiohttp itself: a provider's SDK around it took eight times the CPU of a call, which is what bounds a worker.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp

_PATH = "/chat/completions"
_CONNECT_S = 30.0
_IDLE_S = 4.0  # many servers hang up after 5 s, and a request that meets with that may count as paid
_NOT_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    aiohttp.InvalidURL,
)


class NoAnswer(Exception):
    """A request that brought no answer. Neither this nor its subclasses hold the key or the request."""


class Broken(NoAnswer):
    """The connection did not come about, or not to its end; where it was not `sent` nobody can have been paid."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.sent = sent


class Rejected(NoAnswer):
    """The endpoint answered with an error; `code`, `kind` and `param` are "" where it does not say them."""

    def __init__(self, status: int, headers: Mapping[str, str], answer: Any) -> None:
        super().__init__(f"status {status}")
        self.status = status
        self.headers = headers  # whatever the case of their names
        told = answer.get("error", answer) if isinstance(answer, Mapping) else answer
        fields = told if isinstance(told, Mapping) else {}
        self.code, self.kind, self.param = (_text(fields.get(name)) for name in ("code", "type", "param"))
        self.message = _text(fields.get("message")) or str(told or f"status {status}")


class Wire:
    """Connections to one endpoint, opened as they are needed. Belongs to one event loop; close it when done."""

    def __init__(self, base_url: str, api_key: str) -> None:
        self._url = base_url.rstrip("/") + _PATH
        self._headers = {"Content-Type": "application/json"}
        if urlsplit(base_url).username is None:  # else user and password of the address are what is shown
            self._headers["Authorization"] = f"Bearer {api_key or 'none'}"  # local servers take any
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, body: bytes) -> Any:
        """What the endpoint answers to `body`, as JSON; as text where it does not call it JSON.

        Raises Broken, Rejected, and ValueError (of json, of a decoder) for what is called JSON and is not. Knows no
        end: that is the caller's.
        """
        if self._session is None:
            self._session = self._opened()
        try:
            async with self._session.post(self._url, data=body) as response:
                raw = await response.read()
        except aiohttp.ClientError as error:  # not raised from it: some hold the headers, and with them the key
            failed = Broken(f"{type(error).__name__} {error}".strip(), sent=not isinstance(error, _NOT_SENT))
        else:
            is_json = response.content_type.endswith("json")
            if response.ok and response.status < 300:
                return json.loads(raw) if is_json else raw.decode(errors="replace")
            raise Rejected(response.status, response.headers, _readable(raw))
        raise failed

    def _opened(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # The slots of `Endpoint` are the limit.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=bool(getproxies()),  # looked up at each request, so only where there are any
        )


def _readable(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
