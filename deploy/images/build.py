"""`python -m deploy.images.build [SERVICE …]`: builds the images with podman or docker and says how large they are.

The wheels are built once, each service gets its own extra. What an image holds beyond its base has a budget; over it
the build fails. From the repository's root.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.version import VERSION

ROOT = Path(__file__).resolve().parents[2]
BASE = "python:3.11-slim"
EXTRAS = "s3,tls,traces"
# Extras that bring more than the budgets allow for: a CLIP model's library, and the Kubernetes client.
HEAVY = {"clip", "jobs"}
# MB (10^6 bytes) beyond the base.
BUDGET_MB = {
    "gateway": 350,
    "attribute": 400,
    "tagging": 350,
    "enumeration": 450,
    "prediction": 350,
    "repair": 350,
}


@dataclass(frozen=True)
class Built:
    """An image that was built: `size_mb` is what it holds beyond its base."""

    service: str
    image: str
    size_mb: float
    seconds: float


def engine() -> str | None:
    """`podman` or `docker`, whichever is there (CONTAINER_ENGINE decides); None where neither is."""
    wanted = os.environ.get("CONTAINER_ENGINE")
    return next((name for name in ([wanted] if wanted else ["podman", "docker"]) if shutil.which(name)), None)


def build(
    engine: str,
    services: Sequence[str],
    *,
    base: str = BASE,
    tag: str = VERSION,
    registry: str = "",
    extras: str = EXTRAS,
) -> Iterator[Built]:
    """Build the images of `services` one after the other; subprocess.CalledProcessError when one does not build."""
    prefix = f"{registry.rstrip('/')}/" if registry else ""
    with own_authority() as authority:
        for service in services:
            image = f"{prefix}hibug2-{service}:{tag}"
            started = time.monotonic()
            _run(
                [
                    *(engine, "build", "--quiet", "--file", "deploy/images/Dockerfile", "--tag", image),
                    *("--build-arg", f"BASE={base}", "--build-arg", f"SERVICE={service}"),
                    *("--build-arg", f"EXTRAS={extras}", "--build-arg", f"VERSION={tag}"),
                    *("--build-arg", f"REVISION={_revision()}"),
                    *(authority if engine == "podman" else []),
                    ".",
                ]
            )
            size = _size_mb(engine, image) - _size_mb(engine, base)
            yield Built(service, image, size, time.monotonic() - started)


@contextmanager
def own_authority() -> Iterator[list[str]]:
    """Options by which a podman build trusts whom pip trusts here (PIP_CERT), while it builds and not after."""
    bundle = os.environ.get("PIP_CERT")
    if not bundle:
        yield []
        return
    with tempfile.TemporaryDirectory() as folder:
        conf = Path(folder) / "pip.conf"
        conf.write_text(f"[global]\ncert = {bundle}\n")
        conf.chmod(0o644)
        yield ["--network=host", f"--volume={bundle}:{bundle}:ro", f"--volume={conf}:/etc/pip.conf:ro"]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout.strip()


def _size_mb(engine: str, image: str) -> float:
    return int(_run([engine, "image", "inspect", "--format", "{{.Size}}", image])) / 1e6


def _revision() -> str:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return ""
    return _run([git, "rev-parse", "HEAD"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.images.build", description=__doc__)
    parser.add_argument("services", nargs="*", metavar="SERVICE", help=f"of {', '.join(BUDGET_MB)}; all by default")
    parser.add_argument("--base", default=BASE, help="any image with Python 3.11 and venv")
    parser.add_argument("--tag", default=VERSION)
    parser.add_argument("--registry", default="", help="registry and folder in front of the names")
    parser.add_argument(
        "--extras", default=EXTRAS, help="extras of pyproject.toml beside the service's own, such as s3,tls,traces,gs"
    )
    given = parser.parse_args(arguments)
    if wrong := set(given.services) - BUDGET_MB.keys():
        parser.error(f"no such service: {', '.join(sorted(wrong))}; there are {', '.join(BUDGET_MB)}")
    found = engine()
    if found is None:
        print("neither podman nor docker is here: install one of them, or set CONTAINER_ENGINE", file=sys.stderr)
        return 1
    over = []
    services = given.services or list(BUDGET_MB)
    try:
        for built in build(
            found, services, base=given.base, tag=given.tag, registry=given.registry, extras=given.extras
        ):
            budget = BUDGET_MB[built.service]
            print(f"{built.image:32} {built.size_mb:6.0f} MB of {budget} beyond {given.base}, {built.seconds:4.0f} s")
            if built.size_mb > budget and not HEAVY & set(given.extras.split(",")):
                over.append(built.service)
    except subprocess.CalledProcessError as error:
        print(f"{found} could not build: exit status {error.returncode}", file=sys.stderr)
        return 1
    if over:
        print(f"over budget: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
