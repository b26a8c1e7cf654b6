"""Images, built once; and all of them with Redis on one network."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deploy.images import build
from hibug2 import Client
from tests.deploy import engine as engines
from tests.deploy.engine import Engine

SERVICES = tuple(build.BUDGET_MB)
WORKERS = ("tagging-worker-0", "tagging-worker-1")
STORE = "/var/lib/hibug2"


@pytest.fixture(scope="session")
def engine() -> Engine:
    if not os.environ.get("HIBUG2_TEST_DEPLOY"):
        pytest.skip("builds and runs images, which takes minutes: `make test-deploy`")
    found = engines.find()
    if isinstance(found, str):
        pytest.skip(f"no images can be built: {found}")
    return found


@pytest.fixture(scope="session")
def base(engine: Engine) -> str:
    found = engines.base_image(engine)
    if found is None:
        pytest.skip("no base image: no registry answers, and debootstrap (as root) is not here; set BASE to an image")
    return found


@pytest.fixture(scope="session")
def built(engine: Engine, base: str) -> dict[str, build.Built]:
    """The image of every service."""
    images = {}
    for image in build.build(engine.name, SERVICES, base=base):
        budget = build.BUDGET_MB[image.service]
        print(
            f"\n{image.image}: {image.size_mb:.0f} MB of {budget} beyond {base}, built in {image.seconds:.0f} s", end=""
        )
        images[image.service] = image
    return images


@dataclass
class Platform:
    """Every service and two workers as containers, with Redis, on a network of their own."""

    engine: Engine
    others: str  # the image that Redis is in
    images: Path  # below here images may be read; the same path inside as outside
    mark: str = field(default_factory=lambda: f"hibug2-{uuid.uuid4().hex[:6]}")
    port: int = 0

    def container(self, component: str) -> str:
        return f"{self.mark}-{component}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self) -> Client:
        return Client(self.address)

    def start(self) -> None:
        self.port = engines.free_port()
        self.engine("network", "create", self.mark)
        self.engine("volume", "create", f"{self.mark}-store")
        self.engine("volume", "create", f"{self.mark}-redis")
        kept = ("redis-server", "--appendonly", "yes", "--save", "")
        self._start("redis", self.others, f"--volume={self.mark}-redis:/data", command=kept)
        for service in SERVICES[1:]:
            self._start(service, engines.of(service), *self._settings())
        for worker in WORKERS:
            self._start(worker, engines.of("tagging"), *self._settings(), "--cpus=1", command=("worker",))
        addresses = [f"--env=HIBUG2_{s.upper()}_ADDRESS=dns:///{s}:50051" for s in SERVICES[1:]]
        self._start(
            *("gateway", engines.of("gateway"), *self._settings(), *addresses, f"--publish=127.0.0.1:{self.port}:50051")
        )
        for component in (*SERVICES, *WORKERS):
            name = self.container(component)
            assert self.engine.healthy(name), self.engine.logs(name)

    def _settings(self) -> list[str]:
        return [
            f"--env=HIBUG2_STORE_URL=file://{STORE}",
            "--env=HIBUG2_REDIS_URL=redis://redis:6379/0",
            f"--env=HIBUG2_IMAGE_PREFIXES={self.images.as_uri()}",
            f"--volume={self.mark}-store:{STORE}",
            f"--volume={self.images}:{self.images}:ro",
        ]

    def _start(self, component: str, image: str, *options: str, command: tuple[str, ...] = ()) -> None:
        network = (f"--network={self.mark}", f"--network-alias={component}")
        self.engine.start(self.container(component), image, *command, options=(*network, *options))

    def restart(self, component: str) -> None:
        """Start a container that ended; it may have another address now, as a new pod has."""
        name = self.container(component)
        self.engine("start", name)
        assert component == "redis" or self.engine.healthy(name), self.engine.logs(name)

    def stop(self) -> None:
        names = [self.container(component) for component in ("gateway", *SERVICES[1:], *WORKERS, "redis")]
        self.engine("rm", "--force", "--volumes", "--time=1", *names, check=False)
        self.engine("network", "rm", self.mark, check=False)
        self.engine("volume", "rm", f"{self.mark}-store", f"{self.mark}-redis", check=False)


@pytest.fixture(scope="session")
def platform(
    engine: Engine, base: str, built: dict[str, build.Built], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    images = engines.readable(tmp_path_factory.mktemp("images"))
    running = Platform(engine, engines.others_image(engine, base), images)
    try:
        running.start()
        yield running
    finally:
        running.stop()
