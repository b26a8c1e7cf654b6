"""The whole platform on one machine without containers: all servers in one process, embedded Redis, a folder as store.

The servers are the ones that containers run, built by the same functions and reached over real sockets; the tagging
workers are processes of their own.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.local.plain import PLAIN
from deploy.local.redis import embedded_redis
from services.attribute import config as attribute_config
from services.attribute import server as attribute
from services.enumeration import config as enumeration_config
from services.enumeration import server as enumeration
from services.gateway import config as gateway_config
from services.gateway import server as gateway
from services.prediction import config as prediction_config
from services.prediction import server as prediction
from services.repair import config as repair_config
from services.repair import server as repair
from services.tagging import config as tagging_config
from services.tagging import server as tagging
from shared import traces
from shared.config import ServiceSettings
from shared.rpc.server import RunningServer

_ROOT = Path(__file__).resolve().parents[2]
_ANY_PORT = "127.0.0.1:0"
BACKENDS: dict[str, tuple[Any, Callable[[Any], Awaitable[RunningServer]]]] = {
    "attribute": (attribute_config.Settings, attribute.start_server),
    "tagging": (tagging_config.Settings, tagging.start_server),
    "enumeration": (enumeration_config.Settings, enumeration.start_server),
    "prediction": (prediction_config.Settings, prediction.start_server),
    "repair": (repair_config.Settings, repair.start_server),
}


@dataclass
class Stack:
    """Start it with `async with`; `address` is then the gateway's."""

    folder: Path
    image_prefixes: tuple[str, ...]
    listen: str = _ANY_PORT
    http_port: int = 0
    workers: int = 2
    with_gateway: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)  # further settings, for every service that has them
    address: str = ""
    redis_url: str = ""
    backends: dict[str, str] = field(default_factory=dict)  # the gateway's settings that name them
    _exits: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Stack:
        try:
            await self._start()
        except BaseException:
            await self._exits.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._exits.enter_context(traces.sending("stack", self._settings(ServiceSettings).otlp_endpoint))
        self.redis_url = await asyncio.to_thread(self._exits.enter_context, embedded_redis())
        for name, (settings, start) in BACKENDS.items():
            running = await start(self._settings(settings))
            self._exits.push_async_callback(running.stop)
            self.backends[f"{name}_address"] = running.address
        self.start_workers(self.workers)
        if self.with_gateway:
            running = await gateway.start_server(
                self._settings(
                    gateway_config.Settings,
                    listen=self.listen,
                    http_port=self.http_port,
                    http_host="127.0.0.1",
                    **self.backends,
                )
            )
            self._exits.push_async_callback(running.stop)
            self.address = running.address

    def _settings(self, kind: Any, **more: Any) -> Any:
        values = {
            "listen": _ANY_PORT,
            "metrics_port": 0,
            "drain_s": 0.5,
            "store_url": (self.folder / "store").resolve().as_uri(),
            "redis_url": self.redis_url,
            "image_prefixes": self.image_prefixes,
            **PLAIN,
            **self.settings,
            **more,
        }
        return kind(**{k: v for k, v in values.items() if k in kind.model_fields})

    def start_workers(self, count: int) -> None:
        """Start `count` tagging workers more, each a process."""
        environment = {
            **os.environ,
            "HIBUG2_STORE_URL": (self.folder / "store").resolve().as_uri(),
            "HIBUG2_REDIS_URL": self.redis_url,
            "HIBUG2_IMAGE_PREFIXES": ",".join(self.image_prefixes),
            "HIBUG2_LISTEN": _ANY_PORT,
            "HIBUG2_METRICS_PORT": "0",
            "HIBUG2_LOG_LEVEL": "warning",
            "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "client")]),
            **{f"HIBUG2_{k.upper()}": str(v) for k, v in {**PLAIN, **self.settings}.items()},
        }
        for _ in range(count):
            worker = subprocess.Popen([sys.executable, "-m", "services.tagging", "worker"], env=environment)
            self._exits.callback(_end, worker)


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    try:
        worker.wait(10)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
