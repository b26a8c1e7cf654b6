"""The local stack as containers, by the compose file beside: for those who ask for it and have an engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).parent / "compose.yaml"


def compose() -> list[str] | None:
    """The command that runs compose files here: docker's, podman's or podman-compose; None where none works."""
    return next((command for command in _candidates() if _works(command)), None)


def _candidates() -> Iterator[list[str]]:
    for command in (["docker", "compose"], ["podman", "compose"], ["podman-compose"]):
        if shutil.which(command[0]):
            yield command


def _works(command: list[str]) -> bool:
    """Compose is there, and so is the engine that it drives."""
    for probe in ([*command, "version"], [command[0].removesuffix("-compose"), "info"]):
        try:
            done = subprocess.run(probe, capture_output=True, check=False, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.returncode:
            return False
    return True


def up(command: list[str]) -> int:
    """Build the images and start all containers, over the folder HIBUG2_IMAGES (the home by default)."""
    images = os.environ.get("HIBUG2_IMAGES", str(Path.home()))
    print(f"starting containers by `{' '.join(command)}`; they read images below {images} (HIBUG2_IMAGES)")
    status = _run(command, "up", "--build", "--detach", images=images)
    if status == 0:
        print("up: gRPC 127.0.0.1:50051, pages http://127.0.0.1:8080/, Grafana http://127.0.0.1:3000/")
    return status


def down(command: list[str]) -> int:
    """Stop the containers; artifacts stay in their volume. A stack that is not up is none to stop."""
    return _run(command, "down", images=os.environ.get("HIBUG2_IMAGES", str(Path.home())))


def are_up(command: list[str]) -> bool:
    """True when containers of the stack run."""
    done = subprocess.run(
        [*command, "--file", str(FILE), "ps", "--quiet"],
        capture_output=True,
        check=False,
        env={**os.environ, "HIBUG2_IMAGES": os.environ.get("HIBUG2_IMAGES", "/")},
    )
    return done.returncode == 0 and bool(done.stdout.strip())


def _run(command: list[str], *arguments: str, images: str) -> int:
    environment = {**os.environ, "HIBUG2_IMAGES": images}
    return subprocess.run([*command, "--file", str(FILE), *arguments], env=environment, check=False).returncode
