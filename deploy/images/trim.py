"""`python trim.py /opt/venv SERVICE`: takes out of an image's environment what nothing in it imports.

Tests, headers, sources and type stubs of libraries; of Arrow its RPC and its own S3 client (s3fs is ours); of botocore
the descriptions of services other than the object store; of SciPy the packages that the statistics do not stand on; of
Pygments most languages; the other services; debug symbols. That it still runs is shown by the warm-up in the build and
by `make test-deploy`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SCIPY = {"_lib", "_external", "sparse", "special", "__pycache__"}
SCIPY_PARTS = ("sparse/csgraph", "sparse/linalg", "_lib/cobyqa", "_lib/pyprima", "special/cython_special*")
PYGMENTS = {"__init__", "_mapping", "python", "special", "text"}
BOTOCORE = {"s3", "sts", "sso", "sso-oidc", "signin"}
# libarrow_python is there under three names; the extension modules ask for the one with the short version.
ARROW = ("*_flight*", "*_s3*", "libarrow_python.so", "libarrow_python.so.*.*.*")
SOURCES = ("*.pyi", "*.pyx", "*.pxd", "*.pxi", "*.h", "*.hpp", "*.c", "*.cc", "*.cpp", "*.cu", "*.a", "*.f", "*.f90")
_STRIP_FROM_BYTES = 500_000


def superfluous(packages: Path, service: str) -> Iterator[Path]:
    """Files and folders below `packages`, a site-packages folder, that may go from the image of `service`."""
    yield from _other_folders(packages / "services", {service, "__pycache__"})
    yield from (folder for folder in packages.glob("*/**/tests") if folder.is_dir())
    yield from packages.glob("*/tests")
    for pattern in SOURCES:
        yield from packages.rglob(pattern)
    yield packages / "kubernetes" / "aio"
    yield packages / "numba" / "cuda"
    yield packages / "numpy" / "distutils"
    for pattern in SCIPY_PARTS:
        yield from packages.glob(f"scipy/{pattern}")
    for pattern in ARROW:
        yield from packages.glob(f"pyarrow/**/{pattern}")
    lexers = packages / "pygments" / "lexers"
    yield from (path for path in lexers.rglob("*.py*") if path.name.partition(".")[0] not in PYGMENTS)
    yield from _other_folders(packages / "scipy", SCIPY)
    yield from _other_folders(packages / "botocore" / "data", BOTOCORE)


def _other_folders(parent: Path, kept: set[str]) -> Iterator[Path]:
    if parent.is_dir():
        yield from (path for path in parent.iterdir() if path.is_dir() and path.name not in kept)


def trim(packages: Path, service: str) -> None:
    """Take everything out of `packages` that the image of `service` does without."""
    for path in set(superfluous(packages, service)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # may lie in one that is gone already
        else:
            path.unlink(missing_ok=True)
    libraries = list(packages.rglob("*.so*"))
    needed = {name for library in libraries for name in _needs(library)}
    for library in libraries:
        # what a wheel brings along in <package>.libs was rewritten by its maker; stripping such a file can break it
        if library.parent.name.endswith(".libs"):
            if library.name not in needed:
                library.unlink()
        elif library.stat().st_size >= _STRIP_FROM_BYTES:
            subprocess.run(["strip", "--strip-unneeded", library], check=True)  # noqa: S603, S607 - the builder's own


def _needs(library: Path) -> list[str]:
    """The libraries that the dynamic linker loads with this one."""
    command = ["readelf", "--dynamic", "--wide", str(library)]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout  # noqa: S603 - as above
    return [line.partition("[")[2].rstrip("]") for line in told.splitlines() if "(NEEDED)" in line]


if __name__ == "__main__":
    for found in Path(sys.argv[1]).glob("lib/python3*/site-packages"):
        trim(found, sys.argv[2])
