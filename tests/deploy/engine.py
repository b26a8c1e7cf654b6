"""A container engine, and a base image for machines that reach no registry."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.images import build
from shared.version import VERSION

HERE = Path(__file__).parent
OWN_BASE = "localhost/hibug2-base:bookworm"
OTHERS = "localhost/hibug2-test-others:1"
# How the chart runs every container.
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@dataclass(frozen=True)
class Engine:
    """podman or docker."""

    name: str

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Standard output of the command; AssertionError with what it said when it fails."""
        done = subprocess.run([self.name, *arguments], capture_output=True, text=True, check=False, timeout=900)
        assert not check or done.returncode == 0, f"{self.name} {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start(self, name: str, image: str, *command: str, options: Sequence[str] = ()) -> str:
        """Start a hardened container under `name`."""
        self("run", "--detach", "--name", name, *HARDENED, *options, image, *command)
        return name

    def stop(self, name: str, grace_s: int) -> tuple[int, float]:
        """SIGTERM, and SIGKILL after `grace_s`: (exit status, seconds that it took)."""
        started = time.monotonic()
        self("stop", f"--time={grace_s}", name)
        return int(self("inspect", "--format", "{{.State.ExitCode}}", name)), time.monotonic() - started

    def logs(self, name: str) -> str:
        done = subprocess.run([self.name, "logs", name], capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def healthy(self, name: str, within_s: float = 60) -> bool:
        """True as soon as the gRPC health service in the container answers SERVING."""
        end = time.monotonic() + within_s
        probe = ("exec", name, "/opt/venv/bin/python", "-m", "shared.rpc.probe", "localhost:50051")
        while time.monotonic() < end:
            if subprocess.run([self.name, *probe], capture_output=True, check=False).returncode == 0:
                return True
            if self("inspect", "--format", "{{.State.Running}}", name) != "true":
                return False
            time.sleep(0.2)
        return False

    def image(self, image: str) -> dict[str, Any]:
        """What the engine knows of an image."""
        found: dict[str, Any] = json.loads(self("image", "inspect", image))[0]
        return found

    def has(self, image: str) -> bool:
        return subprocess.run([self.name, "image", "inspect", image], capture_output=True, check=False).returncode == 0


def find() -> Engine | str:
    """An engine that works here, or why there is none."""
    name = build.engine()
    if name is None:
        return "neither podman nor docker is here"
    if name == "podman" and "CONTAINERS_CONF" not in os.environ and not _has_crun():
        os.environ["CONTAINERS_CONF"] = str(HERE / "containers.conf")
    done = subprocess.run([name, "info"], capture_output=True, text=True, check=False)
    return Engine(name) if done.returncode == 0 else f"{name} does not work: {done.stderr.strip()}"


def _has_crun() -> bool:
    return shutil.which("crun") is not None


def base_image(engine: Engine) -> str | None:
    """A base with Python 3.11: $BASE, the default when a registry gives it, or one made by debootstrap; None: none."""
    wanted = os.environ.get("BASE", build.BASE)
    pulled = subprocess.run([engine.name, "pull", "--quiet", wanted], capture_output=True, check=False)
    if engine.has(wanted) or pulled.returncode == 0:
        return wanted
    if engine.has(OWN_BASE):
        return OWN_BASE
    if shutil.which("debootstrap") is None or os.getuid() != 0:
        return None
    with tempfile.TemporaryDirectory(prefix="hibug2-base-") as folder:
        root = Path(folder) / "root"
        include = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", root], check=True, capture_output=True)
        packed = Path(folder) / "base.tar"
        subprocess.run(["tar", "--create", "--file", packed, "--directory", root, "."], check=True)
        engine("import", str(packed), OWN_BASE)
    return OWN_BASE


def others_image(engine: Engine, base: str) -> str:
    """An image with Redis and Prometheus, of Debian's packages."""
    if not engine.has(OTHERS):
        with build.own_authority() as authority:
            engine(
                *("build", "--quiet", "--file", str(HERE / "others.Dockerfile"), "--build-arg", f"BASE={base}"),
                *(authority if engine.name == "podman" else ()),
                *("--tag", OTHERS, str(HERE)),
            )
    return OTHERS


def readable(folder: Path) -> Path:
    """The folder, resolved, and open to the services' user: pytest keeps its folders to their owner."""
    folder = folder.resolve()
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    return folder


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def of(service: str) -> str:
    """The image of a service as `build` names it."""
    return f"hibug2-{service}:{VERSION}"
