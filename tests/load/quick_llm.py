"""An OpenAI-compatible endpoint that always says the same after a while, and costs next to nothing.

    python -m tests.load.quick_llm --latency-s 0.3 --answer '{"light": "dark"}'

It prints its base URL. GET /calls tells how many calls came since the last look, and when (seconds, ascending).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

_END = b"\r\n\r\n"


class Endpoint(asyncio.Protocol):
    """One connection; a request is answered when all of it has come and the latency is over."""

    latency_s = 0.0
    answer = b""
    came: list[float]  # when each call came, monotonic

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._parts: list[bytes] = []
        self._missing = 0  # bytes of the body

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            self._parts.append(data)
            head, end, body = b"".join(self._parts).partition(_END)
            if not end:
                return
            self._parts = []
            if head.startswith(b"GET"):
                self._reply(json.dumps(self.came).encode())
                self.came.clear()
                return
            lines = head.lower().split(b"\r\n")
            length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length"))
            self._missing = length - len(body)
        if self._missing == 0:
            self.came.append(time.monotonic())
            asyncio.get_running_loop().call_later(self.latency_s, self._reply, self.answer)

    def _reply(self, body: bytes) -> None:
        if not self._transport.is_closing():
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self._transport.write(head.encode() + body)


def completion(answer: str) -> bytes:
    """A chat completion that says `answer`."""
    message = {"role": "assistant", "content": answer, "refusal": None}
    body = {
        "id": "chatcmpl-quick",
        "object": "chat.completion",
        "created": 0,
        "model": "quick",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 900, "completion_tokens": len(answer) // 4, "total_tokens": 900 + len(answer) // 4},
    }
    return json.dumps(body).encode()


async def serve(latency_s: float, answer: str) -> None:
    Endpoint.latency_s, Endpoint.answer, Endpoint.came = latency_s, completion(answer), []
    server = await asyncio.get_running_loop().create_server(Endpoint, "127.0.0.1", 0, backlog=2048)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-s", type=float, default=0.3)
    parser.add_argument("--answer", required=True, help="JSON")
    given = parser.parse_args()
    asyncio.run(serve(given.latency_s, given.answer))


if __name__ == "__main__":
    main()
