"""The local stack as containers, by the compose file beside: for those who ask for it and have an engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from deploy.images import build
from shared.version import VERSION

FILE = Path(__file__).parent / "compose.yaml"
# As the file has them: <name>_PORT in the environment changes one.
PORTS = {"GRPC": "50051", "HTTP": "8080", "PROMETHEUS": "9090", "GRAFANA": "3000"}


def compose() -> list[str] | None:
    """The command that runs compose files here: docker's, podman's or podman-compose; None where none works."""
    return next((command for command in _candidates() if _works(command)), None)


def _candidates() -> Iterator[list[str]]:
    for command in (["docker", "compose"], ["podman", "compose"]):
        if shutil.which(command[0]):
            yield command
    # pip puts it beside Python, which need not be on the path
    beside = os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent)))
    if found := shutil.which("podman-compose", path=beside):
        yield [found]


def _engine(command: list[str]) -> str:
    return Path(command[0]).name.removesuffix("-compose")


def _works(command: list[str]) -> bool:
    """Compose is there, and so is the engine that it drives."""
    for probe in ([*command, "version"], [_engine(command), "info"]):
        try:
            done = subprocess.run(probe, capture_output=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.returncode:
            return False
    return True


def up(command: list[str]) -> int:
    """Build our images (not where IMAGE_PREFIX says whence they come) and start all containers; an exit status."""
    if not os.environ.get("IMAGE_PREFIX"):
        base, extras = os.environ.get("BASE", build.BASE), os.environ.get("EXTRAS", build.EXTRAS)
        tag = os.environ.get("TAG", VERSION)
        try:
            for built in build.build(_engine(command), list(build.BUDGET_MB), base=base, tag=tag, extras=extras):
                print(f"{built.image}: {built.size_mb:.0f} MB beyond {base}, {built.seconds:.0f} s", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"{_engine(command)} could not build: exit status {error.returncode}", file=sys.stderr)
            return 1
    print(f"starting containers by `{' '.join(command)}`; they read images below {_images()} (HIBUG2_IMAGES)")
    status = run(command, "up", "--detach")
    if status == 0:
        grpc, http, prometheus, grafana = (os.environ.get(f"{name}_PORT", port) for name, port in PORTS.items())
        print(f"up: gRPC 127.0.0.1:{grpc}, pages http://127.0.0.1:{http}/", end=", ")
        print(f"Prometheus http://127.0.0.1:{prometheus}/, Grafana http://127.0.0.1:{grafana}/")
    return status


def down(command: list[str]) -> int:
    """Stop the containers; artifacts stay in their volume. A stack that is not up is none to stop."""
    return run(command, "down")


def are_up(command: list[str]) -> bool:
    """True when containers of the stack run."""
    done = subprocess.run(
        [*command, "--file", str(FILE), "ps", "--quiet"], capture_output=True, check=False, env=_environment()
    )
    return done.returncode == 0 and bool(done.stdout.strip())


def run(command: list[str], *arguments: str) -> int:
    """One command of compose on our file; its exit status."""
    return subprocess.run([*command, "--file", str(FILE), *arguments], env=_environment(), check=False).returncode


def _images() -> str:
    """The folder that the services read images from: HIBUG2_IMAGES, or the home."""
    return os.environ.get("HIBUG2_IMAGES", str(Path.home()))


def _environment() -> dict[str, str]:
    return {**os.environ, "HIBUG2_IMAGES": _images()}
